"""Images and texts of Janus, as `JanusProcessor` of transformers lays them out."""

from __future__ import annotations

from PIL import Image

# What comes before a text that is to be continued by words, in directories that say so.
PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language.\n\n"
)


def fitted(image: Image.Image, side: int, least: int, resample: Image.Resampling) -> Image.Image:
    """The image with a longer side of `side` pixels, the other in proportion but not below
    `least`."""
    scale = side / max(image.size)
    width, height = (max(round(pixels * scale), least) for pixels in image.size)
    return image.resize((width, height), resample)


def prompted(text: str, begin: str) -> str:
    """The text after `PROMPT`, unless `begin` at its end says that an image is to be drawn."""
    return text if text.endswith(begin) else PROMPT + text
