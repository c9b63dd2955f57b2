"""`python -m experiments.generate --draw`, on the work directory of a tiny unified model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_generator import compilations
from test_images import draw
from test_unified_generation import CONFIG as UNIFIED

from experiments import generate
from experiments.convert import write_orbax
from mmjax.data import PRESETS
from mmjax.evaluate.chat import open_speaker
from mmjax.generation import Generator, Painter, text_only
from mmjax.models.unified import Unified

SPECIAL = ("<image>", "</image>", "<row>", "<code>")
BEGIN, END, ROW, CODE, VOCABULARY = 4, 5, 6, 7, 24
CONFIG = dataclasses.replace(
    UNIFIED,
    lm=dataclasses.replace(UNIFIED.lm, vocab_size=VOCABULARY + 12, rope=None, max_len=48),
    image=dataclasses.replace(UNIFIED.image, ids=VOCABULARY, begin=BEGIN, end=END, row=ROW),
    image_token=CODE,
)
LENGTH = CONFIG.image.length
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 220)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A work directory."""
    root = tmp_path_factory.mktemp("run")
    for name, colour in COLOURS.items():
        Image.new("RGB", (12, 12), colour).save(root / f"{name}.png")
    records = [{"image": f"{name}.png", "text": f"a {name} square"} for name in COLOURS]
    (root / "pictures.json").write_text(json.dumps(records))
    layout = dict(name="codes", preset="clip", size=8, tokens=LENGTH, begin=SPECIAL[0])
    layout["end"] = SPECIAL[1]
    conversation = dict(template="stream", max_len=48, images=2, layout=layout, image_token=CODE)
    source = dict(name="json", path=str(root / "pictures.json"), form=dict(name="drawing"))
    data = dict(
        tokenizer=dict(name="wordlevel", vocab_size=VOCABULARY, special_tokens=SPECIAL),
        train=dict(sources=[source], conversation=conversation),
    )
    model = draw(lambda: Unified(CONFIG, rngs=nnx.Rngs(0)), scale=0.5)
    write_orbax(model, root / "work", None, None)
    (root / "work" / "config.json").write_text(json.dumps({"data": data}))
    return root


@pytest.fixture(scope="module")
def speaker(directory):
    return open_speaker(directory / "work")


def run(directory, *arguments):
    given = ["--weights", str(directory / "work"), "--prompt", "a red square"]
    return generate.main([*given, *map(str, arguments)])


def drawn(speaker, texts, count, seed, **options):
    """Pictures [texts, count, ...], by the interface alone."""
    tokens, bos = speaker.speech._tokenizer, 2
    rows = [
        [bos, *tokens.backend.encode(text, add_special_tokens=False).ids, BEGIN]
        for text in texts
        for _ in range(count)
    ]
    ids = Generator(speaker.model)(
        rows, max_new_tokens=LENGTH, key=jax.random.key(seed), temperature=1.0, **options
    ).tokens
    preset = PRESETS["clip"]
    return Painter(speaker.model, mean=preset.mean, std=preset.std)(ids)


def test_draws_a_picture(directory, speaker, tmp_path, capsys):
    file = tmp_path / "red.png"
    assert run(directory, "--draw", file, "--seed", 3) == 0
    assert capsys.readouterr().out == f"{file}\n"
    (expected,) = drawn(speaker, ["a red square"], 1, 3)
    picture = np.asarray(Image.open(file))
    np.testing.assert_array_equal(picture, expected)
    assert picture.shape == (8, 8, 3) and len(np.unique(picture)) > 8
    with pytest.raises(FileExistsError, match=r"is there already.*--overwrite"):
        run(directory, "--draw", file)
    run(directory, "--draw", file, "--seed", 4, "--overwrite")
    assert np.any(np.asarray(Image.open(file)) != picture)


def test_draws_a_sheet_with_guidance(directory, speaker, tmp_path):
    file, texts = tmp_path / "sheet.png", ["a red square", "a blue square"]
    more = ["--prompt", texts[1], "--count", 2, "--guidance", 3, "--draw", file]
    run(directory, *more)
    sheet = np.asarray(Image.open(file))
    expected = drawn(speaker, texts, 2, 0, guidance=3.0, negative=[[2, BEGIN]])
    for number, picture in enumerate(expected):
        top = 8 + 18 + number // 2 * (128 + 8 + 18)
        left = 8 + number % 2 * (128 + 8)
        shown = sheet[top : top + 128, left : left + 128]
        np.testing.assert_array_equal(shown, picture.repeat(16, axis=0).repeat(16, axis=1))
    run(directory, *more, "--negative", "a green square", "--overwrite")
    assert np.any(np.asarray(Image.open(file)) != sheet)


def test_texts_have_no_images(directory, speaker, capsys):
    image = directory / "green.png"
    run(directory, "--image", image, "--max-new-tokens", 6)
    out = capsys.readouterr().out
    prompt = speaker.speech.text("a red square", [image.read_bytes()])
    assert prompt.ids.tolist().count(CODE) == LENGTH and BEGIN in prompt.ids
    generated = speaker([prompt], max_new_tokens=6, suppress=text_only(CONFIG))
    assert out == speaker.texts(generated)[0] + "\n"
    free = speaker([prompt], max_new_tokens=6, temperature=1.0, key=jax.random.key(1))
    assert not np.isin(generated.tokens, text_only(CONFIG)).any()
    assert free.tokens.tolist() != generated.tokens.tolist()


BAD = {
    ("--draw", "x.jpg"): "written as PNG",
    ("--draw", "nowhere/x.png"): "there is no directory nowhere",
    ("--draw", "x.png", "--beams", "2"): "goes with no --interactive",
    ("--draw", "x.png", "--count", "0"): "must be at least 1",
    ("--draw", "x.png", "--count", "2", "--temperature", "0"): "the same picture",
    ("--draw", "x.png", "--prompt", "a red " * 20): "exceed the model's limit of 48 positions",
    ("--draw", "x.png", "--guidance", "nan"): "guidance=nan",
    ("--count", "2"): "about pictures: give --draw",
    ("--negative", "x"): "counts by --guidance only",
    ("--interactive", "--guidance", "2"): "it has no conversation",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_arguments(directory, speaker, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmjax.evaluate.chat.open_speaker", lambda *_, **__: speaker)
    with compilations() as compiled, pytest.raises((ValueError, OSError), match=BAD[arguments]):
        run(directory, *arguments)
    # Keys of rows at most.
    assert len(compiled) <= 2 and not list(tmp_path.iterdir())
