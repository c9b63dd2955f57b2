"""Named augmentations, configured by their fields, each driven by an explicit numpy Generator.

An augmentation is a frozen dataclass called as `op(image, rng, size) -> image` on PIL images;
`size` is the side in pixels of the square the model will see. All randomness comes from `rng`,
which the loader derives from (seed, global position): results do not depend on threads, workers or
processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mmjax.data.image import check_loaded, flatten
from mmjax.registry import Registry

Rng = np.random.Generator

AUGMENTATIONS: Registry[type] = Registry("augmentation")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Augmentation:
    """Base: `draws_unloaded` ops may be given an image whose pixels are not decoded yet."""

    draws_unloaded: ClassVar[bool] = False

    def __call__(self, image: Image.Image, rng: Rng, size: int) -> Image.Image:
        raise NotImplementedError


@AUGMENTATIONS.register("random_resized_crop")
@dataclass(frozen=True)
class RandomResizedCrop(Augmentation):
    """A crop of random area and aspect, resized to the square (Szegedy et al. 2014; torchvision).

    Ten draws of (area share in `scale`, log-uniform aspect in `ratio`); if none fits, the centre
    crop of the nearest allowed aspect. Large JPEGs are decoded at 1/2, 1/4 or 1/8 by the codec when
    the crop stays at least as large as the output.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resample: str = "bicubic"
    draws_unloaded: ClassVar[bool] = True

    def __post_init__(self):
        _require(
            0 < self.scale[0] <= self.scale[1] <= 1, f"scale {self.scale} must rise within (0, 1]."
        )
        _require(0 < self.ratio[0] <= self.ratio[1], f"ratio {self.ratio} must rise above 0.")
        _require(
            self.resample in FILTERS, f"resample {self.resample!r} is none of {list(FILTERS)}."
        )

    def box(self, width: int, height: int, rng: Rng) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = min(width, max(1, round(height * aspect)))
        h = min(height, max(1, round(width / aspect)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def __call__(self, image, rng, size):
        width, height = image.size
        box = self.box(width, height, rng)
        if image.format == "JPEG" and min(box[2] - box[0], box[3] - box[1]) >= 2 * size:
            # The whole image at the scale that leaves the crop at least `size` wide and high.
            image.draft(
                None,
                (
                    math.ceil(width * size / (box[2] - box[0])),
                    math.ceil(height * size / (box[3] - box[1])),
                ),
            )
            scale_x, scale_y = image.width / width, image.height / height
            box = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)
        image = flatten(check_loaded(image))
        return image.resize((size, size), FILTERS[self.resample], box=box, reducing_gap=2.0)


@AUGMENTATIONS.register("random_crop")
@dataclass(frozen=True)
class RandomCrop(Augmentation):
    """Resizes to the square plus `padding` pixels on each side, then crops the square at random."""

    padding: int = 4

    def __call__(self, image, rng, size):
        _require(self.padding > 0, "random_crop needs padding > 0 pixels.")
        large = size + 2 * self.padding
        image = flatten(image).resize((large, large), Image.Resampling.BICUBIC)
        left, top = (int(x) for x in rng.integers(2 * self.padding + 1, size=2))
        return image.crop((left, top, left + size, top + size))


@AUGMENTATIONS.register("flip")
@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirrors left and right with probability `share`."""

    share: float = 0.5

    def __call__(self, image, rng, size):
        return ImageOps.mirror(image) if rng.random() < self.share else image


@AUGMENTATIONS.register("color_jitter")
@dataclass(frozen=True)
class ColorJitter(Augmentation):
    """Brightness, contrast, saturation by factors in [1 - x, 1 + x], hue by a turn in [-x, x], in
    random order (torchvision's ColorJitter); `share` of the images are changed."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0
    share: float = 1.0

    def __call__(self, image, rng, size):
        image = flatten(image)
        if rng.random() >= self.share:
            return image
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        for index in rng.permutation(4):
            strength = strengths[index]
            if strength == 0:
                continue
            if index == 3:
                turn = round(256 * rng.uniform(-strength, strength))
                hue, saturation, value = image.convert("HSV").split()
                hue = hue.point([(level + turn) % 256 for level in range(256)])
                image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
            else:
                factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
                image = enhancers[index](image).enhance(factor)
        return image


@AUGMENTATIONS.register("random_erasing")
@dataclass(frozen=True)
class RandomErasing(Augmentation):
    """Fills a random rectangle with noise, for `share` of the images (Zhong et al. 2017)."""

    share: float = 0.25
    area: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def __call__(self, image, rng, size):
        image = flatten(image)
        if rng.random() >= self.share:
            return image
        crop = RandomResizedCrop(scale=self.area, ratio=self.ratio)
        left, top, right, bottom = crop.box(*image.size, rng)
        noise = rng.integers(0, 256, size=(bottom - top, right - left, 3), dtype=np.uint8)
        image = image.copy()
        image.paste(Image.fromarray(noise), (left, top))
        return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    grey = (128, 128, 128)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey
    )


# name -> (largest magnitude, whether its sign is drawn, function); torchvision's RandAugment space.
_RAND_OPS: dict[str, tuple[float, bool, Callable[[Image.Image, float], Image.Image]]] = {
    "identity": (0.0, False, lambda im, m: im),
    "shear_x": (0.3, True, lambda im, m: _affine(im, (1, m, 0, 0, 1, 0))),
    "shear_y": (0.3, True, lambda im, m: _affine(im, (1, 0, 0, m, 1, 0))),
    "translate_x": (150 / 331, True, lambda im, m: _affine(im, (1, 0, m * im.width, 0, 1, 0))),
    "translate_y": (150 / 331, True, lambda im, m: _affine(im, (1, 0, 0, 0, 1, m * im.height))),
    "rotate": (
        30.0,
        True,
        lambda im, m: im.rotate(m, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)),
    ),
    "brightness": (0.9, True, lambda im, m: ImageEnhance.Brightness(im).enhance(1 + m)),
    "color": (0.9, True, lambda im, m: ImageEnhance.Color(im).enhance(1 + m)),
    "contrast": (0.9, True, lambda im, m: ImageEnhance.Contrast(im).enhance(1 + m)),
    "sharpness": (0.9, True, lambda im, m: ImageEnhance.Sharpness(im).enhance(1 + m)),
    "posterize": (4.0, False, lambda im, m: ImageOps.posterize(im, 8 - round(m))),
    "solarize": (255.0, False, lambda im, m: ImageOps.solarize(im, int(255 - m))),
    "autocontrast": (0.0, False, lambda im, m: ImageOps.autocontrast(im)),
    "equalize": (0.0, False, lambda im, m: ImageOps.equalize(im)),
}


@AUGMENTATIONS.register("rand_augment")
@dataclass(frozen=True)
class RandAugment(Augmentation):
    """`layers` random operations at strength `magnitude` of 30 (Cubuk et al. 2019)."""

    layers: int = 2
    magnitude: float = 9.0

    def __call__(self, image, rng, size):
        _require(0 <= self.magnitude <= 30, f"magnitude {self.magnitude} must be in [0, 30].")
        image = flatten(image)
        names = list(_RAND_OPS)
        for _ in range(self.layers):
            largest, signed, apply = _RAND_OPS[names[rng.integers(len(names))]]
            magnitude = largest * self.magnitude / 30
            if signed and rng.random() < 0.5:
                magnitude = -magnitude
            image = apply(image, magnitude)
        return image


@AUGMENTATIONS.register("icon_view")
@dataclass(frozen=True)
class IconView(Augmentation):
    """An icon with an alpha channel, seen anew: turned, scaled, shifted, on another ground,
    recoloured.

    Fields: `rotate` degrees to either side; `zoom` range of the icon's size relative to the frame;
    `shift` share of the frame to either side; `ground` darkest level of a random light background;
    `tint` relative change of each colour channel; `brightness` common relative change.
    """

    rotate: float = 15.0
    zoom: tuple[float, float] = (0.8, 1.05)
    shift: float = 0.07
    ground: int = 128
    tint: float = 0.1
    brightness: float = 0.15

    def __call__(self, image, rng, size):
        angle = math.radians(rng.uniform(-self.rotate, self.rotate))
        zoom = rng.uniform(*self.zoom)
        dx, dy = rng.uniform(-self.shift, self.shift, size=2)
        ground = rng.integers(self.ground, 256, size=3)
        gains = (1 + rng.uniform(-self.tint, self.tint, size=3)) * (
            1 + rng.uniform(-self.brightness, self.brightness)
        )
        # Premultiplied alpha, so that the colour under transparent pixels does not bleed in.
        icon = image.convert("RGBA").convert("RGBa")
        # Bilinear sampling aliases where it steps over pixels: average 2 x 2 samples per pixel of a
        # small view, and shrink icons that are larger still.
        factor = 2 if icon.width > 1.5 * size else 1
        side = size * factor
        if icon.width > 2 * side:
            icon = icon.reduce(icon.width // side)
        step = icon.width / (side * zoom)  # pixels of the icon per sample
        cos, sin = math.cos(angle) * step, math.sin(angle) * step
        x, y = side * (0.5 + dx), side * (0.5 + dy)  # where the icon's centre goes
        matrix = (
            cos, sin, icon.width / 2 - cos * x - sin * y,
            -sin, cos, icon.height / 2 + sin * x - cos * y,
        )  # fmt: skip
        icon = icon.transform((side, side), Image.Transform.AFFINE, matrix, FILTERS["bilinear"])
        view = Image.new("RGB", (side, side), tuple(int(level) for level in ground))
        view.paste(icon.convert("RGBA"), mask=icon.getchannel("a"))
        if factor > 1:
            view = view.reduce(factor)
        levels = np.minimum(np.asarray(view) * gains.astype(np.float32), 255)
        return Image.fromarray(levels.astype(np.uint8))
