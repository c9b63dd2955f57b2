"""A stack of transformer blocks whose parameters are stacked and which runs as one scan.

Tracing and compiling it costs the same for 2 blocks and for 32.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.nn.attention import KV, Attention
from mmjax.nn.dropout import check_rate, drop_path, dropout
from mmjax.nn.masks import Mask
from mmjax.nn.mlp import MLP, Experts
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.rope import Rotation
from mmjax.registry import Registry, UnknownNameError, nearest
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


PLACEMENTS = ("pre", "post", "res_post", "sandwich", "parallel")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What a block is made of; see `Attention` and `MLP` for the meaning of most.

    Attributes:
      norm: a name in `NORMS`.
      norm_placement: of the norm of a branch f: "pre" is x + f(norm(x)), "post" norm(x + f(x)) (the
        original transformer, BERT), "res_post" x + norm(f(x)) (Swin Transformer V2, Chameleon-34B),
        "sandwich" x + post_norm(f(norm(x))) (Gemma 2 and 3). "parallel": both branches read the
        block's input, each through its norm: x + f(norm_f(x)) + g(norm_g(x)) (GPT-NeoX).
      layer_scale: whether each branch is multiplied by a learned vector before it is added
        (Touvron et al., 2021; DINOv2).
      scale, softcap: of the attention logits.
      qk_norm: a name in `NORMS`; qk_norm_eps: of it, `norm_eps` if None; qk_norm_each: see
        `Attention`.
      dropout: share of the numbers of each branch's output that become zero in training.
      experts: MLPs, of which each token takes the one that is said; see `Experts`.
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
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: str | None = None
    norm_placement: str = "pre"
    layer_scale: bool = False
    scale: float | None = None
    softcap: float | None = None
    qk_norm_eps: float | None = None
    qk_norm_each: bool = False
    dropout: float = 0.0
    experts: int = 1

    def __post_init__(self):
        check_rate("dropout", self.dropout)
        if self.experts < 1:
            raise ValueError(f"experts={self.experts} must be at least 1.")
        if self.norm_placement not in PLACEMENTS:
            raise UnknownNameError(
                f"norm_placement={self.norm_placement!r} does not exist; "
                f"{nearest(self.norm_placement, PLACEMENTS)}"
            )


class LayerKind(NamedTuple):
    """What layers of one stack may differ in, parameters apart.

    Attributes:
      window: places a token looks back, itself included; None for all.
      rotation: rotary embedding of queries and keys; None for none.
      scale: of the attention logits; None for the block's own.
    """

    window: int | None = None
    rotation: Rotation | None = None
    scale: float | None = None


class Layers(NamedTuple):
    """Which layer is of which kind. The kinds agree in which of their fields are None, except for
    `window`.

    Attributes:
      kinds: the different ones.
      index: [depth], each layer's place in `kinds`.
    """

    kinds: tuple[LayerKind, ...]
    index: tuple[int, ...]


class Block(nnx.Module):
    """Attention, then an MLP, each added to the stream by way of norms; see `BlockConfig`."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        def norm() -> nnx.Module:
            return NORMS[config.norm](config.width, eps=config.norm_eps)

        sandwich = config.norm_placement == "sandwich"
        self.placement = config.norm_placement
        self.dropout = config.dropout
        self.attention_norm = norm()
        self.attention = Attention(
            config.width,
            config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps if config.qk_norm_eps is None else config.qk_norm_eps,
            qk_norm_each=config.qk_norm_each,
            scale=config.scale,
            softcap=config.softcap,
            rngs=rngs,
        )
        self.attention_post_norm = norm() if sandwich else None
        self.attention_scale = _layer_scale(config)
        self.mlp_norm = norm()
        mlp = functools.partial(
            MLP,
            config.width,
            config.mlp_width,
            activation=config.activation,
            gated=config.gated,
            bias=config.mlp_bias,
            rngs=rngs,
        )
        self.routed = config.experts > 1
        self.mlp = Experts(mlp, config.experts) if self.routed else mlp()
        self.mlp_post_norm = norm() if sandwich else None
        self.mlp_scale = _layer_scale(config)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        mask: Mask | None = None,
        rotation: Rotation | None = None,
        scale: float | Float[Array, ""] | None = None,
        bias: Float[Array, "#b h #n n"] | None = None,
        expert: Int[Array, "b n"] | None = None,
        drop_rate: Float[Array, ""] | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "b n d"]:
        """
        Args:
          expert: the MLP of each token, where there are several.
          drop_rate: of each of the two branches, for stochastic depth; needs `rng`.
          rng: turns dropout on too.
        """

        def attend(y: Array) -> tuple[Array, None]:
            return self.attention(y, mask=mask, rotation=rotation, scale=scale, bias=bias), None

        return self._run(x, attend, expert, drop_rate, rng)[0]

    def with_cache(
        self,
        x: Float[Array, "b n d"],
        *,
        mask: Mask | None = None,
        rotation: Rotation | None = None,
        scale: float | Float[Array, ""] | None = None,
        bias: Float[Array, "#b h #n n"] | None = None,
        expert: Int[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b n d"], KV]:
        """The same, and the keys and values of its attention."""
        return self._run(
            x,
            lambda y: self.attention.with_cache(
                y, mask=mask, rotation=rotation, scale=scale, bias=bias
            ),
            expert,
        )

    def step(
        self,
        x: Float[Array, "b n d"],
        cache: KV,
        slot: Int[Array, ""],
        *,
        mask: Mask,
        rotation: Rotation | None = None,
        scale: float | Float[Array, ""] | None = None,
        bias: Float[Array, "#b h n k"] | None = None,
        expert: Int[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b n d"], KV]:
        """The next tokens, which attend to a cache and join it; see `Attention.step`."""
        return self._run(
            x,
            lambda y: self.attention.step(
                y, cache, slot, mask=mask, rotation=rotation, scale=scale, bias=bias
            ),
            expert,
        )

    def _run(
        self,
        x: Array,
        attend: Callable[[Array], tuple[Array, KV | None]],
        expert: Array | None = None,
        drop_rate: Array | None = None,
        rng: Key | None = None,
    ) -> tuple[Array, KV | None]:
        """Both branches around whichever way to attend."""
        first = None
        if rng is not None:
            rng, first = jax.random.split(rng)
        start, post, res_post = x, self.placement == "post", self.placement == "res_post"
        late = post or res_post
        attended, cache = attend(x if late else self.attention_norm(x))
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        attended = self.attention_norm(attended) if res_post else attended
        x = x + self._branch(attended, self.attention_scale, drop_rate, first)
        x = self.attention_norm(x) if post else x
        y = x if late else self.mlp_norm(start if self.placement == "parallel" else x)
        fed = self.mlp(y, expert) if self.routed else self.mlp(y)
        if self.mlp_post_norm is not None:
            fed = self.mlp_post_norm(fed)
        fed = self.mlp_norm(fed) if res_post else fed
        x = x + self._branch(fed, self.mlp_scale, drop_rate, rng)
        x = self.mlp_norm(x) if post else x
        return constrain(x, "batch", "tokens", "embed"), cache

    def _branch(
        self, y: Array, scale: nnx.Param | None, drop_rate: Array | None, rng: Key | None
    ) -> Array:
        """What is added to the stream of a branch's output."""
        if scale is not None:
            y = y * scale[...].astype(y.dtype)
        if rng is None:
            return y
        if self.dropout:
            y = dropout(y, self.dropout, jax.random.fold_in(rng, 1))
        return y if drop_rate is None else drop_path(y, drop_rate, rng)


def _layer_scale(config: BlockConfig) -> nnx.Param | None:
    return nnx.Param(jnp.ones((config.width,), jnp.float32)) if config.layer_scale else None


class Stack(nnx.Module):
    """`depth` blocks; their parameters are those of one block with a leading [depth], at `layers`.

    Args:
      config: of each block; a `BlockConfig` unless `block` says otherwise.
      depth: number of blocks.
      block: `Block` or a class that is called like it, made with (config, rngs=...).
      remat: a name in `REMAT`.
      drop_path: rate of stochastic depth at the last block; it grows linearly from 0 at the first.
      unroll: blocks in one iteration of the scan: more compile time for, on some backends,
        faster steps.
    """

    def __init__(
        self,
        config: Any,
        depth: int,
        *,
        block: type[nnx.Module] = Block,
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
            return nnx.state(block(config, rngs=nnx.Rngs(key)))

        graph = nnx.graphdef(nnx.eval_shape(lambda: block(config, rngs=nnx.Rngs(0))))
        self.layers = nnx.merge(graph, jax.vmap(params)(jax.random.split(rngs.params(), depth)))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        mask: Mask | None = None,
        rotation: Rotation | None = None,
        rng: Key | None = None,
    ) -> Float[Array, "b n d"]:
        """The output of the last block. `rng` turns stochastic depth and dropout on."""
        x, _ = self.run(x, (), mask=mask, rotation=rotation, rng=rng)
        return x

    def run(
        self,
        x: Float[Array, "b n d"],
        features: Sequence[int],
        *,
        mask: Mask | None = None,
        rotation: Rotation | None = None,
        bias: Float[Array, "#b h #n n"] | None = None,
        layers: Layers | None = None,
        rng: Key | None = None,
        **inputs: Any,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "f b n d"] | None]:
        """The output of the last block, and those of the blocks named by `features` (or None).

        Blocks count from 0, and from -1 backwards: -2 is the penultimate one.

        Args:
          mask, rotation, bias: of all layers; see `Attention`.
          layers: windows, rotations and scales where layers differ in them. The mask is then one
            that was made with a window (any).
          inputs: what else blocks take, the same for all.

        Raises:
          ValueError: if a block of `features` does not exist.
        """
        kept = sorted({self._index(block) for block in features})
        places, outputs = None, None
        if kept:
            # Where each block's output goes; those nobody asked for share a place at the end.
            places = [kept.index(i) if i in kept else len(kept) for i in range(self.depth)]
            places = np.array(places, np.int32)
            outputs = jnp.zeros((len(kept) + 1, *x.shape), x.dtype)
        drop_rates, keys = None, None
        if rng is not None:
            keys = jax.random.split(rng, self.depth)
        if rng is not None and self.drop_path > 0:
            drop_rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)
        graph, params = nnx.split(self.layers)
        options, table = layer_options(mask, rotation, layers)

        def block(x, layer, kind, drop_rate, key):
            call = nnx.merge(graph, layer)
            given = {**options(table, kind), **inputs}
            return call(x, **given, bias=bias, drop_rate=drop_rate, rng=key)

        if self.policy is not None:
            # Within a scan nothing is there to be merged with the second computation.
            block = jax.checkpoint(block, policy=self.policy, prevent_cse=self.unroll > 1)

        def step(carry, inputs):
            x, outputs = carry
            layer, kind, place, drop_rate, key = inputs
            x = block(x, layer, kind, drop_rate, key)
            if outputs is not None:
                outputs = jax.lax.dynamic_update_index_in_dim(outputs, x, place, 0)
            return (x, outputs), None

        kinds = None if layers is None else np.array(layers.index, np.int32)
        (x, outputs), _ = jax.lax.scan(
            step, (x, outputs), (params, kinds, places, drop_rates, keys), unroll=self.unroll
        )
        if outputs is None:
            return x, None
        return x, outputs[np.array([kept.index(self._index(block)) for block in features])]

    def prefill(
        self,
        x: Float[Array, "b n d"],
        length: int,
        *,
        mask: Mask | None = None,
        rotation: Rotation | None = None,
        bias: Float[Array, "#b h #n n"] | None = None,
        layers: Layers | None = None,
        **inputs: Any,
    ) -> tuple[Float[Array, "b n d"], tuple[KV, ...]]:
        """The output of the last block, and a cache for `step`.

        Args:
          length: slots of the cache; the tokens of `x` take the first ones.
          inputs: as in `run`.

        Returns:
          The output, and for each layer keys and values [B, kv_heads, length, head_dim].
        """
        graph, params = nnx.split(self.layers)
        options, table = layer_options(mask, rotation, layers)

        def step(x, layer_and_kind):
            layer, kind = layer_and_kind
            given = {**options(table, kind), **inputs}
            return nnx.merge(graph, layer).with_cache(x, **given, bias=bias)

        kinds = None if layers is None else np.array(layers.index, np.int32)
        x, caches = jax.lax.scan(step, x, (params, kinds))
        room = ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0))
        return x, tuple(
            KV(*(jnp.pad(stacked[layer], room) for stacked in caches))
            for layer in range(self.depth)
        )

    def step(
        self,
        x: Float[Array, "b n d"],
        caches: tuple[KV, ...],
        slot: Int[Array, ""],
        *,
        mask: Mask,
        rotation: Rotation | None = None,
        bias: Float[Array, "#b h n k"] | None = None,
        layers: Layers | None = None,
        before: Callable[[Array, int], Array] = lambda x, layer: x,
        **inputs: Any,
    ) -> tuple[Float[Array, "b n d"], tuple[KV, ...]]:
        """The next tokens of a text whose keys and values are in `caches`, which they join.

        The layers run one by one and not in a scan, which would have to copy each layer's weights
        and cache at each step; a step is small, so the program compiles quickly all the same.

        Args:
          slot: where in the caches the tokens of `x` go.
          mask: from them to all slots.
          before: what is done to the stream before each layer.
          inputs: as in `run`.
        """
        updated = []
        for layer in range(self.depth):
            options = {"mask": mask, "rotation": rotation}
            if layers is not None:
                kind = layers.kinds[layers.index[layer]]
                options = {
                    "mask": dataclasses.replace(mask, window=kind.window),
                    "rotation": kind.rotation,
                    "scale": kind.scale,
                }
            x = before(x, layer)
            x, cache = self.block(layer).step(
                x, caches[layer], slot, bias=bias, **options, **inputs
            )
            updated.append(cache)
        return x, tuple(updated)

    def unstack(self) -> Stack:
        """A stack for `step` alone whose blocks have parameters of their own.

        On CPUs a slice of a stacked array is a copy: before many steps, one copy is cheaper.
        """
        result = copy.copy(self)
        result.layers = nnx.List([self.block(layer) for layer in range(self.depth)])
        return result

    def block(self, layer: int) -> nnx.Module:
        """One of the blocks, with parameters of its own."""
        if isinstance(self.layers, nnx.List):
            return self.layers[layer]
        graph, params = nnx.split(self.layers)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], params))

    def _index(self, block: int) -> int:
        if not -self.depth <= block < self.depth:
            raise ValueError(
                f"There is no block {block} in a stack of {self.depth}: "
                f"choose from {-self.depth} to {self.depth - 1}."
            )
        return block % self.depth


def layer_options(
    mask: Mask | None, rotation: Rotation | None, layers: Layers | None
) -> tuple[Callable[[Any, Array | None], dict[str, Any]], Any]:
    """A function (table, kind) -> arguments of a block, and its table, for use within a scan."""
    if layers is None:
        return lambda table, kind: {"mask": table[0], "rotation": table[1]}, (mask, rotation)
    windowed = any(kind.window is not None for kind in layers.kinds)
    if windowed and (mask is None or mask.query.position is None):
        raise ValueError("Layers with windows need a mask that was made with a window.")
    # Where some layers have a window, those without have one that is wider than any text.
    windows = [2**30 if kind.window is None else kind.window for kind in layers.kinds]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(kind._replace(window=None) for kind in layers.kinds)
    )

    def options(table, kind):
        mask, windows, stacked = table
        if windows is not None:
            mask = dataclasses.replace(mask, window=windows[kind])
        chosen = jax.tree.map(lambda leaf: leaf[kind], stacked)
        return {"mask": mask, "rotation": chosen.rotation, "scale": chosen.scale}

    return options, (mask, jnp.array(windows, jnp.int32) if windowed else None, stacked)
