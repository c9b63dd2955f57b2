"""The loss, classification and zero-shot evaluators, the registry and the context."""

from types import SimpleNamespace

import fakes
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from mmjax.config import ConfigError
from mmjax.evaluate import EVALUATORS, make_evaluator
from mmjax.evaluate.prompts import CLASS_NAMES, TEMPLATES
from mmjax.registry import UnknownNameError


def evaluator(config, context):
    return make_evaluator(config, context, "config.evals.it")


def mean_pixel_task():
    """The mean of all pixels as a loss, and the number of rows as a metric."""

    def loss(model, batch, rng):
        assert rng is None and "valid" not in batch
        return (jnp.sum(jnp.mean(batch["image"], (1, 2, 3))), len(batch["image"])), {
            "two": (2.0 * len(batch["image"]), len(batch["image"]))
        }

    return SimpleNamespace(loss=loss)


def test_loss_counts_whole_batches(tmp_path):
    context, params = fakes.make_context(tmp_path, devices=4, task=mean_pixel_task())
    examples = fakes.data(np.arange(20) % fakes.VOCABULARY)
    scores = evaluator(dict(name="loss", data=examples), context).run(params)
    expected = examples["examples"]["image"][:16].mean()
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)
    assert scores["two"] == 2
    with pytest.raises(ValueError, match="at least one whole batch of 8"):
        evaluator(dict(name="loss", data=fakes.data(range(5))), context).run(params)


@pytest.mark.parametrize("devices", [1, 8])
def test_classification_equals_sklearn(tmp_path, devices):
    context, params = fakes.make_context(tmp_path, devices=devices)
    concepts = np.arange(21) % 10
    images = 0.05 * fakes.pixels_of(concepts, noise=2.0)
    examples = fakes.data(concepts, images=images)
    scores = evaluator(dict(name="classification", data=examples), context).run(params)
    logits = images.reshape(21, -1) @ np.asarray(params["table"]).T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert scores["examples"] == 21
    assert scores["top1"] == pytest.approx(accuracy_score(concepts, logits.argmax(1)))
    assert scores["cross_entropy"] == pytest.approx(
        log_loss(concepts, p, labels=np.arange(fakes.VOCABULARY)), rel=1e-5
    )
    assert 0 < scores["top1"] < 1


def test_data_without_labels(tmp_path):
    context, params = fakes.make_context(tmp_path)
    for config in (
        dict(name="classification"),
        dict(name="zero_shot", classes=["w1"], prompts="name", max_len=3),
    ):
        config["data"] = fakes.data(range(4), labels=False)
        with pytest.raises(ValueError, match="needs labels"):
            evaluator(config, context).run(params)


def test_model_without_a_head(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fakes.Towers, "__call__", lambda self, images: SimpleNamespace(logits=None, pooled=None)
    )
    context, params = fakes.make_context(tmp_path)
    with pytest.raises(ValueError, match="no classification head"):
        evaluator(dict(name="classification", data=fakes.data(range(3))), context).run(params)


def test_zero_shot_averages_unit_norm_prompts(tmp_path):
    context, params = fakes.make_context(tmp_path, devices=2)
    classes = [f"w{c}" for c in range(10)]
    config = dict(
        name="zero_shot",
        data=fakes.data(range(10), images=fakes.pixels_of(range(10), noise=0.5)),
        classes=classes,
        prompts=["{}", "w20 {}.", "{} w30 w31"],
        max_len=3,
    )
    zero_shot = evaluator(config, context)
    table = np.asarray(params["table"])
    expected = []
    for c in range(10):
        prompts = [[c], [20, c], [c, 30, 31]]
        rows = np.stack([table[tokens].mean(0) for tokens in prompts])
        mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
        expected.append(mean / np.linalg.norm(mean))
    np.testing.assert_allclose(zero_shot.class_embeddings(params), expected, atol=1e-6)
    scores = zero_shot.run(params)
    assert scores["top1"] == 1 and scores["chance/top1"] == 0.1
    with pytest.raises(ValueError, match="10 of 30 prompts are longer than 2 tokens"):
        evaluator(config | dict(max_len=2), context)


def test_prompts_and_class_names(tmp_path):
    """Counts and members as published in OpenAI's notebook."""
    assert len(TEMPLATES["openai_80"]) == 80 and len(TEMPLATES["openai_7"]) == 7
    assert "a photo of many {}." in TEMPLATES["openai_80"]
    assert set(TEMPLATES["openai_7"]) <= set(TEMPLATES["openai_80"])
    imagenet = CLASS_NAMES["imagenet"]
    assert len(imagenet) == 1000
    assert (imagenet[0], imagenet[517], imagenet[999]) == (
        "tench", "construction crane", "toilet paper",
    )  # fmt: skip
    context, _ = fakes.make_context(tmp_path)
    config = dict(name="zero_shot", data=fakes.data(range(3)), classes=["a"], max_len=3)
    with pytest.raises(UnknownNameError, match="did you mean 'openai_80'"):
        evaluator(config | dict(prompts="openai80"), context)
    with pytest.raises(ValueError, match="exactly one"):
        evaluator(config | dict(prompts=["a photo"]), context)
    with pytest.raises(ValueError, match="no file of class names"):
        evaluator(config | dict(prompts="name", classes="file:nowhere.txt"), context)
    names = tmp_path / "names.txt"
    names.write_text("w1\nw2\n\n")
    evaluator(config | dict(prompts="name", classes=f"file:{names}"), context)


def test_make_evaluator_names_what_is_wrong(tmp_path):
    context, _ = fakes.make_context(tmp_path)
    assert EVALUATORS.names() == [
        "captioning", "classification", "clipscore", "drawing", "knn", "linear_probe", "loss",
        "multiple_choice", "name_choice", "naming", "perplexity", "picture_choice", "pope",
        "reconstruction", "retrieval", "vqa", "zero_shot",
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="did you mean 'retrieval'"):
        evaluator(dict(name="retreival"), context)
    with pytest.raises(ConfigError, match=r"config\.evals\.it\.querries is unknown.*'queries'"):
        evaluator(dict(name="retrieval", querries={}), context)
    with pytest.raises(ConfigError, match=r"config\.evals\.it\.queries is missing"):
        evaluator(dict(name="retrieval"), context)


def test_context_checks(tmp_path):
    with pytest.raises(ValueError, match="multiple of 8"):
        fakes.make_context(tmp_path, devices=8, batch_size=12)
    context, params = fakes.make_context(tmp_path)
    with pytest.raises(ValueError, match="is empty"):
        empty = fakes.data([], images=np.zeros((0, 4, 4, 3)))
        evaluator(dict(name="classification", data=empty), context).run(params)
