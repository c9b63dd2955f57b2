"""OpenFlamingo's preprocessing, of the directories of its parts.

Source: `open_flamingo/src/factory.py` of github.com/mlfoundations/open_flamingo.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mmjax.data.load_processor import read_settings
from mmjax.data.sources import DataNotFoundError, existing

IMAGE, END_OF_CHUNK, PADDING = "<image>", "<|endofchunk|>", "<PAD>"


def write_processor(
    language_model: str | os.PathLike, image_encoder: str | os.PathLike, directory: Path
) -> None:
    """Writes what `load_processor` reads as OpenFlamingo's: CLIP's preprocessing of images, and the
    language model's tokenizer with tokens for the end of a chunk, for images and, where it had
    none, for padding. What the model says ends with a chunk.

    Args:
      language_model: directory with a tokenizer.
      image_encoder: directory with the preprocessing of a CLIP.
      directory: to write into.

    Raises:
      DataNotFoundError: a directory that is not there, or lacks what is taken from it.
    """
    from transformers import AutoTokenizer

    there = existing(image_encoder, "The directory of the image encoder")
    _, images = read_settings(there)
    if images is None:
        raise DataNotFoundError(
            f"{there} does not say how images are prepared: add its preprocessor_config.json."
        )
    tokenizer = AutoTokenizer.from_pretrained(existing(language_model, "The language model"))
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_CHUNK, IMAGE]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PADDING})
    tokenizer.save_pretrained(directory)
    kind = {"image_processor_type": "CLIPImageProcessor"}  # where the directory does not say
    name = {"processor_class": "OpenFlamingoProcessor"}
    _write(directory / "preprocessor_config.json", kind | images | name)
    ends = tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
    _write(directory / "generation_config.json", {"eos_token_id": ends})


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
