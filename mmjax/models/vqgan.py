"""VQGAN: images as grids of codes, and back.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021): a convolutional
encoder that halves the grid level by level, a quantiser, and a decoder that doubles it. The image
tokenizers of Make-A-Scene, Chameleon, LlamaGen and Janus are of this kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.nn.attention import attend
from mmjax.nn.conv import Conv
from mmjax.nn.linear import Linear
from mmjax.nn.norm import GroupNorm
from mmjax.quantizers import QuantizerConfig, Statistics, make_quantizer
from mmjax.typing import Array, Float, Int, Key

EPS = 1e-6
# Makes the norm of so many channels, which is called with a grid and with whatever else the blocks
# are given.
Norm = Callable[[int], nnx.Module]


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Everything that decides what a VQGAN computes.

    Attributes:
      image_size: side of the images in pixels. Others have codes too, if their sides are multiples
        of `factor`.
      quantizer: what makes codes of vectors.
      width: channels at full resolution.
      multipliers: of them, level by level; each level but the last halves the grid.
      depth: residual blocks of a level; the decoder has one more.
      latent: channels between encoder and quantiser, and between quantiser and decoder.
      attends: levels whose blocks are followed by attention over the grid.
      middle_attends: whether there is attention at the middle, between encoder and decoder.
      channels: of images.
      groups: of the group norms.
      heads: of attention.
      patch: side in pixels of what is one place of the largest grid, whose channels are those of
        its pixels. In the original 1; 2 spares the grid that costs most.
      decodes: whether there is a decoder; without it codes can be made, and no images.
      dtype: of the computation.
    """

    image_size: int
    quantizer: QuantizerConfig
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    depth: int = 2
    latent: int = 256
    attends: tuple[int, ...] = ()
    middle_attends: bool = True
    channels: int = 3
    groups: int = 32
    heads: int = 1
    patch: int = 1
    decodes: bool = True
    dtype: str = "float32"
    name: str = dataclasses.field(default="vqgan", init=False)

    def __post_init__(self):
        check_dtype(self.dtype)
        if not self.multipliers or self.depth < 1:
            raise ValueError(
                f"multipliers={self.multipliers}, depth={self.depth}: a VQGAN needs a level, and "
                "each level a block."
            )
        if self.patch < 1:
            raise ValueError(f"patch={self.patch} must be 1 or more.")
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size={self.image_size} is no multiple of {self.factor}: with patch="
                f"{self.patch} each of {self.levels} levels but the last halves the grid."
            )
        wrong = [level for level in self.attends if not 0 <= level < self.levels]
        if wrong:
            raise ValueError(f"attends={self.attends}: the levels are 0 to {self.levels - 1}.")
        narrow = [width for width in self.widths if width % self.groups]
        if narrow:
            raise ValueError(
                f"width={self.width} with multipliers={self.multipliers} makes levels of "
                f"{narrow[0]} channels, which are not {self.groups} groups."
            )
        attending = [self.widths[level] for level in self.attends]
        attending += [self.widths[-1]] if self.middle_attends else []
        uneven = [width for width in attending if width % self.heads]
        if uneven:
            raise ValueError(f"heads={self.heads} do not divide {uneven[0]} channels.")

    @property
    def levels(self) -> int:
        return len(self.multipliers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * times for times in self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels along the side of what becomes one code."""
        return self.patch * 2 ** (self.levels - 1)

    @property
    def inputs(self) -> int:
        """Channels of a place of the largest grid."""
        return self.channels * self.patch**2


class VQGANOutput(NamedTuple):
    """
    Attributes:
      images: [B, H, W, C], what the decoder makes of the codes.
      codes: [B, H / factor, W / factor, *quantizer.shape] int32.
      loss: that of the quantizer; see `Quantized`.
      statistics: likewise.
    """

    images: Array
    codes: Array
    loss: Array
    statistics: Statistics | tuple[()] = ()


class ResidualBlock(nnx.Module):
    """Two convolutions, each after a norm and SiLU, around which the input goes."""

    def __init__(self, inputs: int, outputs: int, norm: Norm, *, rngs: nnx.Rngs):
        self.first_norm = norm(inputs)
        self.first = Conv(inputs, outputs, rngs=rngs)
        self.second_norm = norm(outputs)
        self.second = Conv(outputs, outputs, rngs=rngs)
        self.shortcut = None if inputs == outputs else Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], *given: Array) -> Float[Array, "b h w d"]:
        y = self.first(jax.nn.silu(self.first_norm(x, *given)))
        y = self.second(jax.nn.silu(self.second_norm(y, *given)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class GridAttention(nnx.Module):
    """Attention over all places of the grid, added to the input."""

    def __init__(self, width: int, heads: int, norm: Norm, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = norm(width)
        self.query = Linear(width, width, rngs=rngs)
        self.key = Linear(width, width, rngs=rngs)
        self.value = Linear(width, width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], *given: Array) -> Float[Array, "b h w c"]:
        y = self.norm(x, *given).reshape(x.shape[0], -1, x.shape[-1])
        heads = (*y.shape[:2], self.heads, -1)
        y = attend(*(part(y).reshape(heads) for part in (self.query, self.key, self.value)))
        return x + self.out(y.reshape(x.shape))


class Level(nnx.Module):
    """Blocks of one width, perhaps with attention, and what makes the next grid of their result.

    Args:
      count: of the blocks.
      norm: see `Norm`.
      attends: whether attention follows each of them.
      sample: a convolution, where the grid changes after the level.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        count: int,
        config: VQGANConfig,
        norm: Norm,
        *,
        attends: bool,
        sample: Conv | None,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            ResidualBlock(width if number else inputs, width, norm, rngs=rngs)
            for number in range(count)
        )
        self.attentions = nnx.List(
            GridAttention(width, config.heads, norm, rngs=rngs)
            for _ in range(count if attends else 0)
        )
        self.sample = sample

    def __call__(self, x: Float[Array, "b h w c"], *given: Array) -> Float[Array, "b h w d"]:
        """Without `sample`."""
        for number, block in enumerate(self.blocks):
            x = block(x, *given)
            if len(self.attentions):
                x = self.attentions[number](x, *given)
        return x


class Middle(nnx.Module):
    """Two blocks on the smallest grid, with attention between them."""

    def __init__(self, config: VQGANConfig, norm: Norm, *, rngs: nnx.Rngs):
        width = config.widths[-1]
        self.first = ResidualBlock(width, width, norm, rngs=rngs)
        self.attention = (
            GridAttention(width, config.heads, norm, rngs=rngs) if config.middle_attends else None
        )
        self.second = ResidualBlock(width, width, norm, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], *given: Array) -> Float[Array, "b h w c"]:
        x = self.first(x, *given)
        x = x if self.attention is None else self.attention(x, *given)
        return self.second(x, *given)


def group_norms(config: VQGANConfig) -> Norm:
    return lambda width: GroupNorm(width, groups=config.groups, eps=EPS)


class Encoder(nnx.Module):
    """images [B, H, W, C] -> [B, H / factor, W / factor, latent]"""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        widths, norm = config.widths, group_norms(config)
        self.patch = config.patch
        self.first = Conv(config.inputs, config.width, rngs=rngs)
        self.levels = nnx.List(
            Level(
                inputs,
                width,
                config.depth,
                config,
                norm,
                attends=level in config.attends,
                # Zeros follow the last row and column only.
                sample=None
                if level == config.levels - 1
                else Conv(width, width, stride=2, padding=(0, 1), rngs=rngs),
                rngs=rngs,
            )
            for level, (inputs, width) in enumerate(
                zip((config.width, *widths), widths, strict=False)
            )
        )
        self.middle = Middle(config, norm, rngs=rngs)
        self.norm = norm(widths[-1])
        self.last = Conv(widths[-1], config.latent, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        x = self.first(gathered(x, self.patch))
        for level in self.levels:
            x = level(x)
            x = x if level.sample is None else level.sample(x)
        return self.last(jax.nn.silu(self.norm(self.middle(x))))


class Decoder(nnx.Module):
    """[B, h, w, latent] -> images [B, h * factor, w * factor, C]. Its levels begin with the
    smallest grid.

    Args:
      norm: see `Norm`; group norms if None.
    """

    def __init__(self, config: VQGANConfig, *, norm: Norm | None = None, rngs: nnx.Rngs):
        widths = config.widths[::-1]
        norm = group_norms(config) if norm is None else norm
        self.patch = config.patch
        self.first = Conv(config.latent, widths[0], rngs=rngs)
        self.middle = Middle(config, norm, rngs=rngs)
        self.levels = nnx.List(
            Level(
                inputs,
                width,
                config.depth + 1,
                config,
                norm,
                attends=config.levels - 1 - number in config.attends,
                sample=None if number == config.levels - 1 else Conv(width, width, rngs=rngs),
                rngs=rngs,
            )
            for number, (inputs, width) in enumerate(
                zip((widths[0], *widths), widths, strict=False)
            )
        )
        self.norm = norm(widths[-1])
        self.last = Conv(widths[-1], config.inputs, rngs=rngs)

    def __call__(self, x: Float[Array, "b i j d"], *given: Array) -> Float[Array, "b h w c"]:
        x = self.middle(self.first(x), *given)
        for level in self.levels:
            x = level(x, *given)
            if level.sample is not None:
                x = level.sample(enlarged(x, 2))
        return spread(self.last(jax.nn.silu(self.norm(x, *given))), self.patch)


def enlarged(x: Float[Array, "b h w c"], times: int) -> Float[Array, "b i j c"]:
    """Each place of a grid becomes `times` x `times` (the nearest neighbour)."""
    return x.repeat(times, axis=1).repeat(times, axis=2)


def gathered(images: Float[Array, "b h w c"], patch: int) -> Float[Array, "b i j d"]:
    """Squares of `patch` x `patch` pixels become places, [B, H / patch, W / patch, patch^2 * C]."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, height // patch, width // patch, -1)


def spread(x: Float[Array, "b i j d"], patch: int) -> Float[Array, "b h w c"]:
    """The inverse of `gathered`."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height, width, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(batch, height * patch, width * patch, -1)


class VQGAN(nnx.Module):
    """images [B, H, W, C] -> `VQGANOutput`; H and W are multiples of `config.factor`."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.before = Linear(config.latent, config.quantizer.width, rngs=rngs)
        self.quantizer = make_quantizer(config.quantizer, rngs=rngs)
        self.after = Linear(config.quantizer.width, config.latent, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs) if config.decodes else None

    def __call__(self, images: Float[Array, "b h w c"]) -> VQGANOutput:
        found = self.quantizer(self._vectors(images))
        return VQGANOutput(self._images(found.vectors), *found[1:])

    @property
    def learnt(self) -> tuple[str, ...]:
        """Paths of the parameters that `update` changes; see `Quantizer`."""
        return tuple(f"quantizer/{path}" for path in self.quantizer.learnt)

    def update(self, statistics: Statistics | tuple[()], rng: Key) -> dict[str, Array]:
        """Their new values, from the statistics of a whole batch."""
        values = self.quantizer.update(statistics, rng)
        return {f"quantizer/{path}": value for path, value in values.items()}

    def encode(self, images: Float[Array, "b h w c"]) -> Int[Array, "b i j *c"]:
        """The codes of images.

        Raises:
          ValueError: their sides are no multiples of `config.factor`.
        """
        return self.quantizer.codes(self._vectors(images))

    def decode(self, codes: Int[Array, "b i j *c"]) -> Float[Array, "b h w c"]:
        """The images of codes.

        Raises:
          ValueError: there is no decoder.
        """
        return self._images(self.quantizer.vectors(codes))

    def _vectors(self, images: Array) -> Array:
        check_sides(images.shape[1:3], self.config.factor)
        return self.before(self.encoder(images.astype(self.config.dtype)))

    def _images(self, vectors: Array) -> Array:
        if self.decoder is None:
            raise ValueError("decodes=False: this tokenizer makes codes, and no images of them.")
        return self.decoder(self.after(vectors.astype(self.config.dtype)))


def check_sides(sides: tuple[int, int], factor: int) -> None:
    """Raises ValueError if images of this (height, width) do not make whole codes."""
    height, width = sides
    if height % factor or width % factor:
        raise ValueError(
            f"Images of {height} x {width} pixels do not make whole codes: their sides must be "
            f"multiples of {factor}."
        )
