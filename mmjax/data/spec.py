"""What a data config may say: strict dataclasses made from mappings (or ml_collections
ConfigDicts)."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmjax.config import split_name
from mmjax.data import documents  # noqa: F401  (it registers its forms)
from mmjax.data.augment import AUGMENTATIONS, Augmentation
from mmjax.data.forms import FORMS, Form
from mmjax.data.image import PRESETS
from mmjax.data.visual import LAYOUTS, Layout
from mmjax.registry import Registry, UnknownNameError, nearest


def plain(config: Any) -> Any:
    """ConfigDicts, tuples and lists inside one another -> dicts and lists."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def call_strictly(what: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """`function(**arguments)` where unknown or missing arguments name the nearest and the valid
    ones.

    Raises:
      UnknownNameError: an argument the function does not take.
      ValueError: a required argument is missing.
    """
    parameters = inspect.signature(function).parameters
    for key in arguments:
        if key not in parameters:
            raise UnknownNameError(f"{what} has no field {key!r}; {nearest(key, parameters)}")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in arguments
    ]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}; it has {sorted(arguments)}.")
    return function(**arguments)


def _make(what: str, registry: Registry[Any], config: Mapping[str, Any]) -> Any:
    name, arguments = split_name(config, what)
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return call_strictly(f"{registry.kind} {name!r}", registry[name], arguments)


def make_augmentation(config: Mapping[str, Any]) -> Augmentation:
    """`dict(name="random_erasing", share=0.1)` -> the augmentation."""
    return _make("An augmentation", AUGMENTATIONS, config)


def make_form(config: str | Mapping[str, Any]) -> Form:
    """`"llava"`, or `dict(name="questions", turns=4)` -> the form."""
    return _make("A form", FORMS, {"name": config} if isinstance(config, str) else config)


@dataclass(frozen=True)
class ImageSpec:
    """`field` of the record, `preset` of the family, `size` in pixels, `augment`: dicts by name."""

    preset: str
    size: int
    field: str = "image"
    augment: tuple[Augmentation, ...] = ()

    def __post_init__(self):
        PRESETS[self.preset]  # raises for an unknown name
        if self.size < 1:
            raise ValueError(f"data image size {self.size} must be at least 1 pixel.")


@dataclass(frozen=True)
class TextSpec:
    """`field` of the record: a string, or a list of strings of which training draws one (evaluation
    takes the first). `also`: another such field, drawn instead with probability `also_share`.
    `max_len` in tokens."""

    max_len: int
    field: str = "text"
    also: str | None = None
    also_share: float = 0.0

    def __post_init__(self):
        if self.max_len < 2:
            raise ValueError(
                f"text max_len {self.max_len} leaves no room for a word: use 2 or more."
            )
        if not 0 <= self.also_share <= 1:
            raise ValueError(f"text also_share {self.also_share} must be in [0, 1].")


@dataclass(frozen=True)
class LabelSpec:
    """`field` of the record that holds the class index."""

    field: str = "label"


TOO_LONG = ("skip", "cut")


@dataclass(frozen=True)
class Seq2SeqSpec:
    """Of an encoder-decoder: the answer is the decoder's, what comes before it the encoder's.

    Attributes:
      max_len: tokens of the decoder's rows: one that begins, and the answer with its end.
      start: what the decoder begins with: `T5Config.decoder_start_id`.
    """

    max_len: int
    start: int = 0

    def __post_init__(self):
        if self.max_len < 2:
            raise ValueError(f"seq2seq max_len={self.max_len} has no room for an answer.")


@dataclass(frozen=True)
class ConversationSpec:
    """How conversations become rows of tokens and pictures.

    Attributes:
      template: a name in `mmjax.data.chat.TEMPLATES`.
      max_len: tokens of a row, visual ones included.
      images: pictures of a row: what an image becomes is said by `layout`, and a conversation with
        more pictures is skipped.
      layout: one of `mmjax.data.visual.LAYOUTS`; None: text only.
      system: what the system says where a conversation does not; None: the template's default.
      pack: several conversations in a row; training only.
      document: with `pack`, so many conversations of a row follow each other in one document, as
        the examples and the question of a few-shot prompt do. 1: none sees another.
      window: records that are packed, or grouped, together.
      max_targets: supervised tokens of a row; a conversation with more is skipped.
      lengths: without packing, the lengths that rows may have, the last one `max_len`: training
        batches are of conversations of similar length.
      too_long: what is larger than a row (`max_len`, `images`, `max_targets`) is "skip"ped and
        counted, or "cut": a conversation where one of its later questions begins, a document, which
        answers nobody, where the row ends, but never within an image. What cannot be cut so is
        skipped. In training what is skipped for its size is no broken record of `max_bad_share`.
      prefix: whether batches say what is prompt, for attention "prefix" of `VLMConfig`.
      parents: whether batches say which segment another continues, for questions that are asked
        apart (see the form "questions").
      image_token: what stands where visual tokens go: `VLMConfig.image_token`.
      seq2seq: for an encoder-decoder; conversations of one question and answer.
    """

    template: str
    max_len: int
    images: int = 0
    layout: Layout | None = None
    system: str | None = None
    pack: bool = False
    document: int = 1
    window: int = 512
    max_targets: int | None = None
    lengths: tuple[int, ...] = ()
    too_long: str = "skip"
    prefix: bool = False
    parents: bool = False
    image_token: int = 0
    seq2seq: Seq2SeqSpec | None = None

    def __post_init__(self):
        if self.max_len < 2 or self.window < 1:
            raise ValueError("conversation max_len must be at least 2, and window at least 1.")
        if (self.images > 0) != (self.layout is not None):
            raise ValueError(
                "conversation images (pictures of a row) and layout (what an image becomes) go "
                "together: give both, or neither for text only."
            )
        if self.max_targets is not None and self.max_targets < 1:
            raise ValueError("conversation max_targets must be at least 1, or None.")
        if self.too_long not in TOO_LONG:
            raise UnknownNameError(
                f"conversation too_long={self.too_long!r}; {nearest(self.too_long, TOO_LONG)}"
            )
        if self.document < 1 or (self.document > 1 and (self.prefix or not self.pack)):
            raise ValueError(
                f"conversation document={self.document}: documents of several conversations need "
                "pack=True and prefix=False; 1 is for none."
            )
        if self.prefix and self.parents:
            raise ValueError(
                "conversation prefix and parents do not go together: in a prefix the image sees "
                "the question, so that several questions cannot share its tokens."
            )
        if self.seq2seq is not None and (self.pack or self.prefix or self.parents):
            raise ValueError(
                "conversation pack, prefix and parents are for decoder-only models: an "
                "encoder-decoder (seq2seq) has one conversation in a row."
            )
        if self.lengths and (self.pack or list(self.lengths) != sorted(set(self.lengths))):
            raise ValueError("conversation lengths must rise, and have no meaning with pack=True.")
        if self.lengths and self.lengths[-1] != self.max_len:
            raise ValueError(
                f"The last of conversation lengths={self.lengths} must be max_len={self.max_len}."
            )

    @property
    def most_targets(self) -> int:
        """The most supervised tokens that a row may have."""
        longest = self.max_len if self.seq2seq is None else self.seq2seq.max_len - 1
        return min(self.max_targets or longest, longest)


@dataclass(frozen=True)
class DataSpec:
    """One stream: its sources (mappings with name and weight) and what is made of each record.

    A source may have `augment`: of its images in training, after that of `image`; of conversations
    only for layouts that make as many pictures of every image. With `conversation` each source has
    a form, which makes a conversation of its records, and may have a `loss_weight`: how much a
    token of it counts in the loss, 1 where nothing is said.
    """

    sources: tuple[dict[str, Any], ...]
    image: ImageSpec | None = None
    text: TextSpec | None = None
    label: LabelSpec | None = None
    conversation: ConversationSpec | None = None
    forms: tuple[Form, ...] = ()
    loss_weights: tuple[float, ...] = ()
    augment: tuple[tuple[Augmentation, ...], ...] = ()

    def __post_init__(self):
        if not all(0 < weight < math.inf for weight in self.loss_weights):
            raise ValueError(f"A source's loss_weight must be above 0: {self.loss_weights}.")
        if not self.sources:
            raise ValueError("data sources is empty: name at least one source.")
        others = [self.image, self.text, self.label]
        if self.conversation is None and self.image is None and self.text is None:
            raise ValueError(
                "A data stream needs `image`, `text` or `conversation`: it has none of them."
            )
        if self.conversation is not None and any(part is not None for part in others):
            raise ValueError(
                "A data stream with `conversation` takes no `image`, `text` or `label`: what is "
                "made of images is said by its layout."
            )


def parse(config: Any) -> DataSpec:
    """A ConfigDict such as `config.data.train` -> DataSpec; unknown keys name the nearest."""
    config = plain(config)
    parsed = dict(config)
    sources = config.get("sources", [])
    sources = sources if isinstance(sources, list) else [sources]
    parsed["augment"] = tuple(
        tuple(make_augmentation(entry) for entry in source.get("augment") or ())
        for source in sources
    )
    parsed["sources"] = tuple(
        {key: value for key, value in source.items() if key != "augment"} for source in sources
    )
    if config.get("image") is not None:
        image = dict(config["image"])
        image["augment"] = tuple(make_augmentation(entry) for entry in image.get("augment") or ())
        parsed["image"] = call_strictly("data image", ImageSpec, image)
    if config.get("text") is not None:
        parsed["text"] = call_strictly("data text", TextSpec, config["text"])
    if config.get("label") is not None:
        parsed["label"] = call_strictly("data label", LabelSpec, config["label"])
    if config.get("conversation") is not None:
        parsed |= _parse_conversation(config["conversation"], parsed["sources"])
    return call_strictly("A data stream", DataSpec, parsed)


def _parse_conversation(config: Mapping[str, Any], sources: Sequence[Any]) -> dict[str, Any]:
    conversation = dict(config)
    if config.get("layout") is not None:
        conversation["layout"] = _make("A layout", LAYOUTS, config["layout"])
    conversation["lengths"] = tuple(config.get("lengths") or ())
    if config.get("seq2seq") is not None:
        conversation["seq2seq"] = call_strictly("seq2seq", Seq2SeqSpec, config["seq2seq"])
    for source in sources:
        if "form" not in source:
            raise ValueError(
                f"The data source {dict(source)} needs a form, for this is a stream of "
                f"conversations: one of {', '.join(FORMS.names())}."
            )
    return {
        "conversation": call_strictly("data conversation", ConversationSpec, conversation),
        "forms": tuple(make_form(source["form"]) for source in sources),
        "loss_weights": tuple(float(source.get("loss_weight", 1.0)) for source in sources),
        "sources": tuple(
            {k: v for k, v in source.items() if k not in ("form", "loss_weight")}
            for source in sources
        ),
    }


# Of an array: its shape, its dtype.
Field = tuple[tuple[int, ...], str]


def batch_fields(config: Any, batch_size: int) -> dict[str, Field]:
    """Shape and dtype of each array in a batch of a data stream, a mapping such as
    `config.data.train`; of those of several lengths, the longest."""
    spec = parse(config)
    fields: dict[str, Field] = {}
    if spec.image is not None:
        side = spec.image.size
        fields["image"] = ((batch_size, side, side, 3), "float32")
    if spec.text is not None:
        fields["text"] = ((batch_size, spec.text.max_len), "int32")
        fields["text_mask"] = ((batch_size, spec.text.max_len), "bool")
    if spec.label is not None:
        fields["label"] = ((batch_size,), "int32")
    if spec.conversation is not None:
        fields |= conversation_fields(spec.conversation, batch_size, spec.conversation.max_len)
    return fields


def conversation_fields(spec: ConversationSpec, batch_size: int, length: int) -> dict[str, Field]:
    """The arrays of a batch of conversations; `length` in tokens.

    `tokens`; `weights`, of the prediction *of* each token (of those of the decoder, if there is
    one); `place` and `segments` as in `mmjax.models.vlm.VLM.run`, and as far as configured
    `prefix`, `parents`, `decoder_tokens` and `images`.
    """
    shape = (batch_size, length)
    fields: dict[str, Field] = {
        "tokens": (shape, "int32"),
        "weights": (shape, "float32"),
        "place": (shape, "int32"),
        "segments": (shape, "int32"),
    }
    if spec.seq2seq is not None:
        said = (batch_size, spec.seq2seq.max_len)
        fields |= {"decoder_tokens": (said, "int32"), "weights": (said, "float32")}
    if spec.prefix:
        fields["prefix"] = (shape, "bool")
    if spec.parents:
        fields["parents"] = (shape, "int32")
    if spec.layout is not None:
        side = spec.layout.size
        fields["images"] = ((batch_size, spec.images, side, side, 3), "float32")
    return fields


@dataclass(frozen=True)
class LoadingSpec:
    """How batches are made: `workers` processes (0: threads of this process), `threads` in each,
    `prefetch` batches ahead, and the share of broken records above which the run stops (in
    evaluation, those that are larger than a row are such)."""

    workers: int = 0
    threads: int = 2
    prefetch: int = 2
    max_bad_share: float = 0.01

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"data {field.name} must not be negative.")
