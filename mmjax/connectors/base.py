"""What a connector is: from the features of an image to tokens of a language model.

A connector is one file: a frozen config that says its name and, before anything is compiled, how
many tokens it makes of a grid; and a module that makes them. Nothing outside of that file knows its
name but the registry.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.flops import matmul_flops
from mmjax.params import abstract, count, merge
from mmjax.registry import Registry
from mmjax.typing import Array, Bool, Float

# Patches (down, across) of an image.
Grid = tuple[int, int]


class ConnectorError(ValueError):
    """A grid, width or input that a connector cannot take; the message says what fits."""


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """The fields of a connector; each has a subclass with a constant `name` of its own.

    Attributes:
      frames: images that are read together, a clip; 1 for those that read one image at a time.
      names_words: whether tokens are mixtures of the language model's own; see `Connector.name`.
    """

    name: str = dataclasses.field(default="", init=False)

    @property
    def frames(self) -> int:
        return 1

    @property
    def names_words(self) -> bool:
        return False

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        """Number of tokens for the features of an image, or of a clip of `frames`.

        Args:
          grid: of its patches.
          extra: number of features of each image before those of the patches: a class token,
            registers.

        Raises:
          ConnectorError: if the connector cannot take them; the message says what fits.
        """
        raise NotImplementedError


class Connector(nnx.Module):
    """features [B, N, Dv], mask [B, N] | None, grid (h, w) -> tokens [B, M, Dl], mask [B, M].

    N is `frames * (extra + h * w)`: whatever stands before an image's patches, then its patches
    row by row, image after image. A mask is True at features that count.

    Args:
      config: of the connector's own class.
      inputs: width of the features.
      outputs: width of the language model.
      rngs: random streams for the initial parameters.

    Raises:
      ConnectorError: if the widths do not fit the config.
    """

    # Whether it reads the question as well; it is then called with `text` and `text_mask`.
    reads_text = False

    def __init__(self, config: ConnectorConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        """
        Raises:
          ConnectorError: if the features are not those of such a grid.
        """
        raise NotImplementedError

    def name(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> Float[Array, "b m v"]:
        """The logarithm of the share that each entry of the vocabulary has in each token, float32.

        For connectors whose config has `names_words` only.
        """
        raise NotImplementedError


CONNECTORS: Registry[type[Connector]] = Registry("connector")


def make_connector(
    config: ConnectorConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs
) -> Connector:
    """The module of a config; see `Connector`."""
    return CONNECTORS[config.name](config, inputs, outputs, rngs=rngs)


class Cost(NamedTuple):
    """What a connector costs.

    Attributes:
      tokens: that it makes of one image, or of a clip.
      parameters: their number.
      flops: of the matrix products of one forward pass for one image, or clip.
    """

    tokens: int
    parameters: int
    flops: float


def cost(
    config: ConnectorConfig,
    inputs: int,
    outputs: int,
    grid: Grid,
    *,
    extra: int = 0,
    text: int | None = None,
) -> Cost:
    """What a connector costs, without running or allocating it.

    Args:
      inputs, outputs: widths of the features and of the language model.
      grid, extra: see `ConnectorConfig.tokens`.
      text: tokens of the question, for those that read it.

    Raises:
      ConnectorError: if the widths or the grid do not fit.
    """
    tokens = config.tokens(grid, extra)
    graph, shapes = abstract(lambda: make_connector(config, inputs, outputs, rngs=nnx.Rngs(0)))
    length = config.frames * (extra + grid[0] * grid[1])
    features = jax.ShapeDtypeStruct((1, length, inputs), jnp.float32)
    given = {}
    if text is not None:
        given["text"] = jax.ShapeDtypeStruct((1, text), jnp.int32)

    def run(params, features, given):
        return merge(graph, params)(features, None, grid, **given)[0]

    return Cost(tokens, count(shapes), matmul_flops(run, shapes, features, given))


def whole_grid(length: int, grid: Grid, name: str) -> None:
    """For connectors that need every feature to have a place in the grid.

    Raises:
      ConnectorError: if there are other features, or fewer.
    """
    height, width = grid
    if length != height * width:
        raise ConnectorError(
            f"The connector {name!r} needs the {height} x {width} = {height * width} features of a "
            f"grid, one for each place, but there are {length}: leave class token and registers "
            "out of the features (class_token=False)."
        )


def square_tokens(name: str, side: int, grid: Grid, extra: int) -> int:
    """What `tokens` returns of a connector that makes one of each square of features.

    Raises:
      ConnectorError: if squares do not fill the grid, or there are extra features.
    """
    no_extra(extra, name)
    height, width = grid
    if height % side or width % side:
        fitting = [f for f in range(1, min(grid) + 1) if height % f == width % f == 0]
        nearest = min(fitting, key=lambda f: abs(f - side))
        raise ConnectorError(
            f"Squares of {side} x {side} patches do not fill a grid of {height} x {width}; "
            f"factor={nearest} is the nearest that does."
        )
    return (height // side) * (width // side)


def in_squares(x: Array, grid: Grid, side: int) -> Array:
    """[B, h * w, ...] -> [B, squares, side * side, ...], all row by row."""
    height, width = grid
    batch, _, *rest = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, *rest)
    return x.swapaxes(2, 3).reshape(batch, -1, side * side, *rest)


def at_least_one(**fields: int | Grid) -> None:
    """Raises ConnectorError if a field of a config, or a side of a grid, is below 1."""
    for name, value in fields.items():
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ConnectorError(f"{name}={value} must be 1 or more.")


def check_heads(heads: int, width: int) -> None:
    """Raises ConnectorError if so many heads do not divide a width."""
    if width % heads:
        raise ConnectorError(f"{heads} heads do not divide a width of {width}: choose a divisor.")


def only_valid(
    features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None
) -> Float[Array, "b n d"]:
    """The features, zeros where they do not count."""
    return features if mask is None else jnp.where(mask[:, :, None], features, 0)


def all_valid(tokens: Float[Array, "b m e"]) -> Bool[Array, "b m"]:
    """The mask of tokens that all count."""
    return jnp.ones(tokens.shape[:2], bool)


def no_extra(extra: int, name: str) -> None:
    """Raises ConnectorError if there are features beside those of the grid."""
    if extra:
        raise ConnectorError(
            f"The connector {name!r} takes the features of a grid only, not {extra} more before "
            "them: set class_token=False."
        )


__all__ = [
    "CONNECTORS",
    "Connector",
    "ConnectorConfig",
    "ConnectorError",
    "Cost",
    "Grid",
    "all_valid",
    "at_least_one",
    "check_heads",
    "cost",
    "in_squares",
    "make_connector",
    "no_extra",
    "only_valid",
    "square_tokens",
    "whole_grid",
]
