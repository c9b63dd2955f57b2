"""ALiBi: attention that fades with distance, in place of positions.

Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length
Extrapolation" (2022). Each head has a slope; a logit is lowered by it for each token between query
and key.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from mmjax.typing import Array, Float, Int


def slopes(heads: int, largest: float) -> np.ndarray:
    """Of each head [heads] float32: 2^(-largest / heads), ..., 2^(-largest).

    Where the number of heads is no power of 2, they are taken from those of the next one: every
    second first, then those between, as in MPT.
    """
    power = 2 ** math.ceil(math.log2(heads))
    all_of_them = 2.0 ** (-largest / power * np.arange(1, power + 1, dtype=np.float32))
    if power != heads:
        all_of_them = np.concatenate([all_of_them[1::2], all_of_them[::2]])[:heads]
    return all_of_them.astype(np.float32)


def alibi(positions: Int[Array, "#b k"], heads: int, largest: float) -> Float[Array, "#b h 1 k"]:
    """What is added to the logits of causal attention, the same for all queries.

    Softmax does not see what is added to a whole row, so distances are those to the last key.

    Args:
      positions: of the keys in their text.
      largest: the negative exponent of the last head's slope.
    """
    behind = positions - jnp.max(positions, axis=1, keepdims=True)
    return slopes(heads, largest)[:, None, None] * behind[:, None, None].astype(jnp.float32)
