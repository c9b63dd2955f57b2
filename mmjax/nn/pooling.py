"""A sequence to one vector."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from mmjax.nn.attention import Attention
from mmjax.nn.linear import XAVIER
from mmjax.nn.masks import Mask
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import NORMS
from mmjax.nn.stack import BlockConfig
from mmjax.typing import Array, Bool, Float


class AttentionPool(nnx.Module):
    """Multihead attention pooling, the MAP head of big_vision's ViT and of SigLIP.

    A learned probe attends to the tokens; an MLP with a norm before it adds to the result. Of the
    config, width, heads, mlp_width, activation and norm count.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.probe = nnx.Param(XAVIER(rngs.params(), (1, config.width), jnp.float32))
        self.attention = Attention(config.width, config.heads, rngs=rngs)
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, activation=config.activation, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], mask: Mask | None = None) -> Float[Array, "b d"]:
        """`mask`: of one query to n keys, as `masks.cross` gives it; None means all are valid."""
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        y = self.attention(probe, x, mask=mask)
        return (y + self.mlp(self.norm(y)))[:, 0]


def masked_mean(
    x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
) -> Float[Array, "b d"]:
    """The mean of the valid tokens (all, if there is no mask), summed in float32; 0 of none."""
    weights = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)
    total = jnp.einsum("bnd,bn->bd", x, weights, preferred_element_type=jnp.float32)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)[:, None]).astype(x.dtype)
