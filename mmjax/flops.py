"""Analytical FLOPs of a training step: matrix products only, as papers count them.

Counted on the traced program of the step without rematerialisation, so that recomputation earns no
credit and frozen parts are counted as they are run; what no result depends on is not. Products
within causal attention count half (Dao et al., FlashAttention; PaLM appendix B gives the same
convention of counting).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import jax
from jax.extend import core

from mmjax.nn.attention import CAUSAL_SCOPE

# Dense bf16 matrix peak of one device in TFLOP/s, from the vendors' data sheets, by device kind.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
}


def matmul_flops(function: Callable, *arguments) -> float:
    """FLOPs of the matrix products and convolutions of `function(*arguments)`.

    Args:
      function: traced, never run.
      *arguments: arrays or shapes.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr, causal: bool = False) -> float:
    total = 0.0
    for equation in _used(jaxpr):
        name = equation.primitive.name
        # Functions with derivatives of their own do not inherit the scope they are called in.
        half = causal or CAUSAL_SCOPE in str(equation.source_info.name_stack)
        if name == "dot_general":
            total += _dot_flops(equation) / (2 if half else 1)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) / out_features
        elif name == "cond":
            total += max(_count(branch.jaxpr, half) for branch in equation.params["branches"])
        else:
            repeats = equation.params["length"] if name == "scan" else 1
            inner = core.jaxprs_in_params(equation.params)
            total += repeats * sum(_count(jaxpr, half) for jaxpr in inner)
    return total


def _used(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The equations, last first, that the outputs depend on: compilers drop the others."""
    needed = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            needed |= {var for var in equation.invars if isinstance(var, core.Var)}
            yield equation


def _dot_flops(equation: core.JaxprEqn) -> int:
    (contract, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contract)
