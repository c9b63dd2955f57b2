"""Which images each token of a text sees, where these stand beside the text and not in it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.nn.masks import Labels, Mask
from mmjax.typing import Array, Bool, Int


def latest(here: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """The last place up to each token that is `here`; -1 before the first."""
    index = jnp.arange(here.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(here, index, -1), axis=1)


def at_places(values: Int[Array, "b t"], places: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The values that stand at these places; -1 where the place is."""
    there = jnp.take_along_axis(values, jnp.maximum(places, 0), axis=1)
    return jnp.where(places >= 0, there, -1)


def last_images(
    here: Bool[Array, "b t"],
    segments: Int[Array, "b t"],
    parents: Int[Array, "b t"] | None,
) -> Int[Array, "b t"]:
    """The place of the last image up to each token, in its segment or else in the parent of that;
    -1 for none.

    Args:
      here: where images stand.
    """
    last = latest(here)
    last = jnp.where((at_places(segments, last) == segments) & (segments > 0), last, -1)
    if parents is None:
        return last
    # Other segments, with images of their own, may stand between a segment and its parent.
    images = jnp.where(here, segments, 0)[:, None, :]
    of_parent = (parents[:, :, None] == images) & (images > 0)
    index = jnp.arange(here.shape[1], dtype=jnp.int32)
    return jnp.where(last >= 0, last, jnp.max(jnp.where(of_parent, index, -1), axis=2))


def first_places(number: Int[Array, "b t"], count: int) -> Int[Array, "b i"]:
    """Where each of so many images first stands in its row; 0 for those that stand nowhere.

    Args:
      number: of the image that stands at each token, -1 for none.
    """
    stands = number[:, :, None] == jnp.arange(count, dtype=jnp.int32)
    return jnp.argmax(stands, axis=1).astype(jnp.int32)


def owners(number: Int[Array, "b t"], count: int, segments: Int[Array, "b t"]) -> Int[Array, "b i"]:
    """The segment that each of so many images belongs to; 0 for those that stand nowhere."""
    stands = number[:, :, None] == jnp.arange(count, dtype=jnp.int32)
    return jnp.max(jnp.where(stands, segments[:, :, None], 0), axis=1)


def in_sight(
    tokens: Int[Array, "b t"],
    ends: Sequence[int],
    segments: Int[Array, "b t"] | None,
    parents: Int[Array, "b t"] | None,
) -> tuple[Int[Array, "b t"], Int[Array, "b t"] | None]:
    """Segments and parents as far as images go: what follows an end is a segment of its own.

    Args:
      ends: ids of tokens after which no image before them is seen. They see it themselves.
      segments, parents: see `VLM.run`.
    """
    group = jnp.ones_like(tokens) if segments is None else segments
    if not ends:
        return group, parents
    ended = is_end(tokens, ends) & (group > 0)
    # How many ends there are before each token: in the row, then in its own segment.
    before = jnp.cumsum(ended, axis=1, dtype=jnp.int32) - ended
    starts = jnp.pad(group[:, 1:] != group[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    before = before - at_places(before, latest(starts))
    if parents is not None:
        of_parent = (parents[:, :, None] == group[:, None, :]) & ended[:, None, :]
        before = before + jnp.sum(of_parent, axis=2, dtype=jnp.int32)
    room = tokens.shape[1] + 1

    def divided(label: Array) -> Array:
        return jnp.where(label > 0, label * room + before, 0)

    return divided(group), None if parents is None else divided(parents)


def is_end(tokens: Int[Array, "*b"], ends: Sequence[int]) -> Bool[Array, "*b"]:
    return jnp.isin(tokens, np.asarray(ends, np.int32))


def sees_last(
    place: Int[Array, "b t"],
    count: int,
    per_image: int,
    segments: Int[Array, "b t"],
    parents: Int[Array, "b t"] | None,
) -> Mask:
    """From each token to the last image up to it, in its segment or else in the parent of that.

    Args:
      place: which image of the row stands at each token, in any order; -1 for none.
      count: of images.
      per_image: visual tokens.
    """
    last = last_images(place >= 0, segments, parents)
    query = at_places(place, last) + 1
    number = jnp.repeat(jnp.arange(1, count + 1, dtype=jnp.int32), per_image)
    key = jnp.broadcast_to(number, (len(place), count * per_image))
    return Mask(Labels(group=query), Labels(group=key))


def sees_all(
    place: Int[Array, "b t"],
    count: int,
    per_image: int,
    segments: Int[Array, "b t"],
    parents: Int[Array, "b t"] | None,
) -> Mask:
    """From each token to all images up to it, in its segment and in the parent of that; see
    `sees_last`."""

    def each(label: Array) -> Array:
        return jnp.repeat(label, per_image, axis=1)

    index = jnp.arange(place.shape[1], dtype=jnp.int32)
    query = Labels(group=segments, order=jnp.broadcast_to(index, place.shape), parent=parents)
    owner, first = owners(place, count, segments), first_places(place, count)
    return Mask(query, Labels(group=each(owner), order=each(first)))
