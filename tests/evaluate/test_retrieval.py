"""The retrieval evaluator: candidates, distractors, duplicates, baseline, pictures, processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
from PIL import Image

from mmjax.evaluate import make_evaluator, sheets
from mmjax.evaluate.baselines import PictureOfName, name_vectors


def evaluator(context, **config):
    return make_evaluator(dict(name="retrieval", **config), context, "config.evals.it")


def test_an_aligned_model_finds_everything_a_constant_one_nothing(tmp_path):
    context, params = fakes.make_context(tmp_path, devices=2)
    retrieval = evaluator(context, queries=fakes.data(range(11)), distractors=fakes.data([20, 21]))
    good = retrieval.run(params)
    constant = retrieval.run(params | {"gain": np.float32(-1e8)})
    for way in ("text_to_image", "image_to_text"):
        assert good[f"{way}/R@1"] == 1 and good[f"{way}/mAP"] == 1
        assert (good[f"{way}/queries"], good[f"{way}/candidates"]) == (11, 13)
        assert good[f"chance/{way}/R@5"] == pytest.approx(5 / 13)
        assert constant[f"{way}/R@10"] == 0


def test_queries_and_distractors(tmp_path):
    """A distractor that looks like a query's image costs rank 1, but asks nothing itself."""
    context, params = fakes.make_context(tmp_path)
    queries = fakes.data(range(4), images=fakes.pixels_of(range(4), noise=0.3))
    twin = fakes.data([20], images=fakes.pixels_of([2]))
    alone = evaluator(context, queries=queries).run(params)
    beside = evaluator(context, queries=queries, distractors=twin).run(params)
    assert alone["text_to_image/R@1"] == 1
    assert beside["text_to_image/R@1"] == 3 / 4
    assert beside["text_to_image/queries"] == 4 and beside["text_to_image/candidates"] == 5


def test_several_texts_of_an_image_count_once_each(tmp_path):
    """One record for each caption, as in COCO: 3 images, two texts each, one of them repeated."""
    context, params = fakes.make_context(tmp_path)
    concepts = [0, 0, 1, 1, 2, 2]
    texts = ["w0", "w0 w0", "w1", "w20", "w2", "w2"]
    scores = evaluator(context, queries=fakes.data(concepts, texts=texts)).run(params)
    assert scores["image_to_text/queries"] == 3
    assert scores["image_to_text/candidates"] == 5
    assert scores["text_to_image/queries"] == 5
    assert scores["text_to_image/candidates"] == 3
    assert scores["image_to_text/R@1"] == 1


def test_pairs_without_labels(tmp_path):
    context, params = fakes.make_context(tmp_path)
    scores = evaluator(context, queries=fakes.data(range(5), labels=False)).run(params)
    assert scores["text_to_image/R@1"] == 1
    with pytest.raises(ValueError, match="only one has labels"):
        evaluator(
            context, queries=fakes.data(range(5), labels=False), distractors=fakes.data([9])
        ).run(params)
    with pytest.raises(ValueError, match=r"needs 'text'.*set `text`"):
        evaluator(context, queries=fakes.data(range(5), texts=False)).run(params)


def test_pixel_baseline():
    """Seen names stand for their own pictures, unseen ones for those of the nearest name."""
    rng = np.random.default_rng(0)
    names = ["red apple", "green apple", "nine o'clock", "dog face"]
    pictures = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    texts = ["dog face", "apple red", "ten o'clock"]
    images = pictures[[3, 0, 2, 1]] + 0.1
    baseline = PictureOfName(pictures=pictures, names=names, images=images, texts=texts)
    scores = baseline.image_to_text(slice(0, 4))
    represented = pictures[[3, 0, 2]]  # what each text is taken for
    expected = -np.mean((images[:, None] - represented[None]) ** 2, axis=(2, 3, 4))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(baseline.text_to_image(slice(1, 3)), expected.T[1:3], atol=1e-5)


def test_pixel_baseline_takes_the_nearest_of_several_pictures():
    pictures = np.array([0.0, 1.0, 5.0], np.float32).reshape(3, 1, 1, 1)
    baseline = PictureOfName(
        pictures=pictures, names=["a", "a", "b"], images=pictures + 0.1, texts=["b", "a"]
    )
    expected = -(np.array([[4.9, 0.1], [3.9, 0.1], [0.1, 4.1]]) ** 2)
    np.testing.assert_allclose(baseline.image_to_text(slice(0, 3)), expected, atol=1e-5)
    np.testing.assert_allclose(baseline.text_to_image(slice(0, 2)), expected.T, atol=1e-5)


def test_names_that_share_words_are_near():
    a, b, c = name_vectors(["flag of Chad", "flag: Chad", "hot dog"])
    assert a @ a == pytest.approx(1) and a @ b > 0.3 > a @ c


def test_table_shows_model_baseline_and_chance(tmp_path):
    context, params = fakes.make_context(tmp_path)
    retrieval = evaluator(
        context,
        queries=fakes.data(range(5)),
        reference=fakes.data(range(5), images=fakes.pixels_of(range(5), noise=0.1)),
        title="Numbers",
        note=sheets.ICONS_NOTE,
    )
    scores = retrieval.run(params)
    assert scores["pixels/image_to_text/R@1"] == 1
    table = retrieval.describe(scores)
    assert "Numbers" in table and "nothing about photographs" in table
    rows = [line.split() for line in table.splitlines() if line.strip().startswith("chance")]
    assert [row[1:3] for row in rows] == [["20.0%", "100.0%"]] * 2


def test_sheet_frames_right_images_in_green(tmp_path):
    context, params = fakes.make_context(tmp_path)
    retrieval = evaluator(
        context,
        queries=fakes.data(range(6)),
        distractors=fakes.data(range(10, 15)),
        sheet="sheet.png",
        sheet_rows=3,
    )
    retrieval.run(params)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    green = np.array([int(sheets.GREEN[i : i + 2], 16) for i in (1, 3, 5)])
    red = np.array([int(sheets.RED[i : i + 2], 16) for i in (1, 3, 5)])
    found = np.argwhere(np.abs(pixels - green).max(-1) < 3)
    rows = np.unique(found[:, 0])
    assert np.sum(np.diff(rows) > 1) >= 2  # three separate frames, one under the other
    assert not (np.abs(pixels - red).max(-1) < 3).any()  # nothing missed


def test_learning_curves(tmp_path):
    rows = [
        {"step": 1, "train/loss": 2.0, "train/learning_rate": 0.1},
        {"step": 2, "train/loss": "nan", "eval/val/loss": 1.0, "eval/it/image_to_text/R@1": 0.5,
         "eval/it/chance/image_to_text/R@1": 0.1, "eval/probe/top1": 0.3},
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "tr')
    sheets.learning_curves(path, tmp_path / "curves.png", title="A run")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    path.write_text("")
    with pytest.raises(ValueError, match="no metrics to draw"):
        sheets.learning_curves(path, tmp_path / "curves.png")


def test_two_processes_and_eight_devices_agree_with_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, fakes.__file__, str(i), str(port), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    expected = fakes.retrieval_scores(*fakes.make_context(tmp_path))
    eight = fakes.retrieval_scores(*fakes.make_context(tmp_path, devices=8))
    assert eight == pytest.approx(expected)
    assert 0 < expected["text_to_image/R@1"] < 1
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert json.loads((tmp_path / "scores.json").read_text()) == pytest.approx(expected)
