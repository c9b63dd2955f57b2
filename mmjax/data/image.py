"""Decoding and preprocessing of images in PIL and numpy, equal to the HF image processors.

The presets follow the PIL-based processors of transformers 5 (`CLIPImageProcessorPil`,
`SiglipImageProcessorPil`, `ViTImageProcessorPil`): the torchvision-based ones round differently.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmjax.registry import Registry

# A corrupt file may claim any size: 100 megapixels is far above every data set for training.
MAX_PIXELS = 100_000_000
_EXIF_ORIENTATION = 0x0112
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
)


class CorruptImageError(ValueError):
    """The bytes are not an image that can be decoded."""


def open_image(data: bytes | np.ndarray | Image.Image) -> Image.Image:
    """Opens an image without decoding the pixels (`check_loaded` does that).

    Args:
      data: encoded bytes, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4],
      uint8.

    Raises:
      CorruptImageError: not an image, or more than MAX_PIXELS.
      ValueError: an array of another shape or type.
    """
    if isinstance(data, Image.Image):
        return data
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim not in (2, 3):
            raise ValueError(
                f"Image arrays must be uint8 [H, W] or [H, W, C]; got {data.dtype} {data.shape}."
            )
        return Image.fromarray(data[..., 0] if data.ndim == 3 and data.shape[2] == 1 else data)
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes far below ours; the check below decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise CorruptImageError(str(error)) from error
    except UnidentifiedImageError as error:  # its message is the address of the buffer
        raise CorruptImageError(f"{len(data)} bytes of no known image format") from error
    except _DECODING_ERRORS as error:
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise CorruptImageError(
            f"{image.width} x {image.height} pixels: above {MAX_PIXELS} it is taken for a "
            "decompression bomb."
        )
    return image


def check_loaded(image: Image.Image) -> Image.Image:
    """Decodes the pixels and turns the image upright by its EXIF orientation.

    Raises:
      CorruptImageError: truncated or damaged.
    """
    try:
        image.load()
    except _DECODING_ERRORS as error:
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error
    if image.format is not None and is_turned(image):
        image = ImageOps.exif_transpose(image)
    return image


# Where the formats keep an orientation (TIFF files are turned by Pillow itself).
_METADATA = frozenset(["exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"])


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF (or XMP) says that the stored pixels are not upright."""
    if _METADATA.isdisjoint(image.info):
        return False
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) != 1
    except _DECODING_ERRORS:
        return False  # damaged metadata around sound pixels


def decode(data: bytes | np.ndarray | Image.Image) -> Image.Image:
    """`open_image` and `check_loaded`: an upright image in its own mode."""
    return check_loaded(open_image(data))


def flatten(image: Image.Image) -> Image.Image:
    """To RGB, transparency on white, 16-bit and float greyscale scaled to 0..255."""
    if image.mode.startswith("I") or image.mode == "F":
        # PIL (and so transformers) would clip at 255.
        pixels = np.asarray(image, np.float32)
        top = 65535.0 if image.mode.startswith("I;16") or pixels.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(pixels * (255.0 / top), 0, 255).astype(np.uint8))
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """To RGB, transparency on white, as transformers' `convert_to_rgb`, pixel by pixel."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Preset:
    """How a family prepares images.

    `resize`: "squash" to the square, or "crop": short side to the square's side, then centre crop.
    `mean`, `std`: per channel, on levels scaled to [0, 1].
    """

    resize: str
    resample: Image.Resampling
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_HALF = (0.5, 0.5, 0.5)
PRESETS: Registry[Preset] = Registry("image preset")
PRESETS.register("clip")(
    Preset(
        "crop",
        Image.Resampling.BICUBIC,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )
)
PRESETS.register("siglip")(Preset("squash", Image.Resampling.BICUBIC, _HALF, _HALF))
PRESETS.register("vit")(Preset("squash", Image.Resampling.BILINEAR, _HALF, _HALF))
# ImageNet classification as in torchvision and timm: 256/224 is a matter of the crop augmentation.
PRESETS.register("imagenet")(
    Preset("crop", Image.Resampling.BICUBIC, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)


def fit(image: Image.Image, preset: Preset, size: int) -> Image.Image:
    """The RGB image [size, size] the preset makes of any image; unchanged if it already has that
    size."""
    image = flatten(image)
    if image.size == (size, size):
        return image
    return _FITTERS[preset.resize](image, preset.resample, size)


def _squash(image: Image.Image, resample: Image.Resampling, size: int) -> Image.Image:
    return image.resize((size, size), resample)


def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) of the same shape whose short side is `side`; the long one is cut, not
    rounded, as in transformers."""
    short = min(height, width)
    return int(side * height / short), int(side * width / short)


def _crop(image: Image.Image, resample: Image.Resampling, size: int) -> Image.Image:
    height, width = short_side(image.height, image.width, size)
    image = image.resize((width, height), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


_FITTERS = {"squash": _squash, "crop": _crop}


@functools.lru_cache(maxsize=32)
def _affine_rows(preset: Preset, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset), each [width * 3]: one row of interleaved channels, for long loops."""
    std = np.asarray(preset.std, np.float64)
    scale = np.tile(1 / (255 * std), width).astype(np.float32)
    offset = np.tile(-np.asarray(preset.mean, np.float64) / std, width).astype(np.float32)
    return scale, offset


def normalize_into(image: Image.Image, preset: Preset, out: np.ndarray) -> None:
    """Writes (levels / 255 - mean) / std into `out` [size, size, 3] float32; within 1e-6 of HF."""
    size = out.shape[0]
    scale, offset = _affine_rows(preset, size)
    rows = out.reshape(size, size * 3)
    np.multiply(np.asarray(image).reshape(size, size * 3), scale, out=rows)
    np.add(rows, offset, out=rows)


def denormalize(images: np.ndarray, preset_name: str) -> np.ndarray:
    """[..., H, W, 3] float32 as the model sees them -> uint8 levels, for pictures."""
    preset = PRESETS[preset_name]
    levels = (images * np.asarray(preset.std) + np.asarray(preset.mean)) * 255
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def preprocess(data: bytes | np.ndarray | Image.Image, preset_name: str, size: int) -> np.ndarray:
    """One image as evaluation sees it: [size, size, 3] float32."""
    preset = PRESETS[preset_name]
    out = np.empty((size, size, 3), np.float32)
    normalize_into(fit(decode(data), preset, size), preset, out)
    return out
