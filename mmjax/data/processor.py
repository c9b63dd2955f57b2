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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.image_processor import ImageInput, ImageProcessor, recipe_name
from mmjax.data.sources import DataNotFoundError, existing
from mmjax.data.tokenizer import HF_TOKENIZER_FILES, open_hf_tokenizer
from mmjax.registry import UnknownNameError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
# Text towers that learnt at one length, padding included (SigLIP attends to it; CLIP's were always
# that long): their text is padded to the whole length.
_FULL_LENGTH = ("clip", "siglip", "metaclip_2")
# Trained on lower-cased text only; not every tokenizer published with them does it.
_LOWER_CASED = ("siglip",)
# Models that continue their text: padding stands before it.
_CONTINUING = ("ForCausalLM", "LMHeadModel")
_NO_LIMIT = 10**6  # transformers writes 1e30 where a tokenizer knows no length


class Processor:
    """Called like a processor of transformers; gives numpy arrays. See `load_processor`.

    Attributes:
      images: the `ImageProcessor`, or None.
      tokenizer: the tokenizer of transformers, or None.
      max_length: how many tokens a text may have; None: not known.
    """

    def __init__(
        self,
        directory: Path,
        images: ImageProcessor | None,
        tokenizer: Any | None,
        config: Mapping[str, Any],
    ):
        self._directory = directory
        self.images = images
        self.tokenizer = tokenizer
        model = config.get("model_type", "")
        self._lower_case = model.startswith(_LOWER_CASED)
        self._vocab_size: int | None = None
        self._padding: str = "longest"
        self._side: str | None = None
        self.max_length: int | None = None
        if tokenizer is None:
            return
        facts = _text_facts(config)
        self._vocab_size = facts.get("vocab_size")
        if self._vocab_size is not None:
            # IDEFICS has tokens of its own beside those of its language model.
            self._vocab_size += facts.get("additional_vocab_size", 0)
            check_vocabulary(tokenizer, self._vocab_size)
        if tokenizer.model_max_length < _NO_LIMIT:
            self.max_length = tokenizer.model_max_length
        if model.startswith(_FULL_LENGTH):
            self._padding, self.max_length = "max_length", facts["max_position_embeddings"]
        if any(name.endswith(_CONTINUING) for name in config.get("architectures") or ()):
            self._side = "left"

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        **image_options: Any,
    ) -> dict[str, Any]:
        """What our models take: `images`, and `tokens` and `mask`.

        Args:
          images: see `ImageProcessor.__call__`; `images` is then [B, H, W, 3] float32, or
            `mmjax.patches.Patches`.
          text: one text or several; `tokens` is then [B, T] int32, `mask` [B, T] bool, True where a
            token may be attended to.
          padding: "longest" (or True), "max_length", or False. By default the model's own: CLIP's
            and SigLIP's whole length, "longest" otherwise.
          max_length: of "max_length" and `truncation`; by default `self.max_length`.
          truncation: cut what is longer, which is otherwise an error.
          padding_side: "left" or "right". By default "left" for models that continue their text,
            the tokenizer's own otherwise.
          add_special_tokens: begin and end tokens as the tokenizer has it.
          image_options: options of the image processor, for this call only.

        Raises:
          CorruptImageError, ProcessorConfigError: see `ImageProcessor.__call__`.
          ValueError: nothing given, no tokenizer or image processor in the directory, a text that
            is too long, or a token that the model does not have.
        """
        if images is None and text is None:
            raise ValueError("The processor was given neither images nor text.")
        batch: dict[str, Any] = {}
        if images is not None:
            batch["images"] = self._image_processor()(images, **image_options)
        elif image_options:
            options = ("padding", "max_length", "truncation", "padding_side", "add_special_tokens")
            name = next(iter(image_options))
            raise UnknownNameError(
                f"Text is not processed with an option {name!r}; {nearest(name, options)}"
            )
        if text is not None:
            batch["tokens"], batch["mask"] = self._encode(
                self._as_texts(text),
                self._padding if padding is None else padding,
                self.max_length if max_length is None else max_length,
                truncation,
                padding_side or self._side or self._tokenizer().padding_side,
                add_special_tokens,
            )
        return batch

    def _as_texts(self, text: str | Sequence[str]) -> list[str]:
        texts = [text] if isinstance(text, str) else list(text)
        for one in texts:
            if not isinstance(one, str):
                raise ValueError(f"Text must be a string or several of them, not {one!r}.")
        if not texts:
            raise ValueError("There are no texts to process.")
        return texts

    def _encode(
        self,
        texts: list[str],
        padding: bool | str,
        limit: int | None,
        truncation: bool,
        side: str,
        add_special_tokens: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = self._tokenizer()
        encoded = tokenizer(
            [text.lower() for text in texts] if self._lower_case else texts,
            padding=padding if limit is not None or padding != "max_length" else "longest",
            max_length=limit,
            truncation=truncation and limit is not None,
            padding_side=side,
            add_special_tokens=add_special_tokens,
            return_attention_mask=True,
            verbose=False,
        )
        lengths = [sum(row) for row in encoded["attention_mask"]]
        worst = int(np.argmax(lengths))
        if limit is not None and lengths[worst] > limit:
            raise ValueError(
                f"A text has {lengths[worst]} tokens where the model takes {limit}: "
                f"{texts[worst][:80]!r}. Shorten it, or pass truncation=True to cut it."
            )
        if len({len(row) for row in encoded["input_ids"]}) > 1:
            raise ValueError(
                f"The texts have {min(lengths)} to {max(lengths)} tokens: a batch needs padding."
            )
        tokens = np.asarray(encoded["input_ids"], np.int32)
        mask = np.asarray(encoded["attention_mask"], bool)
        self._check_ids(tokens)
        # A model without a mask attends to its padding (SigLIP's directories say so).
        masked = "attention_mask" in tokenizer.model_input_names
        return tokens, mask if masked else np.ones_like(mask)

    def _check_ids(self, tokens: np.ndarray) -> None:
        """Raises ValueError if the model does not have one of these tokens."""
        token = int(tokens.max(initial=0))
        if self._vocab_size is not None and token >= self._vocab_size:
            raise ValueError(
                f"The tokenizer in {self._directory} makes the token {token} "
                f"({self._tokenizer().convert_ids_to_tokens(token)!r}), but the model has only "
                f"{self._vocab_size}: they do not belong together."
            )

    def apply_chat_template(
        self, conversation: Sequence[Any], *, tokenize: bool = True, **options: Any
    ) -> dict[str, Any] | str | list[str]:
        """A conversation (or several), rendered by the directory's template.

        Args:
          conversation: [{"role": "user", "content": "..."}, ...], or a list of such.
          tokenize: give `tokens` and `mask` rather than text.
          options: of transformers' `apply_chat_template`, such as add_generation_prompt=True.

        Raises:
          ValueError: no template, or no tokenizer.
        """
        text = self._tokenizer().apply_chat_template(conversation, tokenize=False, **options)
        return self(text=text, add_special_tokens=False) if tokenize else text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of one row of tokens."""
        return self._tokenizer().decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def batch_decode(self, rows: Any, *, skip_special_tokens: bool = True) -> list[str]:
        """The texts of [B, T] tokens."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise DataNotFoundError(
                f"{self._directory} holds no tokenizer, so text cannot be processed."
            )
        return self.tokenizer

    def _image_processor(self) -> ImageProcessor:
        if self.images is None:
            raise DataNotFoundError(
                f"{self._directory} holds no preprocessor_config.json, so images cannot be "
                "processed."
            )
        return self.images


def load_processor(directory: str | os.PathLike) -> Processor:
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
    - IdeficsProcessor lets what follows an end token see no image before the next one; here it sees
      the last one.

    Raises:
      DataNotFoundError: no such directory, or nothing of a processor in it.
      UnknownNameError: an image processor class, or an option, that is not known; names the known.
      ValueError: files that cannot be read, or a tokenizer that does not fit the model's
        vocabulary.
    """
    path = existing(directory, "The model directory")
    if not path.is_dir():
        raise DataNotFoundError(f"{path} is a file; a model directory is expected.")
    config = _read_json(path / "config.json") or {}
    processor = _read_json(path / "processor_config.json") or {}
    # Transformers 5 writes everything into one file; older versions, and image processors without a
    # tokenizer, have preprocessor_config.json.
    images = processor.get("image_processor")
    images = _read_json(path / "preprocessor_config.json") if images is None else images
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
        from mmjax.data import vlm_processor  # which is made of what is here

        declared = _read_json(path / "tokenizer_config.json") or {}
        name = vlm_processor.class_of([processor, images, declared], config)
        if name is not None:
            facts = vlm_processor.Facts(processor, images, kind, hf_config(config), tokenizer)
            template = (_read_json(path / "chat_template.json") or {}).get("chat_template")
            return vlm_processor.VLMProcessor(path, name, facts, config, template)
    return Processor(path, ImageProcessor(kind, images), tokenizer, config)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Checks that every ordinary token has a row in the model's embedding.

    Tokens that were added to a finished vocabulary may lie beyond it, as the image token of Gemma 3
    does for its text-only models: `Processor` refuses them where a text has one.

    Args:
      tokenizer: of transformers.
      vocab_size: rows of the embedding.

    Raises:
      ValueError: the tokenizer is of another model.
    """
    added = set(tokenizer.get_added_vocab())
    beyond = {
        index: token
        for token, index in tokenizer.get_vocab().items()
        if index >= vocab_size and token not in added
    }
    if beyond:
        largest = max(beyond)
        raise ValueError(
            f"The tokenizer has {len(beyond)} tokens that the model has not: ids up to {largest} "
            f"({beyond[largest]!r}), where the model's vocabulary has {vocab_size}. They do not "
            "belong together: take both from one directory."
        )


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


def hf_config(config: Mapping[str, Any]) -> PretrainedConfig | None:
    """What a `config.json` says, with its defaults; None where its model type is not known."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return AutoConfig.for_model(**config) if config.get("model_type") in CONFIG_MAPPING else None


def _text_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's configuration with its defaults, or nothing where there is none."""
    whole = hf_config(config)
    return {} if whole is None else whole.get_text_config().to_dict()
