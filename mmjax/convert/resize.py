"""Position embeddings made for one resolution, at another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.models import NaFlexConfig, ViTConfig
from mmjax.nn.position import interpolate_grid
from mmjax.params import Params, abstract, merge, split


def resize_positions(model: nnx.Module, image_size: int | tuple[int, int]) -> nnx.Module:
    """The model for images of another size; a new one, that shares all other parameters.

    It computes what the old one does for images of this size, without interpolating at each call.

    Args:
      image_size: pixels, one number or (height, width).

    Raises:
      ValueError: see `resized`.
    """
    config, params = resized(model.config, split(model)[1], image_size)
    graph, _ = abstract(lambda: type(model)(config, rngs=nnx.Rngs(0)))
    result = merge(graph, params)
    if "origin" in vars(model):
        result.origin = model.origin
    return result


def resized(config: Any, params: Params, image_size: int | tuple[int, int]) -> tuple[Any, Params]:
    """A config and its parameters for images of another size.

    The tables are interpolated as each model does at call time, which is what its counterpart in
    transformers does with `interpolate_pos_encoding=True`.

    Args:
      config: of a model that is or has a `ViT`.
      params: its parameters by path, or some of them.
      image_size: pixels, one number or (height, width).

    Raises:
      ValueError: if the model has no image tower, or one without a resolution (NaFlex), or if
        patches do not fit the size.
    """
    towers = list(_towers(config))
    vits = [path for path, tower in towers if isinstance(tower, ViTConfig)]
    if not vits:
        reason = "takes images of any size" if towers else "has no image tower to interpolate"
        raise ValueError(
            f"image_size={image_size}: a model with {type(config).__name__} {reason}: leave "
            "image_size out."
        )
    params = dict(params)
    for path in vits:
        config, old, new = _with_size(config, path, image_size)
        name = "/".join((*path, "position/embedding"))
        if name in params and new.grid != old.grid:
            params[name] = _resize(params[name], old, new)
    return config, params


def position_tables(config: Any) -> dict[str, ViTConfig]:
    """Paths of the position tables that can be interpolated, and their towers."""
    return {
        "/".join((*path, "position/embedding")): tower
        for path, tower in _towers(config)
        if isinstance(tower, ViTConfig)
    }


def resized_table(table: jax.Array, tower: ViTConfig, places: int) -> jax.Array:
    """A position table with another number of places, for square images.

    Raises:
      ValueError: if so many places make no square.
    """
    side = math.isqrt(places - tower.class_tokens)
    if side**2 != places - tower.class_tokens:
        raise ValueError(
            f"A position table of {places} places is not that of a square image: load the "
            "checkpoint with from_pretrained(image_size=(height, width)) instead."
        )
    size = side * tower.patch_size
    return _resize(table, tower, dataclasses.replace(tower, image_size=size))


def _towers(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Image towers among a config and the configs in it; fields have the names of modules."""
    if isinstance(config, ViTConfig | NaFlexConfig):
        yield path, config
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _towers(value, (*path, field.name))


def _with_size(
    config: Any, path: tuple[str, ...], image_size: int | tuple[int, int]
) -> tuple[Any, ViTConfig, ViTConfig]:
    """The config with one tower changed, and that tower's before and after."""
    if not path:
        new = dataclasses.replace(config, image_size=image_size)
        return new, config, new
    inner, old, new = _with_size(getattr(config, path[0]), path[1:], image_size)
    return dataclasses.replace(config, **{path[0]: inner}), old, new


def _resize(table: jax.Array, old: ViTConfig, new: ViTConfig) -> jax.Array:
    first = old.class_tokens

    @jax.jit
    def run(table: jax.Array) -> jax.Array:
        patches = interpolate_grid(table[first:], old.grid, new.grid, old.interpolation)
        return jax.numpy.concatenate([table[:first], patches])

    result, place = run(table), table.sharding
    try:
        place.shard_shape(result.shape)
    except ValueError:  # the new number of places does not divide over the devices
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.device_put(result, place)
