"""Vision-language models in training: what is frozen costs nothing, how conversations share rows
does not matter, stages follow each other, and data must fit the model."""

import copy
import itertools
import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from compilations import compilations
from functional import QUICK, random_values
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import launch
from samples import data as loading
from samples import encode, picture

from mmjax import sharding
from mmjax.config import ConfigError
from mmjax.data import open_train
from mmjax.data.tokenizer import train_tokenizer
from mmjax.params import merge
from mmjax.train import loop
from mmjax.train.checkpoints import CheckpointError
from mmjax.train.experiment import base_config, prepare
from mmjax.train.handover import model_dataclass
from mmjax.train.tasks import Seq2SeqVisionLanguage, VisionLanguage

WORDS = "a dog on the red square left of three cats and one tree what is how many there"
WORDS = WORDS.split(" ")
WIDTH, DEPTH, HIDDEN, VOCAB, LENGTH, PICTURES, TARGETS = 32, 2, 64, 64, 96, 8, 48
PATCHES, PATCH = 4, 8 * 8 * 3
# What stands where visual tokens go is in no vocabulary.
PLACEHOLDER = VOCAB
MODEL = dict(
    name="vlm",
    encoder={**tiny.VIT, "pooling": "none"},
    connector=dict(name="mlp"),
    lm=dict(
        vocab_size=VOCAB,
        max_len=LENGTH,
        width=WIDTH,
        depth=DEPTH,
        heads=2,
        mlp_width=HIDDEN,
        activation="silu",
        norm_eps=1e-5,
        tied=True,
        rope=dict(theta=1e4),
    ),
    image_token=PLACEHOLDER,
    features=(-1,),
    features_norm=True,
)
ALIGN = (("connector/.*", True), (".*", False))
LAYOUT = dict(name="tiles", preset="siglip", size=16, tokens=PATCHES, rows=2, columns=2)
ADAMW = dict(name="adamw", learning_rate=1e-2, schedule=dict(name="constant"), weight_decay=0.1)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """All is on one device; programs that run a few times are compiled with less effort."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
    compile_it = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: mesh)
        # Initialisers take long to compile.
        load = loop.load_initial
        patch.setattr(loop, "load_initial", lambda x, t: load(x, t) if x.config.init else values(x))
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile_it(lowered, QUICK))
        jax.config.update("jax_disable_most_optimizations", True)
        yield mesh
        jax.config.update("jax_disable_most_optimizations", False)


def text(rng, low, high):
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))


def talk(rng, images, turns, longest):
    """A record of LLaVA's form."""
    said = []
    for turn in range(turns):
        markers = "<image>\n" * (len(images) if turn == 0 else 0)
        said.append({"from": "human", "value": markers + text(rng, 2, 6)})
        said.append({"from": "gpt", "value": text(rng, 1, longest)})
    return {"conversations": said} | ({"image": images} if images else {})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Conversations about an image, two or none; images with questions, and these one by one."""
    root = tmp_path_factory.mktemp("conversations")
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(8)]
    for i, name in enumerate(names):
        size = tuple(int(side) for side in rng.integers(10, 40, 2))
        (root / name).write_bytes(encode(picture(i, size), "PNG"))
    talks = [talk(rng, [names[i % 8]], 1 + i % 3, 12) for i in range(16)]
    talks += [talk(rng, [names[i], names[-1 - i]], 1, 6) for i in range(4)]
    talks += [talk(rng, [], 2, 8) for _ in range(4)]
    asked = [
        {
            "image": name,
            "questions": [
                {"question": text(rng, 2, 5), "answer": text(rng, 1, 4)} for _ in range(1 + i % 4)
            ],
        }
        for i, name in enumerate(names)
    ]
    single = [{**one, "questions": [question]} for one in asked for question in one["questions"]]
    for name, records in dict(talks=talks, asked=asked, single=single).items():
        (root / f"{name}.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("wordlevel", [" ".join([*WORDS, "question:", "answer:"])], VOCAB)


def source(root, name, form="llava"):
    return dict(name="json", path=str(root / f"{name}.json"), form=form)


def stream(*sources, **options):
    default = dict(template="qa", max_len=LENGTH, images=PICTURES, layout=LAYOUT, window=32)
    return dict(sources=sources, conversation=default | dict(image_token=PLACEHOLDER) | options)


def make_config(data, *, targets=None, model=MODEL, **groups):
    defaults = dict(
        optimizer=ADAMW,
        train=dict(steps=2, batch_size=4, log_every=1),
        checkpoint=dict(every=2),
        data={**loading(data, threads=1), "tokenizer": dict(name="wordlevel", vocab_size=VOCAB)},
    )
    return base_config(task=dict(name="vlm", targets=targets), model=model, **(defaults | groups))


# --- a step


class Steps:
    """A compiled step of 4 rows, and the batches of its stream."""

    def __init__(self, tokenizer, data, **groups):
        groups = dict(train=dict(steps=3, batch_size=4)) | groups
        config = make_config(data, targets=data["conversation"].get("max_targets"), **groups)
        self.experiment = prepare(config)
        loader = open_train(config.data, tokenizer, batch_size=4, seed=0)
        self.batches = [next(loader).arrays for _ in range(3)]
        self.compiled = self.experiment.lower_step(self._placed(0)).compile()

    def _placed(self, number):
        return sharding.global_batch(self.batches[number], self.experiment.mesh)

    def run(self, count):
        """The first state, the last, and metrics."""
        state = self.experiment.initial_state(values(self.experiment))
        first = jax.tree.map(np.array, state)
        for number in range(count):
            state, metrics = self.compiled(state, self._placed(number))
        return first, jax.device_get(state), jax.device_get(metrics)

    def flops(self):
        return self.experiment.step_flops(self.experiment.batch_shapes())


def values(experiment):
    """All parameters."""
    return sharding.place_like_sharding(
        random_values(experiment.shapes, WIDTH**-0.5), experiment.placed
    )


@pytest.fixture(scope="module")
def full_and_aligned(root, tokenizer):
    train = stream(source(root, "talks"), pack=True, max_targets=TARGETS)
    return (
        Steps(tokenizer, train),
        Steps(tokenizer, train, rules=dict(trainable=ALIGN)),
    )


def test_alignment_moves_the_connector_only(full_and_aligned):
    first, last, _ = full_and_aligned[1].run(3)
    assert {path.split("/")[0] for path in last.frozen} == {"encoder", "lm"}
    for path, value in last.frozen.items():
        np.testing.assert_array_equal(value, first.frozen[path])
    assert {path.split("/")[0] for path in last.trainable} == {"connector"}
    assert moved(last.trainable, first.trainable) == {"connector"}
    leaves = jax.tree.leaves_with_path(last.opt_state)
    moments = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.ndim]
    assert len(moments) == 2 * len(last.trainable)
    assert all("connector/" in name for name in moments)


def moved(last, first):
    """The parts that have changed."""
    return {path.split("/")[0] for path in last if not np.array_equal(last[path], first[path])}


def test_alignment_has_no_weight_gradients(full_and_aligned):
    """The matrix products of both steps, one by one."""
    pictures, rows = 2 * 4 * PICTURES * PATCHES, 2 * 4 * LENGTH
    patch = pictures * PATCH * WIDTH
    encoder = DEPTH * pictures * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    encoder += DEPTH * pictures * 2 * PATCHES * WIDTH
    connector = pictures * WIDTH * WIDTH  # each of its two maps
    weights = DEPTH * rows * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)
    weights += 2 * 4 * TARGETS * WIDTH * VOCAB
    attention = DEPTH * rows * 2 * LENGTH * WIDTH
    full, aligned = (steps.flops() for steps in full_and_aligned)
    # Of images there are no gradients, and so none of the first map's input in alignment.
    assert full == 2 * patch + 3 * (encoder + 2 * connector + weights + attention)
    assert aligned == patch + encoder + 5 * connector + 2 * weights + 3 * attention
    assert full - aligned == weights + (patch + 2 * encoder) + connector


def test_alignment_needs_less_memory(full_and_aligned):
    """By the gradients of what is frozen, what the encoder keeps for them, and the moments."""
    full, aligned = (steps.compiled.memory_analysis() for steps in full_and_aligned)
    state = full_and_aligned[1].experiment.abstract_state()
    frozen = sum(4 * leaf.size for leaf in state.frozen.values())
    assert full.argument_size_in_bytes - aligned.argument_size_in_bytes == 2 * frozen
    assert full.temp_size_in_bytes - aligned.temp_size_in_bytes > frozen
    assert aligned.temp_size_in_bytes < 0.75 * full.temp_size_in_bytes


# --- how conversations share rows


@pytest.fixture(scope="module")
def terms():
    """(attention, targets) -> the terms of the loss of a batch and their gradients, compiled once
    for each shape. The model with prefixes has learned positions."""
    made = {}

    def make(attention, targets):
        if (attention, targets) not in made:
            train = stream(dict(name="json", form="llava"), prefix=attention == "prefix")
            config = make_config(train, model={**MODEL, "attention": attention})
            if attention == "prefix":
                config.model.lm.rope = None
            experiment = prepare(config)
            task = VisionLanguage(experiment.mesh, targets=targets)

            def top(params, batch):
                model = merge(experiment.graphdef, params)
                (top, bottom), metrics = task.loss(model, batch, None)
                return top, (bottom, metrics["accuracy"][0])

            program = jax.jit(jax.value_and_grad(top, has_aux=True), compiler_options=QUICK)
            params = values(experiment)
            made[attention, targets] = lambda batch: program(params, batch)
        return made[attention, targets]

    return make


def summed(program, tokenizer, train, records, batch_size):
    """The terms over one epoch of a stream."""
    train["conversation"] |= dict(window=records)
    loader = open_train(loading(train), tokenizer, batch_size=batch_size, seed=3)
    total, seen = None, 0
    while seen < records:
        batch = next(loader)
        assert not batch.skipped
        seen += len(batch.ids)
        here = jax.tree.map(np.asarray, program(batch.arrays))
        total = here if total is None else jax.tree.map(np.add, total, here)
    assert seen == records
    return total


def test_rows_do_not_matter(root, tokenizer, terms):
    """Packed, with questions apart, padded, and grouped by length: the loss and its gradients."""
    talks, single = source(root, "talks"), source(root, "single", "questions")
    asked = source(root, "asked", dict(name="questions", turns=4, apart=True))
    plain, few = terms("causal", None), terms("causal", TARGETS)
    packed = dict(pack=True, max_targets=TARGETS)
    ways = {
        "padded": [(plain, 4, talks, {}), (plain, 4, single, {})],
        "grouped": [
            (plain, 4, one, dict(lengths=(LENGTH // 2, LENGTH))) for one in (talks, single)
        ],
        "packed": [(few, 1, one, packed) for one in (talks, single)],
        "apart": [(few, 1, one, packed | dict(parents=True)) for one in (talks, asked)],
    }
    compare(tokenizer, ways)


def test_rows_do_not_matter_to_prefixes(root, tokenizer, terms):
    program, talks = terms("prefix", None), source(root, "talks")
    ways = {
        way: [(program, 1, talks, dict(prefix=True, pack=way == "packed"))]
        for way in ("padded", "packed")
    }
    compare(tokenizer, ways)


def compare(tokenizer, ways):
    results = {}
    for way, parts in ways.items():
        sums = [
            summed(
                program,
                tokenizer,
                stream(one, **options),
                len(json.loads(Path(one["path"]).read_text())),
                batch_size,
            )
            for program, batch_size, one, options in parts
        ]
        results[way] = jax.tree.map(lambda *x: sum(x), *sums)
    (top, (bottom, correct)), grads = results["padded"]
    assert bottom > 100
    for (other, (weight, right)), others in results.values():
        assert weight == bottom and right == correct
        np.testing.assert_allclose(other / weight, top / bottom, rtol=1e-5)
        same(others, grads, rtol=1e-5)


def same(actual, expected, rtol):
    """Relative to the largest value of a layer: biases of keys have gradients of rounding only."""
    for layer in {path.rpartition("/")[0] for path in expected}:
        paths = [path for path in expected if path.rpartition("/")[0] == layer]
        largest = max(np.abs(expected[path]).max() for path in paths)
        assert largest > 1e-4
        for path in paths:
            np.testing.assert_allclose(actual[path], expected[path], rtol=0, atol=rtol * largest)


def test_accumulation_equals_the_large_batch(root, tokenizer, terms):
    """The parameters move by the gradients of all tokens; parts with more of them weigh more."""
    steps = Steps(
        tokenizer,
        stream(source(root, "talks")),
        optimizer=dict(
            name="sgd", learning_rate=1.0, schedule=dict(name="constant"), clip_norm=None
        ),
        train=dict(steps=1, batch_size=4, accumulate=2),
    )
    (batch, *_) = steps.batches
    (top, (bottom, correct)), grads = terms("causal", None)(batch)
    weights = batch["weights"].sum(1)
    assert abs(weights[0::2].sum() / weights[1::2].sum() - 1) > 0.2
    first, last, metrics = steps.run(1)
    np.testing.assert_allclose(metrics["loss"], top / bottom, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], correct / bottom, rtol=1e-5)
    moves = {path: first.trainable[path] - last.trainable[path] for path in grads}
    same(moves, {path: grad / bottom for path, grad in grads.items()}, rtol=2e-5)


def test_packed_rows_are_full(tmp_path, tokenizer):
    """A mixture as of LLaVA-1.5: short answers, descriptions, long conversations, texts."""
    rng = np.random.default_rng(0)
    (tmp_path / "0.png").write_bytes(encode(picture(0, (16, 16)), "PNG"))
    kinds = [(["0.png"], 1, 3), (["0.png"], 1, 180), (["0.png"], 6, 40), ([], 3, 300)]
    records = [talk(rng, *kinds[i]) for i in rng.choice(4, 400, p=[0.4, 0.2, 0.25, 0.15])]
    (tmp_path / "mixture.json").write_text(json.dumps(records))
    layout = dict(name="whole", preset="siglip", size=16, tokens=576)
    rows = dict(max_len=2048, images=3, layout=layout, window=400)

    def filled(count, **options):
        train = stream(source(tmp_path, "mixture"), **rows | options)
        loader = open_train(loading(train), tokenizer, batch_size=1, seed=0)
        return np.mean([next(loader).arrays["segments"] > 0 for _ in range(count)])

    packed, padded = filled(150, pack=True), filled(150)
    assert packed >= 0.95 and padded < 0.5


# --- stages


def stage(root, **groups):
    """Alignment, unless groups say otherwise."""
    sources = [source(root, "talks"), source(root, "asked", dict(name="questions", turns=4))]
    train = stream(*sources, pack=True, max_targets=TARGETS)
    align = dict(rules=dict(trainable=ALIGN), train=dict(steps=4, batch_size=4, log_every=1))
    return make_config(train, targets=TARGETS, **(align | groups))


def tuning(root, start, **groups):
    init = ((".*", str(start), r"\g<0>"),)
    return stage(root, **(dict(init=init, rules={}, seed=1) | groups))


@pytest.fixture(scope="module")
def aligned(root, tmp_path_factory):
    """The work directory of an alignment that was not interrupted."""
    workdir = tmp_path_factory.mktemp("stages") / "align"
    loop.train(stage(root), workdir)
    return workdir


def test_an_interrupted_stage_goes_on_as_if_it_had_not_been(root, aligned, tmp_path):
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        asked = loop._StopOnSignal.requested

        def requested(self, step):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            return asked(self, step)

        patch.setattr(loop._StopOnSignal, "requested", requested)
        with pytest.raises(loop.Preempted):
            loop.train(stage(root), workdir)
    assert launch.last_step(workdir) == 2
    loop.train(stage(root), workdir)
    assert [row["step"] for row in launch.rows(workdir)] == [1, 2, 3, 4]
    assert launch.rows(workdir) == launch.rows(aligned)
    jax.tree.map(
        np.testing.assert_array_equal, launch.parameters(workdir), launch.parameters(aligned)
    )
    assert order(workdir) == order(aligned)


def order(workdir):
    """The digest of the records that came, of a finished run."""
    return json.loads((workdir / "manifest.json").read_text())[-1]["order_sha256"]


def test_tuning_begins_where_alignment_ended(root, aligned, tmp_path, monkeypatch):
    first = {}

    def remember(params):
        first.update(jax.tree.map(np.array, params))
        return ""

    monkeypatch.setattr(loop, "fingerprint", remember)
    loop.train(tuning(root, aligned, train=dict(steps=4, batch_size=4)), tmp_path / "tune")
    ended = launch.parameters(aligned)
    assert ended["trainable"] and ended["frozen"]
    ended = ended["trainable"] | ended["frozen"]
    assert ended.keys() == first.keys()
    for path, value in ended.items():
        np.testing.assert_array_equal(first[path], value)
    tuned = launch.parameters(tmp_path / "tune")["trainable"]
    assert moved(tuned, ended) == {"encoder", "connector", "lm"}
    # Of the same data, with another seed.
    assert len(order(aligned)) == 64 and order(tmp_path / "tune") != order(aligned)


WORDS_OF = "connector/(head|token)/embedding"


def naming(root, start):
    """Alignment by the words of captions, with the words of the language model of a run."""
    model = MODEL | dict(connector=dict(name="align", vocab_size=VOCAB))
    trainable = ((WORDS_OF, False), *ALIGN)
    init = ((WORDS_OF, str(start), "lm/token/embedding"), ("lm/.*", str(start), r"\g<0>"))
    config = stage(
        root,
        model=model,
        init=init,
        rules=dict(trainable=trainable),
        train=dict(steps=48, batch_size=4, log_every=1),
        checkpoint=dict(every=4, keep_every=4),
    )
    with config.unlocked():
        config.task = dict(name="words")
    return config


def test_alignment_by_words(root, aligned, tmp_path):
    config = naming(root, aligned)
    loop.train(config, tmp_path / "run")
    losses = [row["train/loss"] for row in launch.rows(tmp_path / "run")]
    # Rows without a sample of one picture have none.
    losses = [loss for loss in losses if loss > 0]
    assert len(losses) > 12 and np.mean(losses[-6:]) < 0.8 * np.mean(losses[:3])
    ended, lm = launch.parameters(tmp_path / "run"), launch.parameters(aligned)["frozen"]
    assert set(ended["trainable"]) == {
        f"connector/{name}"
        for name in ("hidden/kernel", "hidden/bias", "norm/scale", "norm/bias", "head_norm/scale",
                     "head_norm/bias")
    }  # fmt: skip
    # Both tables are the language model's, which nothing has changed.
    for path in ("connector/head/embedding", "connector/token/embedding", "lm/token/embedding"):
        np.testing.assert_array_equal(ended["frozen"][path], lm["lm/token/embedding"])
    # Another model and task, but the same records, as far as the other run went.
    position = json.loads((tmp_path / "run/checkpoints/4/data/metadata").read_text())
    assert position["order_sha256"] == order(aligned)


def test_whose_words_a_picture_names(root, aligned, tokenizer):
    """Those of samples with this picture only; not of texts, nor where there are two."""
    experiment = prepare(naming(root, aligned))
    loader = open_train(experiment.config.data, tokenizer, batch_size=4, seed=0)
    batch = next(loader).arrays
    single = np.zeros(batch["segments"].shape, bool)
    for row, (segments, place) in enumerate(zip(batch["segments"], batch["place"], strict=True)):
        for segment in range(1, segments.max() + 1):
            shown = place[(segments == segment) & (place >= 0)] // PATCHES
            single[row, segments == segment] = len(set(shown)) == 1
    learnt = batch["weights"] > 0
    assert (learnt & single).any() and (learnt & ~single).any()
    model = merge(experiment.graphdef, values(experiment))
    loss = jax.jit(
        lambda batch: experiment.task.loss(model, batch, None)[0], compiler_options=QUICK
    )
    expected = loss(batch)
    others = loss(batch | dict(weights=np.where(single, batch["weights"], 0)))
    np.testing.assert_array_equal(others, expected)
    none = loss(batch | dict(weights=np.where(single, 0, batch["weights"])))
    assert none[0] == 0 and expected[0] > 1


def test_flamingo_beside_a_frozen_language_model(root, tokenizer):
    """Questions that share their image, and texts alone; what is frozen stays bit for bit."""
    model = MODEL | dict(
        name="flamingo",
        connector=dict(name="perceiver", latents=2, depth=1, heads=2, head_dim=8),
        gated=dict(heads=2, head_dim=16),
        every=2,
        after=1,
        new_tokens=1,
    )
    asked = source(root, "asked", dict(name="questions", turns=4, apart=True))
    # A place in the text for each picture, whatever the resampler makes of it.
    layout = LAYOUT | dict(tokens=1)
    train = stream(
        source(root, "talks"), asked, pack=True, parents=True, layout=layout, max_targets=TARGETS
    )
    trainable = (("(encoder|lm)/.*", False), (".*", True))
    steps = Steps(tokenizer, train, model=model, rules=dict(trainable=trainable))
    first, last, metrics = steps.run(3)
    assert {path.split("/")[0] for path in last.frozen} == {"encoder", "lm"}
    for path, value in last.frozen.items():
        np.testing.assert_array_equal(value, first.frozen[path])
    assert moved(last.trainable, first.trainable) == {"connector", "gated", "new_token"}
    assert 1 < metrics["loss"] < 10


def test_mllama_beside_a_frozen_language_model(root, tokenizer):
    """Tiles of boards of all shapes, several samples in a row; what is frozen stays."""
    vit = {name: tiny.VIT[name] for name in ("image_size", "patch_size", "width", "depth", "heads")}
    model = MODEL | dict(
        name="mllama",
        encoder=dict(**vit, global_depth=1, mlp_width=HIDDEN, activation="gelu", norm_eps=1e-5),
        connector=dict(name="linear"),
        features=(0,),
        features_norm=False,
        looks=(0, 2),
        new_tokens=1,
    )
    layout = dict(name="mllama", preset="mllama", size=16)
    asked = source(root, "asked", dict(name="questions", turns=4, apart=True))
    train = stream(
        source(root, "talks"), asked, pack=True, parents=True, layout=layout, max_targets=TARGETS
    )
    trainable = (("lm/.*", False), (".*", True))
    steps = Steps(tokenizer, train, model=model, rules=dict(trainable=trainable))
    shapes = {
        int(place) % 8 for batch in steps.batches for place in batch["place"].ravel() if place >= 0
    }
    assert len(shapes) > 1 and max(map(lambda batch: batch["place"].max(), steps.batches)) >= 8
    first, last, metrics = steps.run(3)
    assert {path.split("/")[0] for path in last.frozen} == {"lm"}
    for path, value in last.frozen.items():
        np.testing.assert_array_equal(value, first.frozen[path])
    assert moved(last.trainable, first.trainable) == {"encoder", "connector", "gated", "new_token"}
    assert 1 < metrics["loss"] < 10


def test_a_stage_from_the_wrong_checkpoint(root, aligned, tmp_path):
    other = copy.deepcopy(MODEL)
    other["connector"]["activation"] = "relu"
    with pytest.raises(ConfigError, match=r"connector\.activation: 'relu' here, 'gelu' there"):
        loop.train(tuning(root, aligned, model=other), tmp_path / "a")
    other["connector"] = dict(name="pixel_shuffle", factor=2)
    train = stream(source(root, "talks"), layout=LAYOUT | dict(tokens=1))
    config = make_config(train, model=other, init=((".*", str(aligned), r"\g<0>"),))
    with pytest.raises(ConfigError, match=r"connector\.name: 'pixel_shuffle' here, 'mlp' there"):
        loop.train(config, tmp_path / "b")
    # Neither a run that is not there nor one that has not saved anything yet.
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text((aligned / "config.json").read_text())
    for start in (tmp_path / "nowhere", begun):
        with pytest.raises(CheckpointError, match=f"no checkpoint in {start}.*Train that run"):
            loop.train(tuning(root, start), tmp_path / "c")


def test_a_tokenizer_that_is_larger_than_the_vocabulary(root, tmp_path):
    small = copy.deepcopy(MODEL)
    small["lm"]["vocab_size"] = 8
    with pytest.raises(ConfigError, match=r"Set config\.model\.lm\.vocab_size"):
        loop.train(stage(root, model=small), tmp_path / "run")


# --- lengths


def test_one_program_for_each_length(root, tmp_path, tokenizer):
    train = stream(source(root, "talks"), lengths=(LENGTH // 2, LENGTH), window=24)
    config = make_config(train, train=dict(steps=6, batch_size=4), rules=dict(trainable=ALIGN))
    loader = open_train(loading(train), tokenizer, batch_size=4, seed=0)
    widths = [next(loader).arrays["tokens"].shape[1] for _ in range(6)]
    assert set(widths) == {LENGTH // 2, LENGTH}
    assert sum(one != other for one, other in itertools.pairwise(widths)) > 1
    with compilations() as compiled:
        loop.train(config, tmp_path / "run")
    assert compiled["jit(step)"] == 2
    assert launch.last_step(tmp_path / "run") == 6


# --- data and model


def changed(mapping, changes):
    """{"a.b": value}: the value at these keys of nested mappings."""
    result = copy.deepcopy(mapping)
    for path, value in changes.items():
        *groups, last = path.split(".")
        node = result
        for group in groups:
            node = node[group]
        node[last] = value
    return result


@pytest.mark.parametrize(
    ("model", "conversation", "targets", "said"),
    [
        ({}, {"layout.tokens": 3}, None, ["tokens=3", "makes 4"]),
        ({"connector": dict(name="pixel_shuffle", factor=2)}, {}, None, ["tokens=4", "makes 1"]),
        ({}, {"layout.size": 24}, None, ["size=24", "image_size=16"]),
        ({}, {"image_token": 5}, None, ["image_token=5", f"image_token={PLACEHOLDER}"]),
        ({}, {"prefix": True}, None, ["prefix=True", "attention='causal'"]),
        ({"attention": "prefix"}, {}, None, ["prefix=False", "attention='prefix'"]),
        ({"lm.rope": None}, {"max_len": 100}, None, ["max_len=100", "limit of 96"]),
        ({}, {}, 20, ["targets=20", "up to 96", "max_targets"]),
        ({}, {"max_targets": 30}, 20, ["targets=20", "up to 30"]),
        ({"connector": dict(name="perceiver", depth=1, latents=4, heads=2, head_dim=8, frames=3)},
         {}, None, ["images=8", "3 frames"]),
        ({}, {"layout": dict(name="anyres", preset="clip", size=16, tokens=4,
                             pinpoints=[[16, 32]])}, None, ["newlines", "newline=False"]),
        ({}, {"seq2seq": dict(max_len=8)}, None, ["seq2seq=", "max_len=8", "name='vlm'"]),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_the_model(mesh, model, conversation, targets, said):
    train = stream(dict(name="json", form="llava"))
    VisionLanguage(mesh).check(model_dataclass(MODEL), ConfigDict(dict(train=train)))
    train["conversation"] = changed(train["conversation"], conversation)
    with pytest.raises(ConfigError) as error:
        VisionLanguage(mesh, targets=targets).check(
            model_dataclass(changed(MODEL, model)), ConfigDict(dict(train=train))
        )
    lines = str(error.value).splitlines()[1:]
    assert any(all(part in line for part in said) for line in lines), error.value


def test_an_encoder_decoder_has_a_task_and_data_of_its_own(mesh):
    lm = dict(
        vocab_size=VOCAB,
        width=WIDTH,
        depth=1,
        decoder_depth=1,
        heads=2,
        head_dim=16,
        mlp_width=HIDDEN,
        activation="relu",
        gated=False,
        norm_eps=1e-6,
        tied=True,
        scale_logits=True,
        decoder_start_id=3,
    )
    model = model_dataclass({**MODEL, "name": "seq2seq_vlm", "lm": lm})

    def check(task=Seq2SeqVisionLanguage, targets=7, model=model, **seq2seq):
        train = stream(dict(name="json", form="llava"), seq2seq=seq2seq or None)
        task(mesh, targets=targets).check(model, ConfigDict(dict(train=train)))

    check(max_len=8, start=3)
    for arguments, said in (
        (dict(task=VisionLanguage, max_len=8), "config.model is a Seq2SeqVLMConfig"),
        (dict(model=model_dataclass(MODEL), max_len=8), "config.model is a VLMConfig"),
        (dict(max_len=8), "start=0, but the decoder begins with 3"),
        (dict(max_len=9, start=3), "targets=7, but rows have up to 8"),
        (dict(targets=None), "seq2seq=None, but config.model.name='seq2seq_vlm'"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(**arguments)


def test_all_that_does_not_fit_is_said_at_once():
    train = stream(dict(name="json", form="llava"), image_token=5, prefix=True)
    with pytest.raises(ConfigError, match=r"(?s)image_token=5.*prefix=True"):
        prepare(make_config(train))
    config = make_config(stream(dict(name="json", form="llava")))
    with config.unlocked():
        config.task = dict(name="words")
    with pytest.raises(ConfigError, match="mixtures of words, but those of 'mlp' are not"):
        prepare(config)
    train = dict(sources=[dict(name="json")], image=dict(preset="siglip", size=16))
    with pytest.raises(ConfigError, match="learns from conversations about images"):
        prepare(make_config(train))
