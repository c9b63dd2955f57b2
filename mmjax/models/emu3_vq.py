"""Emu3's tokenizer: images, or clips of frames, as grids of codes, and back.

Wang et al., "Emu3: Next-Token Prediction is All You Need" (2024): a VQGAN for each frame, with
convolutions over time between its encoder and its codes, which halve the number of frames, and
between codes and decoder. The decoder's norms read the codes (MoVQ; Zheng et al., "MoVQ: Modulating
Quantized Vectors for High-Fidelity Image Generation", 2022). An image is a clip of equal frames.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.models.vqgan import (
    EPS,
    VQGAN,
    Decoder,
    Encoder,
    VQGANConfig,
    VQGANOutput,
    check_sides,
    enlarged,
)
from mmjax.nn.linear import ZEROS, Linear
from mmjax.nn.norm import GroupNorm
from mmjax.quantizers import make_quantizer
from mmjax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emu3VQConfig(VQGANConfig):
    """Everything that decides what the tokenizer computes: what `VQGANConfig` says, and

    Attributes:
      frames: that share a code, a power of two; an image is repeated so often. What enters the
        decoder is `latent` numbers of each place, which are as many as those of a code's vector.
    """

    image_size: int = 720
    frames: int = 4
    name: str = dataclasses.field(default="emu3_vq", init=False)

    def __post_init__(self):
        super().__post_init__()
        if self.frames < 1 or self.frames & (self.frames - 1):
            raise ValueError(f"frames={self.frames} is no power of two.")
        if self.latent != self.quantizer.width:
            raise ValueError(
                f"latent={self.latent}, but vectors of codes have {self.quantizer.width} numbers: "
                "both pass through the same convolutions over time."
            )

    @property
    def halvings(self) -> int:
        """Of the number of frames."""
        return self.frames.bit_length() - 1


class ClipConv(nnx.Module):
    """A convolution over frames and places; a frame sees those before it, and zeros surround all.

    A weight [D, C, t, k, k] of PyTorch becomes `weight.transpose(2, 3, 4, 1, 0)`.

    Args:
      width: number of channels C and D.
      times: size of the kernel in time. Two frames of zeros stand before the first whatever it is.
      size: side of the kernel.
      stride: of every `stride` frames one has a result.
    """

    def __init__(
        self, width: int, *, times: int = 3, size: int = 3, stride: int = 1, rngs: nnx.Rngs
    ):
        init = nnx.initializers.lecun_normal()
        shape = (times, size, size, width, width)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(ZEROS(rngs.params(), (width,), jnp.float32))
        self.stride, self.around = stride, size // 2

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s h w c"]:
        around = (self.around, self.around)
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (self.stride, 1, 1),
            ((2, 0), around, around),
            dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
        )
        return y + self.bias[...].astype(x.dtype)


class BatchNorm(nnx.Module):
    """Mean and variance of each channel are those of the data that it was trained on (Ioffe and
    Szegedy, 2015), and stay.

    `batches`, of how many batches they are, is a number that checkpoints have, and nothing reads.
    """

    def __init__(self, width: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.variance = nnx.Param(jnp.ones((width,), jnp.float32))
        self.batches = nnx.Param(jnp.zeros((), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        mean, variance = jax.lax.stop_gradient((self.mean[...], self.variance[...]))
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class SpatialNorm(nnx.Module):
    """A group norm whose results are scaled and shifted by linear maps of the codes' vectors."""

    def __init__(self, width: int, code_width: int, *, groups: int, rngs: nnx.Rngs):
        self.norm = GroupNorm(width, groups=groups, eps=EPS)
        self.scale = Linear(code_width, width, rngs=rngs)
        self.shift = Linear(code_width, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], codes: Float[Array, "b i j e"]
    ) -> Float[Array, "b h w c"]:
        times = x.shape[1] // codes.shape[1]
        scale, shift = (enlarged(part(codes), times) for part in (self.scale, self.shift))
        return self.norm(x) * scale + shift


class ClipBlock(nnx.Module):
    """Two convolutions, each after a norm and SiLU, around which the input goes."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.first_norm = BatchNorm(width)
        self.first = ClipConv(width, rngs=rngs)
        self.second_norm = BatchNorm(width)
        self.second = ClipConv(width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        y = self.first(jax.nn.silu(self.first_norm(x)))
        y = self.second(jax.nn.silu(self.second_norm(y)))
        return x + y


class ClipEncoder(nnx.Module):
    """images [B, H, W, C] or clips [B, T, H, W, C] -> [B, T / frames, H / factor, W / factor, E];
    of images T / frames is 1."""

    def __init__(self, config: Emu3VQConfig, *, rngs: nnx.Rngs):
        width, self.frames = config.latent, config.frames
        self.frame = Encoder(config, rngs=rngs)
        self.halve = nnx.List(
            ClipConv(width, times=4, stride=2, rngs=rngs) for _ in range(config.halvings)
        )
        self.blocks = nnx.List(ClipBlock(width, rngs=rngs) for _ in range(config.depth))
        self.last = ClipConv(width, size=1, rngs=rngs)

    def __call__(self, x: Float[Array, "b *t h w c"]) -> Float[Array, "b s i j e"]:
        y = self.frame(x.reshape(-1, *x.shape[-3:]))
        y = y.reshape(*x.shape[:-3], *y.shape[1:])
        if x.ndim == 4:
            y = jnp.repeat(y[:, None], self.frames, axis=1)
        for halve in self.halve:
            y = jax.nn.silu(halve(y))
        for block in self.blocks:
            y = block(y)
        return self.last(y)


class ClipDecoder(nnx.Module):
    """codes' vectors [B, h, w, E] or [B, T, h, w, E] -> images, or clips of T * frames."""

    def __init__(self, config: Emu3VQConfig, *, rngs: nnx.Rngs):
        width = config.latent
        self.first = ClipConv(width, size=1, rngs=rngs)
        self.blocks = nnx.List(ClipBlock(width, rngs=rngs) for _ in range(config.depth))
        self.double = nnx.List(ClipConv(width, rngs=rngs) for _ in range(config.halvings))
        self.frame = Decoder(
            config,
            norm=lambda outputs: SpatialNorm(outputs, width, groups=config.groups, rngs=rngs),
            rngs=rngs,
        )

    def __call__(self, codes: Float[Array, "b *t i j e"]) -> Float[Array, "b *s h w c"]:
        clips = codes if codes.ndim == 5 else codes[:, None]
        # What is decoded, and what its norms read, go through time alike.
        y = jnp.concatenate([self.first(clips), clips])
        for block in self.blocks:
            y = block(y)
        for double in self.double:
            y = jax.nn.silu(double(y.repeat(2, axis=1)))
        # Of the equal frames of an image the first is taken.
        y = y if codes.ndim == 5 else y[:, 0]
        decoded, read = jnp.split(y, 2)
        frames = self.frame(*(part.reshape(-1, *part.shape[-3:]) for part in (decoded, read)))
        return frames.reshape(*decoded.shape[:-3], *frames.shape[1:])


class Emu3VQ(VQGAN):
    """images [B, H, W, C] or clips [B, T, H, W, C] -> `VQGANOutput`, whose images are clips where
    those were given. H and W are multiples of `config.factor`, T of `config.frames`."""

    def __init__(self, config: Emu3VQConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = ClipEncoder(config, rngs=rngs)
        self.quantizer = make_quantizer(config.quantizer, rngs=rngs)
        self.decoder = ClipDecoder(config, rngs=rngs) if config.decodes else None

    def __call__(self, images: Float[Array, "b *t h w c"]) -> VQGANOutput:
        found = self.quantizer(self._vectors(images))
        return VQGANOutput(self._images(found.vectors), *found[1:])

    def encode(self, images: Float[Array, "b *t h w c"]) -> Int[Array, "b *s i j"]:
        """The codes of images [B, H / factor, W / factor], or of clips [B, T / frames, ...].

        Raises:
          ValueError: their sides are no multiples of `config.factor`, or the number of frames is
            none of `config.frames`.
        """
        return self.quantizer.codes(self._vectors(images))

    def decode(self, codes: Int[Array, "b *s i j"]) -> Float[Array, "b *t h w c"]:
        """The images, or clips, of codes.

        Raises:
          ValueError: there is no decoder.
        """
        return self._images(self.quantizer.vectors(codes))

    def _vectors(self, images: Array) -> Array:
        check_sides(images.shape[-3:-1], self.config.factor)
        frames = self.config.frames
        if images.ndim == 5 and images.shape[1] % frames:
            raise ValueError(
                f"Clips of {images.shape[1]} frames do not make whole codes: give them a multiple "
                f"of {frames}."
            )
        vectors = self.encoder(images.astype(self.config.dtype))
        return vectors if images.ndim == 5 else vectors[:, 0]

    def _images(self, vectors: Array) -> Array:
        if self.decoder is None:
            raise ValueError("decodes=False: this tokenizer makes codes, and no images of them.")
        return self.decoder(vectors.astype(self.config.dtype))
