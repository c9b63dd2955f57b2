"""One comparison for the processors of all vision-language models."""

from __future__ import annotations

from typing import Any

import hf
import numpy as np
from PIL import Image

from mmjax.data.load_processor import load_processor

transformers = hf.transformers()

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = ["a", "red", "dog", "cat", "user", "bot", ":", ";", "!", "\n"]
# Of a chat in parts; an image's place is said where it stands.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }} {% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth random colours: resampling differences would show."""
    levels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def tokenizer(*special: str, **options: Any):
    """Words of a small vocabulary, and "<s>" before each text."""
    import tokenizers

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *special])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        additional_special_tokens=list(special),
        **options,
    )


def save(directory, processor, config=None):
    """A directory as transformers writes it, without weights."""
    processor.save_pretrained(directory)
    if config is not None:
        config.save_pretrained(directory)
    return directory


def check(
    directory,
    theirs: Any,
    images: list[list[Image.Image]],
    texts: list[str],
    by_row: bool = False,
) -> dict:
    """Our batch, which is that of transformers.

    Args:
      theirs: the processor of transformers that is saved in the directory.
      images: of each text.
      by_row: whether its pixels are by row, and not by image.
    """
    flat = [image for group in images for image in group]
    given = {"text": texts, "padding": True, "padding_side": "left", "return_tensors": "np"}
    wanted = theirs(images=images if by_row else flat, **given)
    processor = load_processor(directory)
    batch = processor(images=flat, text=texts)
    for name, value in processor(images=images, text=texts).items():
        np.testing.assert_array_equal(value, batch[name], err_msg=name)
    assert [value.dtype for value in batch.values()] == [np.int32, bool, np.float32, np.int32]
    np.testing.assert_array_equal(batch["tokens"], wanted["input_ids"])
    np.testing.assert_array_equal(batch["mask"], wanted["attention_mask"].astype(bool))
    np.testing.assert_array_equal(batch["place"] != -1, batch["tokens"] == processor.token_id)
    if by_row:
        expected = wanted["pixel_values"].transpose(0, 1, 3, 4, 2)
        np.testing.assert_array_equal(batch["images"], expected)
        return batch
    pixels = iter(wanted["pixel_values"])
    for row, group in zip(batch["images"], images, strict=True):
        start = 0
        for image in group:
            count = processor.sight.plan(*image.size).pictures
            expected = next(pixels)
            expected = expected.reshape(-1, *expected.shape[-3:])[:count].transpose(0, 2, 3, 1)
            np.testing.assert_array_equal(row[start : start + count], expected)
            start += count
        assert not row[start:].any()
    return batch
