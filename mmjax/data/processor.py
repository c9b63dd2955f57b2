"""A model's preprocessing: images and text to what it is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmjax.data.image_processor import ImageInput, ImageProcessor
from mmjax.data.sources import DataNotFoundError
from mmjax.registry import UnknownNameError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


def hf_config(config: Mapping[str, Any]) -> PretrainedConfig | None:
    """What a `config.json` says, with its defaults; None where its model type is not known."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return AutoConfig.for_model(**config) if config.get("model_type") in CONFIG_MAPPING else None


def _text_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's configuration with its defaults, or nothing where there is none."""
    whole = hf_config(config)
    return {} if whole is None else whole.get_text_config().to_dict()
