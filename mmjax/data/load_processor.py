"""A Hugging Face directory's preprocessing: images and text to what our models are called with.

    processor = load_processor(directory)
    batch = processor(images=["cat.png", image], text=["a cat", "a dog"])
    logits = model(**batch)          # images, tokens, mask

The numbers equal those of transformers' PIL-based processors; neither PyTorch nor torchvision is
needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.image_processor import ImageProcessor, recipe_name
from mmjax.data.processor import Processor, hf_config
from mmjax.data.sources import DataNotFoundError, existing
from mmjax.data.tokenizer import HF_TOKENIZER_FILES, open_hf_tokenizer
from mmjax.data.vlm_families import class_of
from mmjax.data.vlm_processor import Facts, VLMProcessor

# Where a directory names no class, its model decides, as in transformers.
_CLASS_OF_MODEL = {
    "vit": "ViTImageProcessor",
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "altclip": "CLIPImageProcessor",
    "metaclip_2": "CLIPImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "siglip2_vision_model": "Siglip2ImageProcessor",
    "llava": "CLIPImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "paligemma": "SiglipImageProcessor",
    "idefics": "IdeficsImageProcessor",
    "mllama": "MllamaImageProcessor",
    "chameleon": "ChameleonImageProcessor",
    "emu3": "Emu3ImageProcessor",
}


def load_processor(
    directory: str | os.PathLike, *, config: Mapping[str, Any] | None = None
) -> Processor:
    """The preprocessing that belongs to the model in a Hugging Face directory.

    Reads `processor_config.json` or `preprocessor_config.json` for images, and the tokenizer's
    files for text; a directory may have one of them or both. Of a vision-language model it is a
    `VLMProcessor`, which puts images into texts. Every option of the image processor is
    obeyed or refused. What differs from transformers on purpose:

    - Siglip2Processor ignores patch_size, max_num_patches of its directory; they count here.
    - A text that is too long is an error unless `truncation=True`, for SigLIP 2 as well.
    - Text of SigLIP models is lower-cased even where their tokenizer forgets to (the
      fixed-resolution SigLIP 2 checkpoints).
    - Emu3Processor puts the begin token before texts even with add_special_tokens=False; here it
      does not.

    Args:
      directory: see above.
      config: the model's, where the directory has no `config.json`.

    Raises:
      DataNotFoundError: no such directory, or nothing of a processor in it.
      UnknownNameError: an image processor class, or an option, that is not known; names the known.
      ValueError: files that cannot be read, or a tokenizer that does not fit the model's
        vocabulary.
    """
    path = existing(directory, "The model directory")
    if not path.is_dir():
        raise DataNotFoundError(f"{path} is a file; a model directory is expected.")
    if config is None:
        config = _read_json(path / "config.json") or {}
    processor, images = read_settings(path)
    has_text = any((path / name).exists() for name in HF_TOKENIZER_FILES)
    if images is None and not has_text:
        raise DataNotFoundError(
            f"{path} holds nothing to process images or text with: no processor_config.json, no "
            f"preprocessor_config.json, none of {', '.join(HF_TOKENIZER_FILES)}."
        )
    tokenizer = open_hf_tokenizer(path) if has_text else None
    if images is None:
        return Processor(path, None, tokenizer, config)
    kind = recipe_name(_class_of(images, config, path))
    if tokenizer is not None:
        declared = _read_json(path / "tokenizer_config.json") or {}
        name = class_of([processor, images, declared], config)
        if name is not None:
            facts = Facts(processor, images, kind, hf_config(config), tokenizer)
            template = (_read_json(path / "chat_template.json") or {}).get("chat_template")
            return VLMProcessor(path, name, facts, config, template)
    return Processor(path, ImageProcessor(kind, images), tokenizer, config)


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a directory's `processor_config.json` says, and the options of its image processor.

    Raises:
      ProcessorConfigError: files that are no JSON objects.
    """
    processor = _read_json(path / "processor_config.json") or {}
    # Transformers 5 writes everything into one file; older versions, and image processors without a
    # tokenizer, have preprocessor_config.json.
    images = processor.get("image_processor")
    images = _read_json(path / "preprocessor_config.json") if images is None else images
    return processor, images


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, of UTF-8
        raise ProcessorConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ProcessorConfigError(f"{path} holds no JSON object.")
    return content


def _class_of(images: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> str:
    declared = images.get("image_processor_type") or images.get("feature_extractor_type")
    model = config.get("model_type")
    if declared is None and model not in _CLASS_OF_MODEL:
        raise ProcessorConfigError(
            f"{path} does not say what prepares its images: there is no image_processor_type, and "
            f"none is known for model_type {model!r}."
        )
    return declared or _CLASS_OF_MODEL[model]
