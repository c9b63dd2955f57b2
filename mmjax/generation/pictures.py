"""Pictures of what a unified model writes.

    generator, painter = Generator(model), Painter(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    image = model.config.image
    prompts = [[*tokenizer(text), image.begin] for text in texts]
    ids = generator(prompts, max_new_tokens=image.length, ...).tokens
    contact_sheet(list(zip(texts, painter(ids)[:, None]))).save("sheet.png")

Of text and images in any order, `split` gives the parts, and `Painter.of` the pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageDraw, ImageFont

from mmjax import sharding
from mmjax.generation.programs import Structure, weights
from mmjax.generation.prompts import bucket
from mmjax.generation.streams import split
from mmjax.models.unified import Unified
from mmjax.typing import Array, Float, Int

# Of a sheet, in pixels: the least side of pictures, what is between them, a line of words.
_SIDE, _GAP, _LINE = 128, 8, 18


class Painter:
    """ids of images -> pictures. Programs are compiled once for models of the same structure.

    Args:
      model: decodes.
      mean, std: of each channel, on levels scaled to [0, 1], by which the model's images were
        normalised.
      mesh: where the parameters are.
      batch_size: images that are decoded together.
    """

    def __init__(
        self,
        model: Unified,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        mesh: Mesh | None = None,
        batch_size: int = 16,
    ):
        self._config = model.config
        self._weights = weights(model, mesh)
        self._mean, self._std = np.float32(mean), np.float32(std)
        self._mesh, self._batch_size = mesh, batch_size

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The pictures [N, H, W, C] uint8 of images' ids [N, L], as between `begin` and `end`.

        Raises:
          ValueError: it is another number of ids; the model's tokenizer cannot decode.
        """
        ids = np.asarray(ids, np.int32)
        length = self._config.image.length
        if ids.ndim != 2 or ids.shape[1] != length:
            raise ValueError(f"ids have shape {ids.shape}: an image has {length}, [N, {length}].")
        pictures = [np.zeros((0, *self._config.image_shape), np.uint8)]
        for start in range(0, len(ids), self._batch_size):
            some = ids[start : start + self._batch_size]
            batch = np.zeros((min(bucket(len(some), 1), self._batch_size), length), np.int32)
            batch[: len(some)] = some
            if self._mesh is not None:
                batch = jax.device_put(batch, sharding.replicated(self._mesh))
            levels = _levels(*self._weights, batch, self._mean, self._std)
            pictures.append(jax.device_get(levels)[: len(some)])
        return np.concatenate(pictures)

    def of(self, rows: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """The pictures [I, H, W, C] of each stream, in their order.

        Raises:
          ValueError: see `split`.
        """
        images = [[p.ids for p in split(self._config, row) if p.is_image] for row in rows]
        ends = np.cumsum([len(row) for row in images])
        flat = [ids for row in images for ids in row]
        shape = (len(flat), self._config.image.length)
        return np.split(self(np.reshape(flat, shape)), ends[:-1])


@functools.partial(jax.jit, static_argnames=("structure",))
def _levels(
    structure: Structure,
    leaves: list[Array],
    ids: Int[Array, "n l"],
    mean: Float[Array, " c"],
    std: Float[Array, " c"],
) -> Array:
    """[N, H, W, C] uint8"""
    with structure.model(leaves) as model:
        images = model.images_of(ids).astype(jnp.float32)
    levels = jnp.round((images * std + mean) * 255)
    return jnp.clip(levels, 0, 255).astype(jnp.uint8)


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Pictures [N, H, W, 3] uint8, row by row, each with the words that it was drawn of.

    Small pictures are enlarged by whole numbers, so that every pixel is one square.
    """
    font = ImageFont.load_default(_LINE - 4)
    height, width = rows[0][1].shape[1:3]
    times = max(1, _SIDE // max(height, width))
    down, across = times * height + _GAP, times * width + _GAP
    longest = max(int(font.getlength(words)) for words, _ in rows) + 2 * _GAP
    columns = max(len(pictures) for _, pictures in rows)
    size = (max(columns * across + _GAP, longest), len(rows) * (_LINE + down) + _GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for line, (words, pictures) in enumerate(rows):
        top = line * (_LINE + down) + _GAP
        pen.text((_GAP, top), words, "#222222", font=font)
        for column, picture in enumerate(pictures):
            large = picture.repeat(times, axis=0).repeat(times, axis=1)
            sheet.paste(Image.fromarray(large), (column * across + _GAP, top + _LINE))
    return sheet
