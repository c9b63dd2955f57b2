"""The preprocessing of a run of our own trainer, called like that of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.data.image import preprocess
from mmjax.data.image_processor import ImageInput
from mmjax.data.spec import parse
from mmjax.data.tokenizer import Tokenizer


class RunProcessor:
    """Images and texts as evaluation saw them in the run.

    Args:
      train: `config.data.train` of the run.
      tokenizer: of the run.

    Raises:
      ValueError: a run without images or without text.
    """

    def __init__(self, train: Mapping[str, Any], tokenizer: Tokenizer | None):
        spec = parse(train)
        if spec.image is None or spec.text is None or tokenizer is None:
            raise ValueError("The run was not trained on images with text.")
        self._image = spec.image
        self.tokenizer = tokenizer
        self.max_length: int = spec.text.max_len

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        truncation: bool = False,
    ) -> dict[str, np.ndarray]:
        """`images` [B, H, W, 3] float32; `tokens` [B, max_length] int32 and `mask` bool.

        Args:
          truncation: cut texts that are too long, which are otherwise an error.

        Raises:
          CorruptImageError: cannot be decoded.
          ValueError: a text that is too long.
        """
        batch: dict[str, np.ndarray] = {}
        if images is not None:
            several = images if isinstance(images, list | tuple) else [images]
            preset, size = self._image.preset, self._image.size
            batch["images"] = np.stack([preprocess(image, preset, size) for image in several])
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            encoded = self.tokenizer.encode(texts, self.max_length)
            if encoded.truncated and not truncation:
                raise ValueError(
                    f"{encoded.truncated} of {len(texts)} texts are longer than the "
                    f"{self.max_length} tokens that the model takes; the longest: "
                    f"{max(texts, key=len)[:80]!r}."
                )
            batch["tokens"], batch["mask"] = encoded.ids, encoded.mask
        return batch
