"""Named sizes of transformers."""

from __future__ import annotations

from mmjax.registry import UnknownNameError, nearest

_FIELDS = ("width", "depth", "heads", "mlp_width")

# Table 2 of Zhai et al., Scaling Vision Transformers (2021), as in big_vision's decode_variant;
# So400m is from Alabdulmohsin et al. (2023). "mu" is for tests, "Xxs" and "Xs" are for two
# CPU cores.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 2, 128),
    "Xxs": (128, 4, 4, 512),
    "Xs": (192, 6, 3, 768),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}


def vit_size(name: str) -> dict[str, int]:
    """Fields of a `ViTConfig` for a name such as "S/16": a size, and a patch's side in pixels.

    Raises:
      ValueError: if the size is unknown or the patch is no positive number.
    """
    size, _, patch = name.partition("/")
    if not patch.isdecimal() or int(patch) == 0:
        raise ValueError(f"{name!r} is not of the form size/patch, such as 'S/16'.")
    return {**text_size(size), "patch_size": int(patch)}


def text_size(name: str) -> dict[str, int]:
    """Fields of a `TextConfig` for a size such as "S".

    Raises:
      ValueError: if the size is unknown.
    """
    if name not in SIZES:
        raise UnknownNameError(f"There is no size {name!r}; {nearest(name, SIZES)}")
    return dict(zip(_FIELDS, SIZES[name], strict=True))
