"""Prompt templates and class names: kept here, for a zero-shot figure means nothing without them.

Templates are those of OpenAI's CLIP repository (notebooks/Prompt_Engineering_for_ImageNet.ipynb,
MIT licence): the 80 of the paper's ImageNet figures, and the 7 that come close to them. ImageNet's
class names stand in `imagenet.py`, from the same notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmjax.evaluate.imagenet import IMAGENET
from mmjax.registry import UnknownNameError, nearest

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "openai_7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "openai_80": (
        "a bad photo of a {}.",
        "a photo of many {}.",
        "a sculpture of a {}.",
        "a photo of the hard to see {}.",
        "a low resolution photo of the {}.",
        "a rendering of a {}.",
        "graffiti of a {}.",
        "a bad photo of the {}.",
        "a cropped photo of the {}.",
        "a tattoo of a {}.",
        "the embroidered {}.",
        "a photo of a hard to see {}.",
        "a bright photo of a {}.",
        "a photo of a clean {}.",
        "a photo of a dirty {}.",
        "a dark photo of the {}.",
        "a drawing of a {}.",
        "a photo of my {}.",
        "the plastic {}.",
        "a photo of the cool {}.",
        "a close-up photo of a {}.",
        "a black and white photo of the {}.",
        "a painting of the {}.",
        "a painting of a {}.",
        "a pixelated photo of the {}.",
        "a sculpture of the {}.",
        "a bright photo of the {}.",
        "a cropped photo of a {}.",
        "a plastic {}.",
        "a photo of the dirty {}.",
        "a jpeg corrupted photo of a {}.",
        "a blurry photo of the {}.",
        "a photo of the {}.",
        "a good photo of the {}.",
        "a rendering of the {}.",
        "a {} in a video game.",
        "a photo of one {}.",
        "a doodle of a {}.",
        "a close-up photo of the {}.",
        "a photo of a {}.",
        "the origami {}.",
        "the {} in a video game.",
        "a sketch of a {}.",
        "a doodle of the {}.",
        "a origami {}.",
        "a low resolution photo of a {}.",
        "the toy {}.",
        "a rendition of the {}.",
        "a photo of the clean {}.",
        "a photo of a large {}.",
        "a rendition of a {}.",
        "a photo of a nice {}.",
        "a photo of a weird {}.",
        "a blurry photo of a {}.",
        "a cartoon {}.",
        "art of a {}.",
        "a sketch of the {}.",
        "a embroidered {}.",
        "a pixelated photo of a {}.",
        "itap of the {}.",
        "a jpeg corrupted photo of the {}.",
        "a good photo of a {}.",
        "a plushie {}.",
        "a photo of the nice {}.",
        "a photo of the small {}.",
        "a photo of the weird {}.",
        "the cartoon {}.",
        "art of the {}.",
        "a drawing of the {}.",
        "a photo of the large {}.",
        "a black and white photo of a {}.",
        "the plushie {}.",
        "a dark photo of a {}.",
        "itap of a {}.",
        "graffiti of the {}.",
        "a toy {}.",
        "itap of my {}.",
        "a photo of a cool {}.",
        "a photo of a small {}.",
        "a tattoo of the {}.",
    ),
}

CLASS_NAMES: Mapping[str, tuple[str, ...]] = {
    "imagenet": IMAGENET,
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    "digits": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
}


def templates(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Prompt templates, each with one `{}` for the class name.

    Args:
      spec: a name in TEMPLATES, or the templates themselves.

    Raises:
      UnknownNameError: on an unknown name.
      ValueError: if a template lacks its `{}`, or there is none.
    """
    chosen = _lookup(spec, TEMPLATES, "prompt templates")
    bad = [template for template in chosen if template.count("{}") != 1]
    if bad or not chosen:
        raise ValueError(f"Prompt templates need exactly one {{}} for the class name; got {bad}.")
    return chosen


def class_names(spec: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the classes 0, 1, 2, ...

    Args:
      spec: a name in CLASS_NAMES, the names themselves, or "file:PATH" with one name a line.

    Raises:
      UnknownNameError: on an unknown name.
      ValueError: if the file is missing, or there is no name.
    """
    if isinstance(spec, str) and spec.startswith("file:"):
        path = Path(spec.removeprefix("file:"))
        if not path.is_file():
            raise ValueError(f"There is no file of class names {str(path)!r}.")
        chosen = tuple(filter(None, map(str.strip, path.read_text("utf-8").splitlines())))
    else:
        chosen = _lookup(spec, CLASS_NAMES, "class names")
    if not chosen:
        raise ValueError("Zero-shot classification needs at least one class name.")
    return chosen


def _lookup(
    spec: str | Sequence[str], known: Mapping[str, tuple[str, ...]], what: str
) -> tuple[str, ...]:
    if not isinstance(spec, str):
        return tuple(spec)
    if spec not in known:
        raise UnknownNameError(f"There are no {what} {spec!r}; {nearest(spec, known)}")
    return known[spec]
