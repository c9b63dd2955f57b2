"""Linear maps and embedding tables.

The compute dtype is that of the input: a model casts once, where data enters, and parameters
(float32) are cast where they are used.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from mmjax.nn import backend
from mmjax.typing import Array, Float, Int

ZEROS = nnx.initializers.zeros
XAVIER = nnx.initializers.xavier_uniform()
LECUN = nnx.initializers.lecun_normal()


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last dimension.

    Args:
      inputs: width of the input.
      outputs: width of the output.
      bias: whether there is one.
      kernel_init, bias_init: initialisers.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        kernel_init: Initializer = LECUN,
        bias_init: Initializer = ZEROS,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(bias_init(rngs.params(), (outputs,), jnp.float32)) if bias else None
        self.lora = None  # an adapter, where `mmjax.nn.lora` gives it one

    def __call__(
        self, x: Float[Array, "*batch inputs"], dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*batch outputs"]:
        """The result has `dtype` where one is given."""
        apply = project if self.lora is None else self.lora
        y = apply(x, self.kernel[...], dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def project(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "*batch outputs"]:
    """`x @ kernel`, computed in the dtype of `x`; the result has `dtype` where one is given."""
    kernel = kernel.astype(x.dtype)
    if x.ndim <= 2 or backend.platform() != "cpu":
        return jnp.matmul(x, kernel, preferred_element_type=dtype)
    # XLA's CPU backend contracts several batch dimensions in the weight gradient with slow generic
    # loops, where one goes to its matrix multiplication. Elsewhere the dimensions stay apart, so
    # that the tokens may be sharded.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = jnp.matmul(rows, kernel, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Embedding(nnx.Module):
    """A table of `count` vectors of `width`, looked up by integer.

    An id outside of the table yields NaN: under `jit` that is the only way to be noticed.
    """

    def __init__(self, count: int, width: int, *, init: Initializer, rngs: nnx.Rngs):
        self.embedding = nnx.Param(init(rngs.params(), (count, width), jnp.float32))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        # Negative ids would count from the end.
        ids = jnp.where(ids < 0, self.embedding.shape[0], ids)
        return jnp.take(self.embedding[...], ids, axis=0, mode="fill", fill_value=jnp.nan)
