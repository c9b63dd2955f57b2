"""Evaluators of questions with a real, tiny model: likelihoods, compilations, the mesh."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asked import question
from flax import nnx

import mmjax
from mmjax import params, sharding
from mmjax.connectors.mlp import MLPConfig
from mmjax.evaluate import make_evaluator
from mmjax.evaluate.likelihood import answer_log_probs, choice_log_probs
from mmjax.evaluate.similarity import ModelFeatures
from mmjax.evaluate.support import Seen
from mmjax.models.lm import LMConfig
from mmjax.models.t5 import T5Config
from mmjax.models.vit import ViTConfig
from mmjax.models.vlm import VLM, Seq2SeqVLM, Seq2SeqVLMConfig, VLMConfig
from mmjax.nn.rope import Rope

VOCABULARY, IMAGE, EOS = 61, 60, 7
ENCODER = ViTConfig(
    image_size=8,
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    mlp_width=24,
    activation="gelu",
    norm_eps=1e-5,
    pooling="none",
    position="learned",
)
DECODER = LMConfig(
    vocab_size=VOCABULARY,
    max_len=64,
    width=32,
    depth=2,
    heads=2,
    mlp_width=48,
    activation="silu",
    norm_eps=1e-5,
    tied=True,
    rope=Rope(theta=1e4),
)
T5 = T5Config(
    vocab_size=VOCABULARY,
    width=32,
    depth=2,
    decoder_depth=2,
    heads=2,
    head_dim=16,
    mlp_width=48,
    activation="relu",
    gated=False,
    norm_eps=1e-6,
    tied=False,
    scale_logits=False,
    decoder_start_id=3,
)


def make(kind, seed=0):
    """A model whose weights numpy draws: quicker than compiling initialisers."""
    common = dict(encoder=ENCODER, connector=MLPConfig(), image_token=IMAGE)
    if kind == "seq2seq":
        config, model = Seq2SeqVLMConfig(lm=T5, **common), Seq2SeqVLM
    else:
        config, model = VLMConfig(lm=DECODER, attention=kind, **common), VLM
    graph, shapes = params.abstract(lambda: model(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(seed).standard_normal
    weights = {path: 0.3 * draw(s.shape) + path.endswith("scale") for path, s in shapes.items()}
    return graph, {path: jnp.float32(value) for path, value in weights.items()}


def ask(number, length, answer, picture, choices=None):
    """Four visual tokens stand at the second place of a prompt."""
    rng = np.random.default_rng(number % 3)  # every third question has the same words
    ids = rng.integers(8, 59, length).astype(np.int32)
    place = np.full(length, -1, np.int32)
    place[1:5] = range(4)
    pixels = np.random.default_rng(picture).standard_normal((1, 8, 8, 3)).astype(np.float32)
    asked = question(number, "ab"[number % 2], f"question {number}", answer, pixels, choices)
    encode = lambda text: np.array([*map(int, text.split()), EOS], np.int32)  # noqa: E731
    return asked._replace(
        ids=ids,
        place=place,
        answer_ids=encode(answer),
        choice_ids=choices and tuple(map(encode, choices)),
    )


CHOICES = ("11 12 13 14", "15 16 17 18 19", "20 21 22 23")
QUESTIONS = [
    ask(number, (9, 15, 12)[number % 3], CHOICES[number % 2], number // 2, CHOICES)
    for number in range(10)
]


@contextlib.contextmanager
def compilations():
    """Yields a list that gets an entry for each program compiled within the block."""
    seen, active = [], [True]

    def listen(event, duration, **_):
        if active and event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        active.clear()


@pytest.mark.parametrize("kind", ["prefix", "seq2seq"])
def test_likelihoods_of_padded_rows_are_those_of_single_ones(kind):
    """Beside the model itself, called with one question and answer, without padding."""
    graph, weights = make(kind)
    asked, answer = QUESTIONS[0], QUESTIONS[0].answer_ids
    # The other row is longer on both sides.
    longer = np.arange(8, 8 + len(asked.ids) + 3, dtype=np.int32)
    batch = {
        "tokens": np.stack([longer, np.pad(asked.ids, (3, 0), constant_values=50)]),
        "valid": np.stack([longer > 0, np.pad(asked.ids > 0, (3, 0))]),
        "place": np.stack(2 * [np.pad(asked.place, (3, 0), constant_values=-1)]),
        "images": np.stack([QUESTIONS[2].images, asked.images]),
        "answer": np.stack([np.pad(answer, (2, 0)), np.pad(answer, (0, 2))]),
        "said": np.arange(len(answer) + 2) < [[len(answer) + 2], [len(answer)]],
    }
    single = {"images": asked.images[None], "place": asked.place[None]}
    if kind == "seq2seq":
        tokens = asked.ids[None]
        single["decoder_tokens"] = np.array([[T5.decoder_start_id, *answer[:-1]]], np.int32)
    else:
        tokens = np.concatenate([asked.ids, answer])[None]
        single["place"] = np.pad(single["place"], ((0, 0), (0, len(answer))), constant_values=-1)
        single["prefix"] = np.arange(tokens.shape[1])[None] < len(asked.ids)

    @jax.jit
    def both(weights, batch, tokens, single):
        model = params.merge(graph, weights)
        # Each with the answers of both, as choices.
        options = {
            name: jnp.stack([batch[name], batch[name][::-1]], axis=1) for name in ("answer", "said")
        }
        choices = choice_log_probs(model, batch | options)
        swapped = batch | {name: array[:, 1] for name, array in options.items()}
        each = [answer_log_probs(model, asked) for asked in (batch, swapped)]
        return each[0], model(tokens, **single), choices, jnp.stack(each, axis=1)

    got, logits, choices, each = both(weights, batch, tokens, single)
    np.testing.assert_allclose(choices, each, atol=1e-5)
    before = logits[0] if kind == "seq2seq" else logits[0, len(asked.ids) - 1 : -1]
    log_p = np.asarray(jax.nn.log_softmax(before))
    expected = log_p[np.arange(len(answer)), answer]
    np.testing.assert_allclose(got[1], [*expected, 0, 0], atol=1e-5)
    assert np.ptp(log_p) > 1  # weights matter


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """On 2 x 2 devices, the batch over one axis and the weights over the other."""
    graph, weights = make("causal")
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2), jax.devices()[:4])
    where = sharding.parameter_shardings(weights, sharding.DEFAULT_RULES, mesh)
    tokenizer = SimpleNamespace(eos_id=EOS, decode=lambda ids: " ".join(map(str, ids)))
    workdir = tmp_path_factory.mktemp("evaluations")
    base, _ = fakes.make_context(workdir)
    context = dataclasses.replace(
        base,
        graphdef=graph,
        mesh=mesh,
        tokenizer=tokenizer,
        open_questions=lambda data, tokenizer, limit: QUESTIONS[:limit],
    )

    def placed(seed):
        _, weights = make("causal", seed)
        return {path: jax.device_put(leaf, where[path]) for path, leaf in weights.items()}

    return context, placed


def test_answers_are_those_of_generate_and_nothing_compiles_twice(context):
    context, placed = context
    config = dict(name="vqa", data={}, max_new_tokens=5, batch_size=4, answers="answers.jsonl")
    evaluator = make_evaluator(config, context, "config.evals.it")
    evaluator.run(placed(1))
    weights = placed(0)
    with compilations() as compiled:
        scores = evaluator.run(weights)
    assert not compiled
    lines = (context.workdir / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    together = mmjax.generate(
        params.merge(context.graphdef, weights),
        [q.ids for q in QUESTIONS[:4]],
        [q.images for q in QUESTIONS[:4]],
        place=[q.place for q in QUESTIONS[:4]],
        max_new_tokens=5,
        eos_id=EOS,
        mesh=context.mesh,
        rules=None,
    ).tolist()
    ends = [ids.index(EOS) + 1 if EOS in ids else len(ids) for ids in together]
    expected = [" ".join(map(str, ids[:end])) for ids, end in zip(together, ends, strict=True)]
    assert [row["model"] for row in rows[:4]] == expected
    # Without images, questions of the same words and length have the same answer.
    assert len({row["blind"] for row in rows}) <= 3 < len({row["model"] for row in rows})
    assert all(row["blind"] == rows[i % 3]["blind"] for i, row in enumerate(rows))
    assert scores["n"] == 10 and scores["images"] == 5


def test_beams_and_texts_that_end_answers(context):
    context, placed = context
    weights = placed(0)
    config = dict(name="vqa", data={}, max_new_tokens=4, batch_size=4, limit=4, controls=())
    config |= dict(num_beams=2, length_penalty=0.0)
    evaluator = make_evaluator(config, context, "config.evals.it")
    together = mmjax.generate(
        params.merge(context.graphdef, weights),
        [q.ids for q in QUESTIONS[:4]],
        [q.images for q in QUESTIONS[:4]],
        place=[q.place for q in QUESTIONS[:4]],
        max_new_tokens=4,
        eos_id=EOS,
        mesh=context.mesh,
        rules=None,
        num_beams=2,
        length_penalty=0.0,
    ).tolist()
    ends = [ids.index(EOS) + 1 if EOS in ids else len(ids) for ids in together]
    expected = [" ".join(map(str, ids[:end])) for ids, end in zip(together, ends, strict=True)]
    assert evaluator.respond(weights, QUESTIONS[:4]) == expected
    # Beside a text of beam search, which knows it at the end only, one that it ends on its way.
    for beams in (2, 1):
        options = config | dict(num_beams=beams, length_penalty=1.0)
        whole = make_evaluator(options, context, "config.evals.it").respond(weights, QUESTIONS[:4])
        stop = whole[0].split()[2]
        cut = make_evaluator(options | dict(stop=(stop,)), context, "config.evals.it")
        assert cut.respond(weights, QUESTIONS[:4]) == [
            said.split(stop)[0].rstrip() if stop in said else said for said in whole
        ]
    with pytest.raises(ValueError, match=r"length_penalty=0.0 is of beam search"):
        make_evaluator(config | dict(num_beams=1), context, "config.evals.it")
    with pytest.raises(ValueError, match="must be a list of texts"):
        make_evaluator(config | dict(stop="Question"), context, "config.evals.it")


def test_features_of_the_model_compare_images(context):
    context, placed = context
    weights = placed(0)
    model = params.merge(context.graphdef, weights)
    seen = [Seen(str(q.images.mean()), q.images, lambda: None) for q in QUESTIONS]
    found = ModelFeatures(context, 4)(weights, seen)
    pictures = np.concatenate([QUESTIONS[row].images for row in range(10)])
    means = np.asarray(jax.jit(lambda x: model.features(x).mean(axis=1))(pictures))
    np.testing.assert_allclose(
        found, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5
    )


def test_choices_and_perplexity_compile_once(context):
    context, placed = context
    weights = placed(0), placed(1)
    config = dict(data={}, batch_size=8, controls=("blind",), answers="choices.jsonl")
    choices = make_evaluator(dict(name="multiple_choice", **config), context, "config.evals.c")
    perplexity = make_evaluator(dict(name="perplexity", **config), context, "config.evals.p")
    first = choices.run(weights[0]), perplexity.run(weights[0])
    with compilations() as compiled:
        second = choices.run(weights[1]), perplexity.run(weights[1])
    assert not compiled
    assert first[1]["loss"] != second[1]["loss"]
    # Whatever else is in the batch, an answer is as probable as the choice that it is.
    options = choices.respond(weights[0], QUESTIONS)
    answers = perplexity.respond(weights[0], QUESTIONS)
    for asked, likelihoods, answer in zip(QUESTIONS, options, answers, strict=True):
        right = likelihoods[asked.choices.index(asked.answers[0])]
        assert right.tokens == answer.tokens == len(asked.answer_ids)
        assert right.total == pytest.approx(answer.total, abs=1e-4)
    loss = -sum(answer.total for answer in answers) / sum(answer.tokens for answer in answers)
    assert first[1]["loss"] == pytest.approx(loss)
