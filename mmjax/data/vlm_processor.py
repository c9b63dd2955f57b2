"""Processors of vision-language models: images take their places in texts.

    processor = load_processor(directory)
    batch = processor(images=["cat.png", "dog.png"], text=["<image> a", "<image> b and c"])
    logits = model(**batch)          # tokens, mask, images, place

What a class of transformers does of its own is said by a `Sight`: see `mmjax.data.vlm_families`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from mmjax.data import emu3
from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.image_processor import ImageInput, ImageProcessor
from mmjax.data.processor import Processor
from mmjax.data.visual import TEXT, Plan
from mmjax.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# One image, or those of all texts one after the other, or a list of them for each text.
Images = ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]]


class Facts(NamedTuple):
    """What a directory says.

    Attributes:
      processor: content of its `processor_config.json`, or nothing.
      images: options of its image processor.
      kind: name of the image processor's class.
      model: the model's config, or None.
      tokenizer: of transformers.
    """

    processor: Mapping[str, Any]
    images: Mapping[str, Any]
    kind: str
    model: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Sight:
    """How a processor class makes pictures of images, and places for them in texts.

    Attributes:
      images: makes the pixels of each picture.
      size: (height, width) of all pictures; None: they differ, see `grid`.
      tokens: places of a picture in texts: `VLMConfig.image_tokens`; None: see `grid`.
      plan: (width, height) of an image -> its `Plan`.
      views: image -> what `images` makes pictures of: the image itself, or its tiles.
      token: stands for an image in a text and, once it is laid out, at each visual place.
      id_field: of the model's config, which says the id of `token`; None: it does not.
      inserted: whether images whose places no text says go before the texts.
      prompt: a text, with its `token`s -> what is encoded.
      special_tokens: whether the tokenizer adds those of begin and end by itself.
      side: where padding goes; None: as the tokenizer has it.
      frames: pictures that the model reads together, as `tokens`; where an image has fewer, some of
        zeros follow.
      begin: what is before each text, where special tokens are added.
      grid: of pictures that differ in size. In a batch they are padded to the largest, at the right
        and at the bottom, and places are those of the padded ones.
    """

    images: ImageProcessor
    size: tuple[int, int] | None
    tokens: int | None
    plan: Callable[[int, int], Plan]
    views: Callable[[Image.Image], list[Image.Image]] = lambda image: [image]
    token: str = "<image>"
    id_field: str | None = "image_token_id"
    inserted: bool = False
    prompt: Callable[[str], str] = lambda text: text
    special_tokens: bool = True
    side: str | None = "left"
    frames: int = 1
    begin: str = ""
    grid: emu3.Grid | None = None


PROCESSORS: Registry[Callable[[Facts], Sight]] = Registry("processor")


class VLMProcessor(Processor):
    """See the module's docstring, and `Processor` for what is not said here.

    Args:
      name: of its class, in `PROCESSORS`.
      template: of chats; None: the tokenizer's.

    Attributes:
      sight: how images become pictures and places.
      token_id: what stands at visual places.

    Raises:
      ProcessorConfigError: files of the directory that do not belong together.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        facts: Facts,
        config: Mapping[str, Any],
        template: str | None,
    ):
        self.sight = PROCESSORS[name](facts)
        super().__init__(directory, self.sight.images, facts.tokenizer, config)
        self._side = self.sight.side
        self._template = template
        here, field = self.sight.token, self.sight.id_field
        there = getattr(facts.model, field) if facts.model and field else None
        self.token_id = facts.tokenizer.convert_tokens_to_ids(here)
        agreed(f"the id of {here!r}", self.token_id, there)

    def __call__(
        self,
        images: Images | None = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        **image_options: Any,
    ) -> dict[str, Any]:
        """What our models take: `tokens` and `mask` and, where there are images, those and `place`.

        Args:
          images: one image, or those of all texts one after the other, or a list for each text;
            see `ImageProcessor.__call__` for what an image is. `images` is then [B, I, H, W, 3]
            float32; rows with fewer pictures than I end with some of zeros.
          text: with a placeholder ("<image>") for each image, where it stands. `place` [B, T] int32
            is the visual token of the row at each position, -1 for text, -2 for the learned
            newline; see `VLM.run`.
          truncation: cut what is longer, but no images.
          padding_side: "left" by default, for models that continue their text.
          padding, max_length, add_special_tokens, image_options: as in `Processor.__call__`.

        Raises:
          CorruptImageError, ProcessorConfigError: see `ImageProcessor.__call__`; an option that
            makes pictures of another size.
          ValueError: as `Processor.__call__`; a text whose placeholders are not as many as its
            images.
        """
        if images is None and text is None:
            raise ValueError("The processor was given neither images nor text.")
        texts = None if text is None else self._as_texts(text)
        groups = self._groups(images, texts)
        if texts is not None:
            texts = self._with_placeholders(texts, groups)
        seen = [[self._look(image, image_options) for image in group] for group in groups]
        plans = [[plan for plan, _ in row] for row in seen]
        batch: dict[str, Any] = {}
        if texts is not None:
            begin = self.sight.begin if add_special_tokens else ""
            batch["tokens"], batch["mask"] = self._encode(
                [begin + self._laid_out(*row) for row in zip(texts, plans, strict=True)],
                self._padding if padding is None else padding,
                self.max_length if max_length is None else max_length,
                truncation,
                padding_side or self._side or self._tokenizer().padding_side,
                add_special_tokens and self.sight.special_tokens,
            )
        if any(groups):
            batch["images"] = self._stacked([[pixels for _, pixels in row] for row in seen])
            if texts is not None:
                batch["place"] = self._places(batch["tokens"], seen, batch["images"].shape[2:4])
        return batch

    @property
    def chat_template(self) -> str | None:
        """Of the directory's processor, or of its tokenizer; None where neither has one."""
        return self._template or self._tokenizer().chat_template

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = True,
        images: Images | None = None,
        **options: Any,
    ) -> dict[str, Any] | str | list[str]:
        """A conversation (or several), rendered by the directory's template.

        Args:
          conversation: [{"role": "user", "content": [{"type": "image", "image": ...},
            {"type": "text", "text": "..."}]}, ...], or a list of such.
          tokenize: give what `__call__` gives rather than text.
          images: instead of those in the conversation, whose places then hold {"type": "image"}.
          options: of transformers' `apply_chat_template`, such as add_generation_prompt=True.

        Raises:
          ValueError: no template; as `__call__`.
        """
        text = self._tokenizer().apply_chat_template(
            conversation, chat_template=self._template, tokenize=False, **options
        )
        if not tokenize:
            return text
        if images is None:
            several = isinstance(text, list)
            images = [_images_of(one) for one in (conversation if several else [conversation])]
        begin = self._tokenizer().bos_token
        first = text if isinstance(text, str) else text[0]
        begun = begin is not None and first.startswith(begin)
        return self(images=images, text=text, add_special_tokens=not begun)

    def _groups(self, images: Images | None, texts: list[str] | None) -> list[list[ImageInput]]:
        """The images of each row."""
        if images is None:
            return [[] for _ in texts]
        given = list(images) if isinstance(images, list | tuple) else [images]
        if any(isinstance(item, list | tuple) for item in given):
            if not all(isinstance(item, list | tuple) for item in given):
                raise ValueError("images has images and lists of images: give one or the other.")
            if texts is not None and len(given) != len(texts):
                raise ValueError(
                    f"There are {len(given)} lists of images for {len(texts)} text(s): give one "
                    "list for each."
                )
            return [list(item) for item in given]
        if texts is None:
            return [[item] for item in given]
        counts = [text.count(self.sight.token) for text in texts]
        if self.sight.inserted and not any(counts):
            counts = [1] * len(texts)
        if sum(counts) != len(given):
            raise ValueError(
                f"There are {len(given)} image(s), but {len(texts)} text(s) with places for "
                f"{sum(counts)}: put {self.sight.token!r} where each image belongs."
            )
        rest = iter(given)
        return [[next(rest) for _ in range(count)] for count in counts]

    def _with_placeholders(self, texts: list[str], groups: list[list[ImageInput]]) -> list[str]:
        token = self.sight.token
        if self.sight.inserted and not any(token in text for text in texts):
            rows = zip(texts, groups, strict=True)
            texts = [token * len(group) + text for text, group in rows]
        for text, group in zip(texts, groups, strict=True):
            if text.count(token) != len(group):
                raise ValueError(
                    f"A text has {text.count(token)} {token!r} but {len(group)} image(s): "
                    f"{text[:80]!r}. Put one where each image belongs."
                )
        return texts

    def _look(self, image: ImageInput, options: Mapping[str, Any]) -> tuple[Plan, np.ndarray]:
        """The plan of an image and its pictures [P, H, W, 3]."""
        rgb = self.sight.images.read(image, **options)
        plan = self.sight.plan(*rgb.size)
        pixels = self.sight.images(self.sight.views(rgb), **options)
        missing = -len(pixels) % self.sight.frames
        if missing:
            pixels = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))
        grid, size = self.sight.grid, self.sight.size
        height, width = size if grid is None else grid.fitted(*rgb.size)
        if pixels.shape[:3] != (plan.pictures, height, width):
            raise ProcessorConfigError(
                f"An image became {len(pixels)} picture(s) of {pixels.shape[1:3]} pixels, not "
                f"{plan.pictures} of {height} x {width}, for which there are places: leave out "
                f"{sorted(options)}."
            )
        return plan, pixels

    def _laid_out(self, text: str, plans: Sequence[Plan]) -> str:
        """The text with as many placeholders as visual tokens."""
        token = self.sight.token
        first, *others = self.sight.prompt(text).split(token)
        result = [first]
        for plan, rest in zip(plans, others, strict=True):
            result += [p if isinstance(p, str) else token * len(p) for p in plan.pieces]
            result.append(rest)
        return "".join(result)

    def _places(
        self,
        tokens: np.ndarray,
        seen: Sequence[Sequence[tuple[Plan, np.ndarray]]],
        size: tuple[int, int],
    ) -> np.ndarray:
        """`place` of a batch whose pictures are of this (height, width)."""
        result, grid = np.full(tokens.shape, TEXT, np.int32), self.sight.grid
        per_clip = self.sight.tokens if grid is None else grid.tokens(size)
        for row, ids, mine in zip(result, tokens, seen, strict=True):
            places, before = [np.empty(0, np.int32)], 0
            for plan, pixels in mine:
                arrays = [piece for piece in plan.pieces if not isinstance(piece, str)]
                if grid is not None:
                    arrays = [grid.padded(a, pixels.shape[1:3], size) for a in arrays]
                places += [np.where(a < 0, a, a + before) for a in arrays]
                before += plan.pictures // self.sight.frames * per_clip
            here, there = ids == self.token_id, np.concatenate(places)
            if here.sum() != there.size:
                raise ValueError(
                    f"A text has {here.sum()} visual tokens where its images have {there.size}: "
                    "truncation must not cut images. Shorten the text, or allow more tokens."
                )
            row[here] = there
        return result

    def _stacked(self, rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """[B, I, H, W, 3], H and W of the largest."""
        count = max(sum(map(len, row)) for row in rows)
        height, width = np.max([pixels.shape[1:3] for row in rows for pixels in row], axis=0)
        result = np.zeros((len(rows), count, height, width, 3), np.float32)
        for out, row in zip(result, rows, strict=True):
            start = 0
            for pixels in row:
                end = start + len(pixels)
                out[start:end, : pixels.shape[1], : pixels.shape[2]] = pixels
                start = end
        return result

    def _check_ids(self, tokens: np.ndarray) -> None:
        # What stands at the place of an image is not looked up.
        super()._check_ids(np.where(tokens == self.token_id, 0, tokens))


def _images_of(conversation: Sequence[Mapping[str, Any]]) -> list[ImageInput]:
    """The images in the contents of messages, in order."""
    parts = [
        part
        for message in conversation
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]
    images = [
        next((part[key] for key in ("image", "path", "url") if key in part), None) for part in parts
    ]
    if any(image is None for image in images):
        raise ValueError(
            'A conversation has a part {"type": "image"} without an image: give it as "image" (or '
            'a file as "path"), or all of them by images=.'
        )
    return images


def agreed(name: str, *values: Any) -> Any:
    """What the files of a directory say of one thing; None is no statement.

    Raises:
      ProcessorConfigError: if they disagree, or none of them says it.
    """
    given = [value for value in values if value is not None]
    if not given:
        raise ProcessorConfigError(
            f"The directory does not say {name}: neither processor_config.json nor config.json."
        )
    if any(value != given[0] for value in given):
        raise ProcessorConfigError(
            f"{name} is {given[0]!r} in the processor's files and {given[-1]!r} in config.json: "
            "they do not belong together."
        )
    return given[0]
