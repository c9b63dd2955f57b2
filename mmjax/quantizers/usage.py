"""How evenly codes are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.quantizers.base import QuantizerConfig
from mmjax.typing import Array, Float, Int


def counts(codes: Int[Array, "*b *c"], config: QuantizerConfig) -> Float[Array, "*c k"]:
    """How often each code occurs; where a vector has several, of each of them. Those of several
    batches add up."""
    rows = codes.reshape(-1, *config.shape)
    count = jax.vmap(lambda column: jnp.bincount(column, length=config.size), in_axes=1)
    found = count(rows.reshape(len(rows), -1)).astype(jnp.float32)
    return found.reshape(*config.shape, config.size)


def usage(counts: Float[Array, "*c k"]) -> Float[Array, "*c"]:
    """The share of codes that occur at all."""
    return jnp.mean(counts > 0, axis=-1)


def perplexity(counts: Float[Array, "*c k"]) -> Float[Array, "*c"]:
    """The exponential of the entropy of codes: 1 if there is but one, K if all are as frequent."""
    share = counts / jnp.sum(counts, axis=-1, keepdims=True)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1))
