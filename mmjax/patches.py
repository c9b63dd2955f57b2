"""Images of any shape as rows of patches, which the processor makes and NaFlex models read.

It knows neither JAX nor PyTorch: data code runs in processes without them.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Patches(NamedTuple):
    """A batch of images, each cut into its own number of patches and padded to a common one.

    Attributes:
      patches: [B, N, p * p * channels] float, normalised pixels of a patch row by row, channels
        last.
      shapes: [B, 2] int32: rows and columns of patches of each image; rows * columns <= N.
      mask: [B, N] bool, True at an image's own patches; None where those are the first
        rows * columns.
    """

    patches: Any
    shapes: Any
    mask: Any = None
