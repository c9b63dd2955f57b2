"""Learned vectors that look at features and become the tokens: what resamplers are made of."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from mmjax.nn import masks
from mmjax.nn.masks import Mask
from mmjax.nn.norm import NORMS
from mmjax.nn.stack import Block, BlockConfig, Stack
from mmjax.typing import Array, Bool, Float


class ResamplerBlock(Block):
    """A block whose attention is to the features and to its own stream, both at once."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.context_norm = NORMS[config.norm](config.width, eps=config.norm_eps)

    def __call__(
        self,
        x: Float[Array, "b m d"],
        *,
        mask: Mask | None,
        context: Float[Array, "b n d"],
        **unused: None,
    ) -> Float[Array, "b m d"]:
        """`mask`: from the stream to the features and then the stream."""

        def attend(y: Array) -> tuple[Array, None]:
            both = jnp.concatenate([self.context_norm(context), y], axis=1)
            return self.attention(y, both, mask=mask), None

        return self._run(x, attend)[0]


class Resampler(nnx.Module):
    """features [B, N, D], mask [B, N] | None -> [B, latents, D].

    Args:
      config: of the blocks.
      latents: number of the learned vectors.
      depth: number of blocks.
    """

    def __init__(self, config: BlockConfig, *, latents: int, depth: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)  # as in Perceiver
        self.latents = nnx.Param(init(rngs.params(), (latents, config.width), jnp.float32))
        self.blocks = Stack(config, depth, block=ResamplerBlock, rngs=rngs)
        self.final_norm = NORMS[config.norm](config.width, eps=config.norm_eps)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None
    ) -> Float[Array, "b m d"]:
        batch, latents = features.shape[0], self.latents.shape[0]
        x = jnp.broadcast_to(self.latents[...].astype(features.dtype), (batch, *self.latents.shape))
        seen = None
        if mask is not None:
            own = jnp.ones((batch, latents), bool)
            seen = masks.cross(own, jnp.concatenate([mask, own], axis=1))
        x, _ = self.blocks.run(x, (), mask=seen, context=features)
        return self.final_norm(x)
