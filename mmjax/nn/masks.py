"""Who attends to whom: one primitive for every kind of attention.

A mask is not a matrix but two integers for each token. A query attends to a key if

1. their groups are the same and not 0, or the key's group is the parent of the query's, and
2. the key's order is not above the query's, and
3. the key is less than `window` places behind the query (where there is a window), or in the same
   of several blocks.

The order is the cumulative sum of "a new block begins here", the idea of `make_attn_mask` in
big_vision's PaliGemma: within a block all tokens see each other, and blocks see what is before.

  one block                       0 0 0 0 0 0   bidirectional
  a block for each token          0 1 2 3 4 5   causal
  a prefix, then single tokens    0 0 0 1 2 3   prefix-LM
  blocks among single tokens      0 1 1 1 2 3   an image (1 1 1) within a causal stream

Groups are the samples packed into one row (1 1 1 2 2), padding (0), or, across two streams, the
image that a text token may look at. A group with a parent sees that group as well: several
questions (2 2 3 3, of parent 1) share what stands before them (1 1 1), and know nothing of each
other. A query that may attend to nothing gets zeros.

Bidirectional attention with no padding has no mask: None.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.typing import Array, Bool, Int


class Labels(NamedTuple):
    """What a mask knows of each token of a stream. None: all are alike.

    Each is [B or 1, tokens] int32.
    """

    group: Array | None = None
    order: Array | None = None
    position: Array | None = None  # place in the stream; for windows only
    parent: Array | None = None  # of the group; 0 for none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """See the module's docstring. Built by the functions below.

    Attributes:
      query, key: labels of both sides; the same in self-attention.
      window: number of places a query looks back, itself included; within a scan over layers whose
        windows differ, an array.
      triangle: whether the mask is the lower triangle and nothing else, for kernels that know it.
    """

    query: Labels
    key: Labels
    window: int | Array | None = None
    triangle: bool = dataclasses.field(default=False, metadata={"static": True})

    def dense(self) -> Bool[Array, "b q k"]:
        """The matrix, True = attend; its batch dimension is 1 where all samples are alike."""
        query = jax.tree.map(lambda label: label[:, :, None], self.query)
        key = jax.tree.map(lambda label: label[:, None, :], self.key)
        rules = []
        if query.group is not None:
            related = query.group == key.group
            if query.parent is not None:
                related = related | (query.parent == key.group)
            rules.append(related & (key.group > 0))
        if query.order is not None:
            rules.append(query.order >= key.order)
        if self.window is not None:
            near = query.position - key.position < self.window
            # transformers, too, lets a prefix and an image see all of themselves.
            rules.append(near if query.order is None else near | (query.order == key.order))
        allowed = rules[0]
        for rule in rules[1:]:
            allowed = allowed & rule
        return allowed


def causal(length: int, *, window: int | None = None) -> Mask:
    """Each token sees itself and what is before it (of that the last `window` tokens)."""
    place = jnp.arange(length, dtype=jnp.int32)[None]
    labels = Labels(order=place, position=None if window is None else place)
    return Mask(labels, labels, window=_checked(window), triangle=window is None)


def padding(valid: Bool[Array, "b n"]) -> Mask:
    """Bidirectional among the valid tokens of each sample."""
    return blocks(group=valid)


def blocks(
    starts: Bool[Array, "#b n"] | None = None,
    *,
    group: Bool[Array, "#b n"] | Int[Array, "#b n"],
    window: int | None = None,
    parent: Int[Array, "b n"] | None = None,
    positions: Int[Array, "b n"] | None = None,
) -> Mask:
    """The general mask of self-attention.

    Args:
      starts: True where a new block begins; None means there is one block only.
      group: samples packed in a row are numbered from 1; 0 (or False) is padding.
      window: number of places a token looks back, itself included.
      parent: a group before it in the row that a token sees beside its own; 0 for none.
      positions: of the tokens in their own text, which is not their place in the row where groups
        have parents; for windows.
    """
    group = group.astype(jnp.int32)
    order = None if starts is None else jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    place = None
    if window is not None:
        place = jnp.arange(group.shape[1], dtype=jnp.int32)[None]
        place = place if positions is None else positions
    labels = Labels(group=group, order=order, position=place, parent=parent)
    return Mask(labels, labels, window=_checked(window))


def prefix_lm(
    prefix: Bool[Array, "#b n"],
    *,
    group: Bool[Array, "#b n"] | Int[Array, "#b n"],
    **options: Any,
) -> Mask:
    """The tokens of the prefix see each other, those after it see what is before them.

    `options`: window, parent and positions of `blocks`.
    """
    return blocks(~prefix, group=group, **options)


def image_blocks(
    image: Int[Array, "#b n"],
    *,
    group: Bool[Array, "#b n"] | Int[Array, "#b n"],
    **options: Any,
) -> Mask:
    """A causal stream in which the tokens of an image see each other.

    Args:
      image: 0 for text, and a number for each image that differs from its neighbours'.
      options: window, parent and positions of `blocks`.
    """
    before = jnp.pad(image[:, :-1], ((0, 0), (1, 0)))
    return blocks((image == 0) | (image != before), group=group, **options)


def cross(
    query_group: Bool[Array, "#b q"] | Int[Array, "#b q"],
    key_group: Bool[Array, "#b k"] | Int[Array, "#b k"],
) -> Mask:
    """Cross-attention: a query sees the keys of its own group, and none if that is 0.

    With the number of the last image before each text token, and of each visual token's image,
    it is the mask of Flamingo.
    """
    return Mask(
        Labels(group=query_group.astype(jnp.int32)), Labels(group=key_group.astype(jnp.int32))
    )


def _checked(window: int | None) -> int | None:
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: the token itself.")
    return window
