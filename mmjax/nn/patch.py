"""Images to patch tokens."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from mmjax.nn.linear import Linear
from mmjax.typing import Array, Float


class PatchEmbed(nnx.Module):
    """A linear map of each patch, as reshape and matmul.

    It equals a convolution whose stride is its kernel size. The weight [D, C, p, p] of such a
    convolution in PyTorch becomes `weight.transpose(2, 3, 1, 0).reshape(p * p * C, D)`.

    Args:
      patch_size: side of a patch in pixels.
      channels: of the image.
      width: of a token.
      partial: what happens to the pixels at the right and at the bottom that fill no patch:
        "error", or "crop" to leave them out, as a convolution without padding does (the
        published SigLIP So400m/14 at 384 pixels needs this).
    """

    def __init__(
        self,
        patch_size: int,
        channels: int,
        width: int,
        *,
        partial: str = "error",
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.channels = channels
        self.partial = partial
        self.projection = Linear(patch_size * patch_size * channels, width, bias=bias, rngs=rngs)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The number of patches (down, across) of an image of this many pixels."""
        return patch_grid(height, width, self.patch_size, self.partial)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        batch, height, width, channels = images.shape
        if channels != self.channels:
            raise ValueError(
                f"Images of shape {images.shape} have {channels} channels where the model has "
                f"{self.channels}; images are [batch, height, width, channels]."
            )
        size = self.patch_size
        rows, columns = self.grid(height, width)
        patches = images[:, : rows * size, : columns * size]
        patches = patches.reshape(batch, rows, size, columns, size, channels)
        patches = jnp.swapaxes(patches, 2, 3)
        return self.projection(patches.reshape(batch, rows * columns, size * size * channels))


PARTIAL_PATCHES = ("error", "crop")


def patch_grid(height: int, width: int, patch_size: int, partial: str) -> tuple[int, int]:
    """The number of patches (down, across) of an image of `height` x `width` pixels.

    Raises:
      ValueError: if the image has no whole patch, or partial ones where those are an error.
    """
    rows, columns = height // patch_size, width // patch_size
    if not rows or not columns:
        raise ValueError(f"An image of {height} x {width} pixels has no patch of {patch_size}.")
    if partial == "error" and (height % patch_size or width % patch_size):
        raise ValueError(
            f"An image of {height} x {width} pixels is not divisible into patches of "
            f"{patch_size}: resize it, e.g. to {rows * patch_size} x {columns * patch_size}, or "
            "set partial_patches='crop' to leave the right and bottom pixels out."
        )
    return rows, columns
