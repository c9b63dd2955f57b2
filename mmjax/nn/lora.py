"""Low-rank adapters of linear maps: LoRA, its rank-stabilised scale, and DoRA.

    lora.add(model, LoRAConfig(rank=8, alpha=16, targets=r"decoder/layers/.*/(query|value)"),
             rngs=nnx.Rngs(0))
    plain = lora.merge(model)

A model with new adapters computes exactly what it did before. Their parameters are those below a
component `lora` of the path: `.*/lora/.*` in a table of rules.

References: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); Kalajdzievski,
"A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023); Liu et al., "DoRA:
Weight-Decomposed Low-Rank Adaptation" (2024).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.nn.linear import Linear, project
from mmjax.registry import UnknownNameError, nearest
from mmjax.typing import Array, Float

NAME = "lora"  # the component of their paths


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which linear maps have adapters, and of what kind.

    Attributes:
      rank: of the product that is added to a kernel.
      alpha: the product is multiplied by alpha / rank.
      targets: a regular expression over whole paths of linear maps.
      dora: whether the columns of a kernel have learned lengths, apart from their directions.
      rslora: whether the product is multiplied by alpha / sqrt(rank) instead.
    """

    rank: int
    alpha: int | float
    targets: str
    dora: bool = False
    rslora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"An adapter needs a rank of at least 1, not rank={self.rank}.")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets={self.targets!r} is no regular expression: {error}."
            ) from error

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(nnx.Module):
    """The adapter of one linear map, or of all layers' in a stack.

    With kernel W, scale s and adapters a and b, LoRA computes x @ W + s * (x @ a) @ b, in this
    order: a kernel that is frozen needs no gradient. DoRA multiplies this by m / |W + s * a @ b|,
    the lengths being those of columns, and the one below taken for a constant in the backward pass
    (section 4.3 of the paper). What is learned of m is how far it is from |W|, with which it
    begins: gradients are the same, and the kernel may be loaded after the adapter was made. A
    column of zeros stays one.

    Args:
      shape: of the kernel, [inputs, outputs] or [layers, inputs, outputs].
    """

    def __init__(self, shape: Sequence[int], config: LoRAConfig, *, rngs: nnx.Rngs):
        *stack, inputs, outputs = shape
        self.config = config
        # Kaiming's uniform initialiser as PEFT has it, for the leaky ReLU of slope sqrt(5).
        bound = inputs**-0.5
        a = (*stack, inputs, config.rank)
        self.a = nnx.Param(jax.random.uniform(rngs.params(), a, jnp.float32, -bound, bound))
        self.b = nnx.Param(jnp.zeros((*stack, config.rank, outputs), jnp.float32))
        lengths = jnp.zeros((*stack, outputs), jnp.float32)
        self.magnitude = nnx.Param(lengths) if config.dora else None

    def __call__(
        self,
        x: Float[Array, "*batch inputs"],
        kernel: Float[Array, "inputs outputs"],
        dtype: jax.typing.DTypeLike | None = None,
    ) -> Float[Array, "*batch outputs"]:
        """Instead of `project`, see there."""
        low = self.config.scale * project(x, self.a[...])
        y = project(x, kernel, dtype) + project(low, self.b[...], dtype)
        if self.magnitude is None:
            return y
        before, after = map(jax.lax.stop_gradient, self._lengths(kernel))
        return y * ((before + self.magnitude[...]) / after).astype(y.dtype)

    def merged(self, kernel: Float[Array, "*layers i o"]) -> Float[Array, "*layers i o"]:
        """A kernel that does the same alone."""
        new = self._moved(kernel)
        if self.magnitude is not None:
            _, after = self._lengths(kernel)
            new = new * (self.full_magnitude(kernel) / after)[..., None, :]
        return new.astype(kernel.dtype)

    def full_magnitude(self, kernel: Float[Array, "*layers i o"]) -> Float[Array, "*layers o"]:
        """DoRA's m."""
        return self._lengths(kernel)[0] + self.magnitude[...]

    def _moved(self, kernel: Array) -> Float[Array, "*layers i o"]:
        product = jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)
        return kernel.astype(jnp.float32) + self.config.scale * product

    def _lengths(self, kernel: Array) -> tuple[Array, Array]:
        """[..., outputs] of the kernel's columns, without the adapter and with it."""
        before = jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
        after = jnp.linalg.norm(self._moved(kernel), axis=-2)
        return before, jnp.maximum(after, jnp.finfo(jnp.float32).tiny)


def is_adapter(path: str) -> bool:
    """Whether a parameter, by its path, belongs to an adapter."""
    return path.split("/")[-2:-1] == [NAME]


def adapted(path: str) -> str:
    """The kernel to which a parameter of an adapter belongs."""
    return "/".join([*path.split("/")[:-2], "kernel"])


def linear_maps(model: nnx.Module) -> dict[str, Linear]:
    """All linear maps of a model by path; those of a stack of layers are one."""
    found = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    return dict(sorted(found.items()))


def adapted_maps(model: nnx.Module) -> dict[str, Linear]:
    """Those with an adapter."""
    return {path: linear for path, linear in linear_maps(model).items() if linear.lora is not None}


def add(model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Gives the linear maps that `config.targets` names an adapter, in place.

    Raises:
      UnknownNameError: if there is none; the nearest is given.
      ValueError: if one has an adapter already.
    """
    maps = linear_maps(model)
    chosen = [path for path in maps if re.fullmatch(config.targets, path)]
    if not chosen:
        raise UnknownNameError(
            f"The targets {config.targets!r} of LoRA match the whole path of no linear map; "
            f"{nearest(config.targets, maps)}"
        )
    twice = [path for path in chosen if maps[path].lora is not None]
    if twice:
        raise ValueError(
            f"These linear maps have an adapter already: {', '.join(twice)}. Merge it first."
        )
    for path in chosen:
        adapter = LowRank(maps[path].kernel.shape, config, rngs=rngs)
        maps[path].lora = nnx.data(adapter)


def merge(model: nnx.Module) -> nnx.Module:
    """The model with its adapters within its kernels; itself where it has none."""
    if not adapted_maps(model):
        return model
    plain = nnx.merge(*nnx.split(model))  # its modules are new, its arrays are not
    for linear in adapted_maps(plain).values():
        linear.kernel.set_value(_merged(linear.lora, linear.kernel[...]))
        linear.lora = nnx.static(None)
    return plain


@jax.jit  # as a whole, where the kernel lies on several processes
def _merged(adapter: LowRank, kernel: Array) -> Array:
    return adapter.merged(kernel)
