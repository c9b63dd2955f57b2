"""The feed-forward part of a block, plain or gated, and the activations it can have."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.nn.linear import XAVIER, Linear
from mmjax.nn.partition import constrain
from mmjax.registry import Registry
from mmjax.typing import Array, Float, Int


def _lean(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The same elementwise function, of which the backward pass keeps one array and not three.

    Left to itself, differentiation keeps every factor of the formula; here it keeps the derivative.
    """
    result = jax.custom_jvp(function)

    @result.defjvp
    def _(primals, tangents):
        value, slope = jax.jvp(function, primals, (jnp.ones_like(primals[0]),))
        return value, slope * tangents[0]

    return result


ACTIVATIONS: Registry[Callable[[Array], Array]] = Registry("activation")
ACTIVATIONS.register("gelu")(_lean(functools.partial(jax.nn.gelu, approximate=False)))
ACTIVATIONS.register("gelu_tanh")(_lean(functools.partial(jax.nn.gelu, approximate=True)))
ACTIVATIONS.register("relu")(jax.nn.relu)
# Of Flamingo's resampler.
ACTIVATIONS.register("relu_squared")(_lean(lambda x: jnp.square(jax.nn.relu(x))))
# Of MobileNetV3.
ACTIVATIONS.register("hard_swish")(_lean(jax.nn.hard_swish))
ACTIVATIONS.register("tanh")(_lean(jnp.tanh))
ACTIVATIONS.register("silu")(_lean(jax.nn.silu))


@ACTIVATIONS.register("quick_gelu")
@_lean
def quick_gelu(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The approximation of OpenAI's CLIP: x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class MLP(nnx.Module):
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` where gated.

    Gated with "silu" it is SwiGLU, with "gelu" or "gelu_tanh" GeGLU (Shazeer, 2020).

    Args:
      width: of the input, and of the output where that has no other.
      hidden: width in between.
      activation: a name in `ACTIVATIONS`.
      gated: whether there is a gate.
      bias: whether the linear maps have biases.
      outputs: width of the output.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        gated: bool = False,
        bias: bool = True,
        outputs: int | None = None,
        rngs: nnx.Rngs,
    ):
        # As in big_vision: Xavier kernels and all but zero biases.
        linear = functools.partial(
            Linear,
            bias=bias,
            kernel_init=XAVIER,
            bias_init=nnx.initializers.normal(1e-6),
            rngs=rngs,
        )
        self.activation = ACTIVATIONS[activation]
        self.up = linear(width, hidden)
        self.gate = linear(width, hidden) if gated else None
        self.down = linear(hidden, width if outputs is None else outputs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        hidden = self.up(x)
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(self.gate(x)) * hidden
        return self.down(constrain(hidden, "batch", "tokens", "mlp"))


class Experts(nnx.Module):
    """MLPs of which each token takes one, by what kind of token it is: of text, of an image.

    Lin et al., "MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts"
    (2024); Liang et al., "Mixture-of-Transformers" (2024). Nothing is routed by what is learnt, so
    that nothing need be balanced. All tokens go through all MLPs, and of each one result is taken:
    exact, at the cost of all of them.

    Args:
      make: makes an MLP.
      count: how many.
    """

    def __init__(self, make: Callable[[], MLP], count: int):
        self.each = nnx.List(make() for _ in range(count))

    def __call__(
        self, x: Float[Array, "b n d"], expert: Int[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """`expert`: the number of each token's MLP."""
        chosen = self.each[0](x)
        for number, mlp in enumerate(self.each[1:], 1):
            chosen = jnp.where((expert == number)[:, :, None], mlp(x), chosen)
        return chosen
