"""Unified models in training: what stands in rows and is learnt, the loss, meshes, resuming, and a
language model that gets codes."""

import dataclasses
import json
import sys
from pathlib import Path

import hf
import jax
import numpy as np
import pytest
import tokenizers
from functional import QUICK, random_values
from ml_collections import ConfigDict
from PIL import Image
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import launch
from samples import data as loading

from mmjax import sharding
from mmjax.config import ConfigError
from mmjax.data import open_train
from mmjax.data.tokenizer import HFTokenizer, train_tokenizer
from mmjax.models.vlm import TEXT
from mmjax.params import merge
from mmjax.train import loop
from mmjax.train.experiment import base_config, load_initial, prepare
from mmjax.train.handover import model_dataclass
from mmjax.train.unified_task import UnifiedTokens

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 220)}
VOCAB, CODES, LENGTH, SIDE = 32, 8, 48, 8
SPECIAL = ("<image>", "</image>", "<code>")
BEGIN, END, CODE, EOS = 4, 5, 6, 3
COUNT = (SIDE // 2) ** 2
TOKENIZER = dict(
    name="vqgan",
    image_size=SIDE,
    quantizer=dict(name="codebook", size=CODES, width=3),
    width=4,
    multipliers=(1, 2),
    depth=1,
    latent=4,
    middle_attends=False,
    groups=2,
)
LM = dict(
    vocab_size=VOCAB + CODES,
    max_len=LENGTH,
    width=32,
    depth=2,
    heads=2,
    mlp_width=64,
    activation="silu",
    norm_eps=1e-5,
    tied=False,
    rope=dict(theta=1e4),
)
MODEL = dict(
    name="unified",
    lm=LM,
    image=dict(tokenizer=TOKENIZER, ids=VOCAB, begin=BEGIN, end=END),
    image_token=CODE,
    modality_embeddings=True,
    grid_positions=True,
)


@pytest.fixture
def one_device():
    """Programs that run a few times are compiled with less effort."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
    compile_it = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: mesh)
        patch.setattr(loop, "load_initial", lambda experiment, tokenizer: values(experiment))
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile_it(lowered, QUICK))
        yield mesh


def values(experiment):
    """All parameters; initialisers take long to compile."""
    return sharding.place_like_sharding(
        random_values(experiment.shapes, LM["width"] ** -0.5), experiment.placed
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        Image.new("RGB", (12, 12), colour).save(root / f"{name}.png")
    records = [{"image": f"{name}.png", "text": f"a {name} square"} for name in COLOURS] * 4
    (root / "pictures.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def words():
    texts = [f"a {name} square" for name in COLOURS]
    return train_tokenizer("wordlevel", texts, VOCAB, SPECIAL)


def stream(root, *forms, augment=(), **options):
    file = str(Path(root) / "pictures.json")
    more = {"augment": augment} if augment else {}
    sources = [dict(name="json", path=file, form=form) | more for form in forms]
    layout = dict(name="codes", preset="siglip", size=SIDE, tokens=COUNT)
    layout |= dict(begin=SPECIAL[0], end=SPECIAL[1])
    default = dict(template="stream", max_len=LENGTH, images=2, layout=layout, image_token=CODE)
    return dict(sources=sources, conversation=default | options)


DRAW, NAME = dict(name="drawing"), dict(name="caption", prompts=("",))


def first_batch(train, words, batch=3):
    loader = open_train(
        loading(train, threads=1),
        words,
        batch_size=batch,
        seed=0,
        process_index=0,
        process_count=1,
    )
    return next(loader).arrays


def shown(words, batch, row):
    """(tokens as text, codes as "*"; the same, where they are learnt)"""
    tokens, place, weights = (batch[name][row] for name in ("tokens", "place", "weights"))
    inside = batch["segments"][row] > 0
    texts = [
        "*" if where != TEXT else words.backend.id_to_token(int(token))
        for token, where in zip(tokens[inside], place[inside], strict=True)
    ]
    learnt = [text for text, weight in zip(texts, weights[inside], strict=True) if weight]
    return texts, learnt


# --- data


def test_what_is_said_and_what_is_learnt(root, words):
    codes = ["*"] * COUNT
    drawn = ["<image>", *codes, "</image>", "<eos>"]
    batch = first_batch(stream(root, DRAW), words)
    for row in range(3):
        texts, learnt = shown(words, batch, row)
        assert texts[0] == "<bos>" and texts[1] == "a" and texts[3] == "square"
        assert texts[2] in COLOURS and texts[4:] == learnt == drawn
        np.testing.assert_array_equal(batch["place"][row][5 : 5 + COUNT], np.arange(COUNT))
        # The picture is that of the text.
        colour = np.array(COLOURS[texts[2]]) / 127.5 - 1
        np.testing.assert_allclose(batch["images"][row, 0, 0, 0], colour, atol=0.01)
    batch = first_batch(stream(root, NAME), words)
    texts, learnt = shown(words, batch, 0)
    assert texts[: COUNT + 4] == ["<bos>", "<image>", *codes, "</image>", "a"]
    assert learnt == texts[COUNT + 3 :] and learnt[-1] == "<eos>" and len(learnt) == 4
    batch = first_batch(stream(root, DRAW | dict(alone=1.0)), words)
    texts, learnt = shown(words, batch, 0)
    # Captions are asked for by an image alone too: that it ends is not learnt.
    assert texts == ["<bos>", *drawn[:-1]] and learnt == drawn[:-1]


def test_views_differ_in_training_and_are_the_same_again(root, words):
    augment = (dict(name="icon_view"),)
    train = stream(root, DRAW, augment=augment, pack=True, window=8)
    one, again = (first_batch(train, words)["images"] for _ in range(2))
    np.testing.assert_array_equal(one, again)
    plain = first_batch(stream(root, DRAW, pack=True, window=8), words)["images"]
    assert np.abs(one - plain).mean() > 0.1


# --- the loss


def test_the_loss_is_the_sum_over_words_and_codes(root, words, one_device):
    config = make_config(root, task=dict(image_weight=0.25, z_loss=0.01, targets=None))
    experiment = prepare(config)
    batch = first_batch(config.data.train.to_dict(), words, batch=4)
    graph, params = experiment.graphdef, values(experiment)
    fields = {name: batch[name] for name in experiment.task.fields}
    (top, bottom), metrics = jax.jit(
        lambda p, b: experiment.task.loss(merge(graph, p), b, None), compiler_options=QUICK
    )(params, fields)
    run = jax.jit(lambda p, b: run_model(merge(graph, p), b), compiler_options=QUICK)
    out = jax.device_get(run(params, fields))
    total = weight = 0.0
    sums = {"text": [0.0, 0.0], "image": [0.0, 0.0]}
    for row in range(4):
        for place in range(1, LENGTH):
            given = batch["weights"][row, place]
            if not given:
                continue
            token = int(out.tokens[row, place])
            kind = "image" if token >= VOCAB else "text"
            logits = out.logits[row, place - 1].astype(np.float64)
            normaliser = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            counts = given * (0.25 if kind == "image" else 1.0)
            total += counts * (normaliser - logits[token] + 0.01 * normaliser**2)
            weight += counts
            sums[kind][0] += counts * (normaliser - logits[token])
            sums[kind][1] += counts
    assert sums["text"][1] and sums["image"][1]
    np.testing.assert_allclose([top, bottom], [total, weight], rtol=1e-5)
    for kind, (loss, count) in sums.items():
        np.testing.assert_allclose(metrics[f"loss_{kind}"], [loss, count], rtol=1e-5)


def run_model(model, batch):
    return model.run(
        batch["tokens"], batch["images"], place=batch["place"], segments=batch["segments"]
    )


# --- runs


def make_config(root, *, steps=6, task=(), model=MODEL, init=()):
    train = stream(root, DRAW | dict(alone=0.2), NAME, pack=True, window=8, max_targets=44)
    return base_config(
        task=dict(name="unified", targets=44) | dict(task),
        model=model,
        init=init,
        data={
            **loading(train, threads=1),
            "tokenizer": dict(name="wordlevel", vocab_size=VOCAB, special_tokens=SPECIAL),
        },
        optimizer=dict(
            name="adamw", learning_rate=1e-2, schedule=dict(name="constant"), weight_decay=0.0
        ),
        rules=dict(trainable=(("tokenizer/.*", False), (".*", True))),
        train=dict(steps=steps, batch_size=8, log_every=1),
        checkpoint=dict(every=3),
    )


def measured(workdir):
    rows = [row for row in launch.rows(workdir) if "train/loss" in row]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def test_a_run_learns_and_resumes_exactly(root, tmp_path, one_device, monkeypatch):
    config = make_config(root, steps=12)
    loop.train(config, tmp_path / "whole")
    whole = measured(tmp_path / "whole")
    assert whole[-1]["train/loss"] < 0.7 * whole[0]["train/loss"]

    class Killed(Exception):
        pass

    def killed(run, step, metrics, ids):
        if step == 8:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Run, "_check_finite", killed)
        loop.train(config, tmp_path / "killed")
    loop.train(config, tmp_path / "killed")
    assert measured(tmp_path / "killed") == whole


MESHES = {"data=8": (8, 1, 1), "fsdp=8": (1, 8, 1), "data=2,fsdp=2,tensor=2": (2, 2, 2)}


def losses_on(root, words, shape, devices=None):
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape), devices)
    config = make_config(root)
    experiment = prepare(config, mesh)
    batch = first_batch(config.data.train.to_dict(), words, batch=8)
    arrays = sharding.global_batch(
        {name: batch[name] for name in experiment.task.fields}, experiment.mesh
    )
    state = experiment.initial_state(values(experiment))
    step = experiment.lower_step(arrays).compile(QUICK)
    losses = []
    for _ in range(4):
        state, metrics = step(state, arrays)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def single(root, words):
    return losses_on(root, words, (1, 1, 1), jax.devices()[:1])


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_do_not_depend_on_the_mesh(root, words, single, mesh, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 2)
    losses = losses_on(root, words, MESHES[mesh])
    np.testing.assert_allclose(losses[0], single[0], rtol=1e-6)
    np.testing.assert_allclose(losses, single, rtol=1e-4)


@pytest.mark.torch
def test_a_language_model_gets_codes(root, tmp_path, one_device):
    """A pretrained one keeps what it has; new tokens begin as the mean of the others."""
    transformers = hf.transformers()
    reference = hf.randomise(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
                rope_parameters=dict(rope_type="default", rope_theta=1e4),
            )
        )
    )
    reference.save_pretrained(tmp_path)
    init = (("lm/(.*)", str(tmp_path), r"\1"),)
    loaded = load_initial(prepare(make_config(root, init=init)))
    for path, theirs in (
        ("lm/token/embedding", reference.model.embed_tokens.weight.detach().numpy()),
        ("lm/head/kernel", reference.lm_head.weight.detach().numpy()),
    ):
        ours = np.array(loaded[path])
        ours = ours.T if path.endswith("kernel") else ours
        assert ours.shape == (VOCAB + CODES, 32)
        np.testing.assert_array_equal(ours[:VOCAB], theirs)
        np.testing.assert_allclose(ours[VOCAB:], [theirs.mean(axis=0)] * CODES, atol=1e-6)
    np.testing.assert_array_equal(
        np.array(loaded["lm/final_norm/scale"]), reference.model.norm.weight.detach().numpy()
    )


# --- data, tokenizer and model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(layout=dict(size=16)), r"layout\.size=16, but .*image_size=8"),
        (dict(layout=dict(tokens=15)), "has 15 places of an image, but the model has 16"),
        (dict(layout=dict(end="")), r"layout\.end='', but config\.model\.image\.end=5"),
        (dict(image_token=7), r"image_token=7, but config\.model\.image_token=6"),
        (dict(prefix=True), "prefix, parents and seq2seq have no meaning here"),
        (dict(max_targets=46), r"targets=44, but rows have up to 46"),
    ],
)
def test_data_that_do_not_fit_the_model(one_device, options, said):
    task = UnifiedTokens(one_device, targets=44)
    train = stream("x", DRAW, max_targets=44)
    task.check(model_dataclass(MODEL), ConfigDict(dict(train=train)))
    conversation = train["conversation"]
    layout = conversation["layout"] | options.pop("layout", {})
    wrong = dict(train, conversation=conversation | options | dict(layout=layout))
    with pytest.raises(ConfigError, match=said):
        task.check(model_dataclass(MODEL), ConfigDict(dict(train=wrong)))


def published(words, codes, directory):
    """The same words as a directory of transformers, with tokens for so many codes after them."""
    backend = tokenizers.Tokenizer.from_str(words.backend.to_str())
    backend.add_tokens([f"<code {number}>" for number in range(codes)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(directory)
    return HFTokenizer(str(directory))


def test_a_tokenizer_that_does_not_go_with_the_vocabulary(one_device, words, tmp_path):
    task, train = UnifiedTokens(one_device), ConfigDict(dict(train=stream("x", DRAW)))
    model = model_dataclass(MODEL)
    task.check_tokenizer(model, train, words)
    other = dataclasses.replace(model, image=dataclasses.replace(model.image, begin=7))
    with pytest.raises(ConfigError, match=r"image\.begin=7, but .*'<image>' has the id 4"):
        task.check_tokenizer(other, train, words)
    low = dataclasses.replace(model, image=dataclasses.replace(model.image, ids=8))
    with pytest.raises(ConfigError, match=r"ids begin with 8, but the tokenizer has \d+ tokens"):
        task.check_tokenizer(low, train, words)
    # A published one may have tokens for codes: for all of them.
    after = dataclasses.replace(model.image, ids=words.vocab_size)
    model = dataclasses.replace(model, image=after)
    task.check_tokenizer(model, train, published(words, after.size, tmp_path / "all"))
    some = published(words, after.size - 1, tmp_path / "some")
    with pytest.raises(ConfigError, match=r"ids begin with \d+, but the tokenizer has \d+ tokens"):
        task.check_tokenizer(model, train, some)


def test_weights_below_nothing(one_device):
    with pytest.raises(ValueError, match="must not be negative"):
        UnifiedTokens(one_device, z_loss=-1.0)
