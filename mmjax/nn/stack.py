"""A stack of transformer blocks whose parameters are stacked and which runs as one scan.

Tracing and compiling it costs the same for 2 blocks and for 32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.nn.attention import Attention
from mmjax.nn.dropout import check_rate, drop_path
from mmjax.nn.masks import Mask
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.registry import Registry
from mmjax.typing import Array, Float, Int, Key

# What is kept of a block's forward pass for its backward pass; the rest is computed again.
REMAT: Registry[Callable[..., bool] | None] = Registry("remat policy")
# Everything is kept; nothing is computed again.
REMAT.register("none")(None)
# Only the block's input is kept.
REMAT.register("full")(jax.checkpoint_policies.nothing_saveable)
# The outputs of the linear layers are kept, not the attention weights.
REMAT.register("dots")(jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
# The outputs of all matrix multiplications are kept, attention's included.
REMAT.register("all_dots")(jax.checkpoint_policies.dots_saveable)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What a block is made of; see `Attention` and `MLP` for the meaning of most.

    Attributes:
      norm: a name in `NORMS`; norms stand before attention and MLP ("pre-norm").
    """

    width: int
    heads: int
    mlp_width: int
    activation: str
    norm: str
    norm_eps: float
    kv_heads: int | None = None
    head_dim: int | None = None
    gated: bool = False
    bias: bool = True
    qk_norm: str | None = None
    rope_theta: float | None = None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.attention_norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.attention = Attention(
            config.width,
            config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            bias=config.bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            rngs=rngs,
        )
        self.mlp_norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.mlp = MLP(
            config.width,
            config.mlp_width,
            activation=config.activation,
            gated=config.gated,
            bias=config.bias,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "#b n"] | None = None,
        drop_rate: Float[Array, ""] | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "b n d"]:
        """`drop_rate`: of each of the two branches, for stochastic depth; needs `rng`."""
        attended = self.attention(self.attention_norm(x), mask=mask, positions=positions)
        if rng is not None:
            rng, first = jax.random.split(rng)
            attended = drop_path(attended, drop_rate, first)
        x = x + attended
        fed = self.mlp(self.mlp_norm(x))
        if rng is not None:
            fed = drop_path(fed, drop_rate, rng)
        return constrain(x + fed, "batch", "tokens", "embed")


class Stack(nnx.Module):
    """`depth` blocks; their parameters are those of one block with a leading [depth], at `layers`.

    Args:
      config: of each block.
      depth: number of blocks.
      remat: a name in `REMAT`.
      drop_path: rate of stochastic depth at the last block; it grows linearly from 0 at the first.
      unroll: blocks in one iteration of the scan: more compile time for, on some backends,
        faster steps.
    """

    def __init__(
        self,
        config: BlockConfig,
        depth: int,
        *,
        remat: str = "none",
        drop_path: float = 0.0,
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        check_rate("drop_path", drop_path)
        if depth < 1:
            raise ValueError(f"A stack needs at least one block, not depth={depth}.")
        self.depth = depth
        self.policy = REMAT[remat]
        self.drop_path = drop_path
        self.unroll = unroll

        def params(key: Key) -> nnx.State:
            return nnx.state(Block(config, rngs=nnx.Rngs(key)))

        graph = nnx.graphdef(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
        self.layers = nnx.merge(graph, jax.vmap(params)(jax.random.split(rngs.params(), depth)))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "#b n"] | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "b n d"]:
        """The output of the last block. `rng` turns stochastic depth on."""
        x, _ = self.run(x, (), mask=mask, positions=positions, rng=rng)
        return x

    def run(
        self,
        x: Float[Array, "b n d"],
        features: Sequence[int],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "#b n"] | None = None,
        rng: Key | None = None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "f b n d"] | None]:
        """The output of the last block, and those of the blocks named by `features` (or None).

        Blocks count from 0, and from -1 backwards: -2 is the penultimate one.

        Raises:
          ValueError: if a block of `features` does not exist.
        """
        graph, params = nnx.split(self.layers)
        kept = sorted({self._index(block) for block in features})
        places, outputs = None, None
        if kept:
            # Where each block's output goes; those nobody asked for share a place at the end.
            places = [kept.index(i) if i in kept else len(kept) for i in range(self.depth)]
            places = np.array(places, np.int32)
            outputs = jnp.zeros((len(kept) + 1, *x.shape), x.dtype)
        drop_rates, keys = None, None
        if rng is not None and self.drop_path > 0:
            drop_rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)
            keys = jax.random.split(rng, self.depth)

        def block(x, layer, drop_rate, key):
            call = nnx.merge(graph, layer)
            return call(x, mask=mask, positions=positions, drop_rate=drop_rate, rng=key)

        if self.policy is not None:
            # Within a scan nothing is there to be merged with the second computation.
            block = jax.checkpoint(block, policy=self.policy, prevent_cse=self.unroll > 1)

        def step(carry, inputs):
            x, outputs = carry
            layer, place, drop_rate, key = inputs
            x = block(x, layer, drop_rate, key)
            if outputs is not None:
                outputs = jax.lax.dynamic_update_index_in_dim(outputs, x, place, 0)
            return (x, outputs), None

        (x, outputs), _ = jax.lax.scan(
            step, (x, outputs), (params, places, drop_rates, keys), unroll=self.unroll
        )
        if outputs is None:
            return x, None
        return x, outputs[np.array([kept.index(self._index(block)) for block in features])]

    def _index(self, block: int) -> int:
        if not -self.depth <= block < self.depth:
            raise ValueError(
                f"There is no block {block} in a stack of {self.depth}: "
                f"choose from {-self.depth} to {self.depth - 1}."
            )
        return block % self.depth
