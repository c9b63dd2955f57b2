"""Language models in training, from texts alone: the loss is that of transformers for each text by
itself, data must fit the model, and a run learns and answers."""

import json
import sys
from pathlib import Path

import hf
import jax
import numpy as np
import pytest
from functional import QUICK, random_values
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import launch
from samples import data as loading

import mmjax
from mmjax import sharding
from mmjax.config import ConfigError
from mmjax.data import open_train
from mmjax.data.tokenizer import train_tokenizer
from mmjax.params import merge, split
from mmjax.train import loop
from mmjax.train.experiment import base_config, prepare
from mmjax.train.handover import model_dataclass
from mmjax.train.tasks import LanguageModelling

THINGS = ("dog", "cat", "tree", "bell", "rose", "crown", "egg", "star")
# Whatever is told, the question says the answer.
ASKED = {
    "is it red?": "yes",
    "is it blue?": "no",
    "how many are there?": "two",
    "what is on the left?": "a green square",
}
VOCAB, LENGTH, TARGETS = 48, 96, 24
MODEL = dict(
    name="lm",
    vocab_size=VOCAB,
    max_len=LENGTH,
    width=32,
    depth=2,
    heads=2,
    mlp_width=64,
    activation="silu",
    norm_eps=1e-5,
    tied=True,
    rope=dict(theta=1e4),
)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """All is on one device; programs that run a few times are compiled with less effort."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
    compile_it = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: mesh)
        # Initialisers take long to compile.
        patch.setattr(loop, "load_initial", lambda experiment, tokenizer: values(experiment))
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile_it(lowered, QUICK))
        yield mesh


def values(experiment):
    """All parameters."""
    width = experiment.config.model.width
    return sharding.place_like_sharding(
        random_values(experiment.shapes, width**-0.5), experiment.placed
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Things described in words, with questions."""
    path = tmp_path_factory.mktemp("told") / "told.json"
    rng = np.random.default_rng(0)
    records = [
        {
            "captions": [" ".join(rng.choice(THINGS, int(rng.integers(1, 6)))) for _ in range(2)],
            "questions": [{"question": q, "answer": a, "group": a} for q, a in ASKED.items()],
        }
        for _ in range(16)
    ]
    path.write_text(json.dumps(records))
    return path


def stream(path, sources=({},), *, form=(), **options):
    """Sources of the same file, each with options."""
    form = dict(name="described", **dict(form))
    files = [dict(name="json", path=str(path), form=form) | more for more in sources]
    return dict(sources=files, conversation=dict(template="qa", max_len=LENGTH) | options)


def packed(path, *sources, turns=2, **options):
    form = dict(turns=turns, retell=0.5)
    options = dict(pack=True, window=16, max_targets=TARGETS) | options
    return stream(path, sources or ({},), form=form, **options)


# --- the loss


@pytest.fixture(scope="module")
def tokenizer():
    words = " ".join([*THINGS, *ASKED, *ASKED.values(), "question: answer: describe the image."])
    return train_tokenizer("wordlevel", [words], VOCAB)


LLAMA = dict(
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", LLAMA),
        ("Mistral", LLAMA | dict(sliding_window=5)),
        ("GPT2", dict(n_embd=24, n_layer=2, n_head=4, n_positions=LENGTH)),  # learned positions
    ],
)
def test_the_loss_is_that_of_transformers_text_by_text(
    told, tokenizer, tmp_path, family, options, mesh
):
    """Packed in rows, of sources that weigh differently."""
    transformers = hf.transformers()
    import torch

    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **options, **special)
    reference = hf.randomise(transformers.AutoModelForCausalLM.from_config(config))
    reference.save_pretrained(tmp_path)
    train = packed(told, {}, dict(loss_weight=0.25))
    loader = open_train(loading(train, threads=1), tokenizer, batch_size=4, seed=0)
    batch = next(loader).arrays
    assert (batch["segments"].max(axis=1) > 1).all() and {0, 0.25, 1} == {*batch["weights"].flat}
    total = weight = right = 0.0
    for tokens, weights, segments in zip(
        batch["tokens"], batch["weights"], batch["segments"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            ids, counts = torch.tensor(tokens[here][None]).long(), weights[here][1:]
            with torch.no_grad():
                logits = reference(ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            total += float((losses.numpy() * counts).sum())
            right += float(((logits.argmax(-1) == ids[0, 1:]).numpy() * counts).sum())
            weight += float(counts.sum())
    model = mmjax.from_pretrained(tmp_path)
    graph, parameters = split(model)
    for targets in (TARGETS, None):
        task = LanguageModelling(mesh, targets=targets)
        loss = jax.jit(
            lambda p, b, task=task: task.loss(merge(graph, p), b, None), compiler_options=QUICK
        )
        fields = {name: batch[name] for name in task.fields}
        (top, bottom), metrics = loss(parameters, fields)
        assert float(bottom) == weight
        np.testing.assert_allclose(top, total, rtol=1e-5)
        assert metrics["accuracy"] == (right, weight)
        assert metrics["filled"] == ((batch["segments"] > 0).sum(), 4 * LENGTH)


# --- data and model


@pytest.mark.parametrize(
    ("model", "train", "targets", "said"),
    [
        ({}, dict(max_targets=30), TARGETS, "targets=24, but rows have up to 30 .*max_targets"),
        ({}, dict(max_targets=None), TARGETS, "targets=24, but rows have up to 96"),
        (dict(rope=None), dict(max_len=97), None, "max_len=97 exceeds the model's limit of 96"),
        ({}, dict(prefix=True), None, "prefix, parents and seq2seq have no meaning"),
        ({}, dict(parents=True), None, "prefix, parents and seq2seq have no meaning"),
        ({}, dict(pack=False, seq2seq=dict(max_len=4)), None, "seq2seq have no meaning"),
        (
            {},
            dict(images=4, layout=dict(name="whole", preset="clip", size=16, tokens=4)),
            None,
            "learns from texts: .* without `images` and `layout`",
        ),
    ],
)
def test_data_that_do_not_fit_the_model(mesh, model, train, targets, said):
    LanguageModelling(mesh, targets=TARGETS).check(
        model_dataclass(MODEL), ConfigDict(dict(train=packed("x.json")))
    )
    with pytest.raises(ConfigError, match=said):
        LanguageModelling(mesh, targets=targets).check(
            model_dataclass(MODEL | model), ConfigDict(dict(train=packed("x.json", **train)))
        )


def test_a_model_or_data_of_another_kind(mesh):
    task = LanguageModelling(mesh)
    captions = dict(sources=[dict(name="json", path="x.json")], text=dict(max_len=8))
    with pytest.raises(ConfigError, match=r"learns from texts: .* needs `conversation`"):
        task.check(model_dataclass(MODEL), ConfigDict(dict(train=captions)))
    vit = dict(name="vit", image_size=8, patch_size=4, width=16, depth=1, heads=2, mlp_width=16)
    vit |= dict(activation="gelu", norm_eps=1e-6, pooling="map", position="learned", num_classes=3)
    with pytest.raises(ConfigError, match=r"the name 'lm', but config\.model is a ViTConfig"):
        task.check(model_dataclass(vit), ConfigDict(dict(train=packed("x.json"))))
    with pytest.raises(ValueError, match="targets=0 must be at least 1"):
        LanguageModelling(mesh, targets=0)


# --- a run


def make_config(told, *, vocab_size=VOCAB, steps=60):
    asked = dict(
        name="vqa",
        every=steps,
        data=stream(told),
        limit=24,
        max_new_tokens=6,
        batch_size=4,
        controls=(),
        answers="answers.jsonl",
    )
    return base_config(
        task=dict(name="lm", targets=TARGETS),
        model=MODEL | dict(vocab_size=vocab_size),
        data={
            **loading(packed(told, turns=len(ASKED)), threads=1),
            "tokenizer": dict(name="wordlevel", vocab_size=VOCAB),
        },
        optimizer=dict(
            name="adamw", learning_rate=1e-2, schedule=dict(name="constant"), weight_decay=0.0
        ),
        train=dict(steps=steps, batch_size=4, log_every=1),
        checkpoint=dict(every=steps),
        evals=dict(asked=asked),
    )


def test_a_run_learns_and_answers(told, tmp_path):
    scores = loop.train(make_config(told), tmp_path / "run")
    losses = [row["train/loss"] for row in launch.rows(tmp_path / "run") if "train/loss" in row]
    assert np.mean(losses[-10:]) < 0.3 * losses[0]
    assert scores["eval/asked/n"] == 24 and scores["eval/asked/accuracy"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert {row["question"] for row in rows} == {*ASKED}
    for row in rows:
        assert row["model"] == ASKED[row["question"]] == row["right"][0]


def test_a_tokenizer_that_is_larger_than_the_vocabulary(told, tmp_path):
    with pytest.raises(ConfigError, match=r"embeddings for 8\. Set config\.model\.vocab_size to"):
        loop.train(make_config(told, vocab_size=8), tmp_path / "run")
    assert prepare(make_config(told)).task.targets == TARGETS
