"""Talking with a model: what is said becomes prompts, and the tokens it writes become text.

    speaker = open_speaker(directory)
    dialogue = Dialogue(speaker)
    print(dialogue.say("What is this?", images=["cat.png"], max_new_tokens=64))
    print(dialogue.say("What colour is it?", max_new_tokens=64))

How a model is spoken to is said by a `Speech`: of a Hugging Face directory by its processor or
tokenizer, of a run of our own by the template and the layout that it was trained with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mmjax import convert
from mmjax.data.conversations import MARKER, Conversation, Turn
from mmjax.data.idefics3 import AROUND
from mmjax.data.image import PRESETS
from mmjax.data.image_options import ImageOptions
from mmjax.data.load_processor import load_processor
from mmjax.data.processor import check_vocabulary
from mmjax.data.run_tokenizer import build_tokenizer
from mmjax.data.samples import Drawn, SampleMaker
from mmjax.data.spec import parse
from mmjax.data.tokenizer import Tokenizer
from mmjax.data.vlm_processor import VLMProcessor
from mmjax.evaluate.likelihood import Likelihood, answer_arrays, answer_log_probs
from mmjax.generation import Generated, Generator, Printer
from mmjax.generation.programs import Structure
from mmjax.models import Flamingo
from mmjax.models.vlm import TEXT

END_OF_UTTERANCE = "<end_of_utterance>"
# Lengths of the rows of training are no limit of the model.
_NO_LIMIT = 10**9
# Stands where the model will answer.
_ANSWER = Conversation((Turn("assistant", ("?",)),))


class Prompt(NamedTuple):
    """A text for the model; see `Generator.__call__`.

    Attributes:
      ids: [T] int32, up to where the model goes on.
      place: [T] int32, which visual token stands where.
      images: [I, H, W, C] float32, or nothing.
    """

    ids: np.ndarray
    place: np.ndarray
    images: np.ndarray | Sequence[Any] = ()


class Levels(NamedTuple):
    """See `Speech.levels`."""

    mean: Sequence[float]
    std: Sequence[float]


class Speech(Protocol):
    """How a model is spoken to.

    Attributes:
      ends: tokens that end what the model says.
      unsaid: tokens that it reads and does not say.
      chats: whether there is a form for conversations; without one the model continues texts.
      lead: what stands between images and the words about them, where those do not say it.
      levels: mean and standard deviation of each channel, on levels scaled to [0, 1], by which
        images are normalised; None where there are none.
    """

    ends: Sequence[int]
    unsaid: Sequence[int]
    chats: bool
    lead: str
    levels: Levels | None

    def prompt(self, conversation: Conversation) -> Prompt:
        """Of a conversation that ends with the user's turn, up to where the answer begins.

        Raises:
          ValueError: on what the model cannot be told.
        """

    def text(self, text: str, images: Sequence[Any]) -> Prompt:
        """Of a text that the model is to continue, with a marker for each image.

        Raises:
          ValueError: as `prompt`.
        """

    def answered(self, conversation: Conversation, answer: str) -> tuple[Prompt, np.ndarray]:
        """A prompt and the tokens [U] of this answer to it, with the end if there is one.

        Raises:
          ValueError: as `prompt`; if the answer has no tokens.
        """

    def continued(self, text: str, images: Sequence[Any], more: str) -> tuple[Prompt, np.ndarray]:
        """The same of a text and what follows it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""


class Speaker:
    """A model that is spoken to.

    Args:
      model: of language, or one that sees as well.
      speech: how it is spoken to.
      mesh: devices to generate on; see `Generator`.

    Attributes:
      model: as given.
      sees: whether it takes images.
      speech: as given.
    """

    def __init__(self, model: nnx.Module, speech: Speech, *, mesh: Mesh | None = None):
        self.model, self.speech = model, speech
        self.sees: bool = model.takes_images
        self._generator = Generator(model, mesh=mesh)

    def __call__(self, prompts: Sequence[Prompt], **options: Any) -> Generated:
        """What follows the prompts; see `Generator.__call__` for the options.

        The speech's `unsaid` tokens are suppressed beside those that are given.
        """
        suppress = [*self.speech.unsaid, *(options.pop("suppress", None) or ())]
        given: dict[str, Any] = {"suppress": suppress} if suppress else {}
        if self.sees:
            given["images"] = [prompt.images for prompt in prompts]
            given["place"] = [prompt.place for prompt in prompts]
        return self._generator(
            [prompt.ids for prompt in prompts],
            **given,
            eos_id=self.speech.ends,
            decode=self.speech.decode,
            **options,
        )

    def likelihoods(
        self, prompts: Sequence[Prompt], answers: Sequence[np.ndarray]
    ) -> list[Likelihood]:
        """How probable each answer (token ids) is after its prompt, all in one batch.

        Raises:
          ValueError: if they do not fit the model.
        """
        arrays = answer_arrays(self.model, prompts, answers)
        arrays = self._generator.place(arrays, batch=len(prompts))
        log_probs = jax.device_get(_log_probs(*self._generator.weights, arrays))
        rows = zip(log_probs, answers, strict=True)
        return [Likelihood(float(row.sum(dtype=np.float64)), len(said)) for row, said in rows]

    def texts(self, generated: Generated) -> list[str]:
        rows = zip(generated.tokens, generated.lengths, strict=True)
        return [self.speech.decode(row[:length].tolist()) for row, length in rows]

    def turn(self, text: str, images: int, *, first: int = 0) -> Turn:
        """The user's words about images, which stand where the markers are, or before the words.

        Args:
          text: with a marker "<image>" for each image, or with none.
          images: how many they are.
          first: number of the first of them in the conversation.

        Raises:
          ValueError: if there are images for a model that takes none, or another number of markers.
        """
        if images and not self.sees:
            raise ValueError("The model takes no images: it reads text alone.")
        return user_turn(text, images, first=first, lead=self.speech.lead if self.sees else None)


@functools.partial(jax.jit, static_argnames=("structure",))
def _log_probs(structure: Structure, leaves: list[jax.Array], batch: dict[str, Any]) -> jax.Array:
    with structure.model(leaves) as model:
        return answer_log_probs(model, batch)


def user_turn(text: str, images: int, *, first: int, lead: str | None) -> Turn:
    """See `Speaker.turn`.

    Args:
      lead: what stands between images and the words about them; None: markers mean nothing.

    Raises:
      ValueError: if markers and images are not as many.
    """
    pieces = [text] if lead is None else text.split(MARKER)
    if len(pieces) == 1:
        return Turn("user", (*range(first, first + images), lead + text if images else text))
    if len(pieces) - 1 != images:
        raise ValueError(
            f"The text has {len(pieces) - 1} places {MARKER!r} for {images} image(s): put one "
            "where each image belongs, or none to have the images first."
        )
    parts: list[str | int] = [pieces[0]]
    for number, piece in enumerate(pieces[1:], start=first):
        parts += [number, piece]
    return Turn("user", tuple(part for part in parts if part != ""))


class Dialogue:
    """A conversation with a model, turn by turn.

    Args:
      speaker: the model.
      system: what it is told before the first turn; "" for nothing, or the template's default.

    Attributes:
      turns: what was said so far.
      images: what was shown so far.
    """

    def __init__(self, speaker: Speaker, system: str = ""):
        self._speaker = speaker
        self.turns: tuple[Turn, ...] = (Turn("system", (system,)),) if system else ()
        self.images: tuple[Any, ...] = ()

    def say(
        self,
        text: str,
        images: Sequence[Any] = (),
        *,
        stream: bool | Callable[[str], None] = False,
        **options: Any,
    ) -> str:
        """The answer. If there is none, because of an error, nothing was said.

        Args:
          text: see `Speaker.turn`.
          images: paths, encoded bytes or PIL images.
          stream: True prints the answer as it comes; a function is called with its pieces. The last
            of them is a line end.
          options: of `Generator.__call__`; max_new_tokens is one.

        Raises:
          ValueError: on what the model cannot be told, and options that contradict each other.
        """
        said = self._speaker.turn(text, len(images), first=len(self.images))
        turns, seen = (*self.turns, said), (*self.images, *images)
        prompt = self._speaker.speech.prompt(Conversation(turns, seen))
        printer = None
        if stream:
            printer = Printer(self._speaker.speech.decode, None if stream is True else stream)
        (answer,) = self._speaker.texts(self._speaker([prompt], stream=printer, **options))
        if printer is not None:
            printer.finish()
        self.turns, self.images = (*turns, Turn("assistant", (answer,))), seen
        return answer


class _HFSpeech:
    """What is common to directories of Hugging Face format."""

    lead = ""
    levels = None
    unsaid: Sequence[int] = ()

    def __init__(self, tokenizer: Any, template: Any, ends: Sequence[int]):
        self._tokenizer, self.chats, self.ends = tokenizer, template is not None, ends

    def prompt(self, conversation: Conversation) -> Prompt:
        return self._render(conversation, add_generation_prompt=True)

    def answered(self, conversation: Conversation, answer: str) -> tuple[Prompt, np.ndarray]:
        prompt = self.prompt(conversation)
        turns = (*conversation.turns, Turn("assistant", (answer,)))
        whole = self._render(Conversation(turns, conversation.images), add_generation_prompt=False)
        # Where the answer begins its tokens may be others than those of prompt and answer alone.
        shorter = min(len(prompt.ids), len(whole.ids))
        same = prompt.ids[:shorter] == whole.ids[:shorter]
        count = shorter if same.all() else int(same.argmin())
        said = whole.ids[count:]
        ends = np.flatnonzero(np.isin(said, self.ends))
        said = said[: ends[0] + 1] if ends.size else said
        if not said.size:
            raise ValueError(f"The answer {answer!r} has no tokens.")
        return Prompt(whole.ids[:count], whole.place[:count], whole.images), said

    def text(self, text: str, images: Sequence[Any]) -> Prompt:
        raise NotImplementedError

    def continued(self, text: str, images: Sequence[Any], more: str) -> tuple[Prompt, np.ndarray]:
        return self.text(text, images), self._words(more)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _words(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _render(self, conversation: Conversation, *, add_generation_prompt: bool) -> Prompt:
        if not self.chats:
            raise ValueError(
                "The model has no chat template, and so no form for a conversation: let it "
                "continue a text instead."
            )
        return self._templated(conversation, add_generation_prompt)

    def _templated(self, conversation: Conversation, add_generation_prompt: bool) -> Prompt:
        raise NotImplementedError


class TokenizerSpeech(_HFSpeech):
    """Of language models.

    Args:
      tokenizer: of transformers.
      ends: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]):
        super().__init__(tokenizer, tokenizer.chat_template, ends)

    def text(self, text: str, images: Sequence[Any]) -> Prompt:
        return _without_images(self._tokenizer(text)["input_ids"])

    def _templated(self, conversation: Conversation, add_generation_prompt: bool) -> Prompt:
        messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return _without_images(self._words(text))


class ProcessorSpeech(_HFSpeech):
    """Of models that see, by the processor of their directory.

    Args:
      processor: see `mmjax.load_processor`.
      ends: tokens that end a text.
      unsaid: see `Speech`.
    """

    def __init__(self, processor: VLMProcessor, ends: Sequence[int], unsaid: Sequence[int]):
        super().__init__(processor.tokenizer, processor.chat_template, ends)
        self._processor, self.unsaid = processor, unsaid
        self.levels = _levels(processor.sight.images.options)

    def text(self, text: str, images: Sequence[Any]) -> Prompt:
        if images:
            text = text.replace(MARKER, self._processor.sight.token)
        return _first_row(self._processor(images=[list(images)], text=[text]))

    def _templated(self, conversation: Conversation, add_generation_prompt: bool) -> Prompt:
        messages = [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in turn.parts
                ],
            }
            for turn in conversation.turns
        ]
        batch = self._processor.apply_chat_template(
            messages,
            images=[list(conversation.images)],
            add_generation_prompt=add_generation_prompt,
        )
        return _first_row(batch)


class RunSpeech:
    """Of the models of runs, as their data was rendered; longer conversations are no error.

    Args:
      train: `config.data.train` of the run.
      tokenizer: of the run.

    Raises:
      ValueError: if the run was not trained on conversations.
    """

    chats = True
    unsaid: Sequence[int] = ()
    # So have the data's forms it.
    lead = "\n"

    def __init__(self, train: Mapping[str, Any], tokenizer: Tokenizer | None):
        spec = parse(train)
        if spec.conversation is None:
            raise ValueError("The run was not trained on conversations: it writes no text.")
        said = spec.conversation
        self._sees = said.layout is not None
        self.levels = None
        if self._sees:
            preset = PRESETS[train["conversation"]["layout"]["preset"]]
            self.levels = Levels(preset.mean, preset.std)
        if said.seq2seq is not None:
            said = dataclasses.replace(
                said, seq2seq=dataclasses.replace(said.seq2seq, max_len=_NO_LIMIT)
            )
        said = dataclasses.replace(
            said,
            max_len=_NO_LIMIT,
            images=_NO_LIMIT if self._sees else 0,
            max_targets=None,
            lengths=(),
            too_long="skip",
        )
        self._maker = SampleMaker(dataclasses.replace(spec, conversation=said), [], tokenizer)
        self._tokenizer = tokenizer
        end = self._maker.learnt(self._maker.render(_ANSWER))[-1]
        self.ends = sorted({int(end), tokenizer.eos_id} - {None})

    def prompt(self, conversation: Conversation) -> Prompt:
        return self.answered(conversation, _ANSWER.turns[0].text)[0]

    def text(self, text: str, images: Sequence[Any]) -> Prompt:
        return self.prompt(self._question(text, images))

    def continued(self, text: str, images: Sequence[Any], more: str) -> tuple[Prompt, np.ndarray]:
        return self.answered(self._question(text, images), more)

    def _question(self, text: str, images: Sequence[Any]) -> Conversation:
        lead = self.lead if self._sees else None
        turn = user_turn(text, len(images), first=0, lead=lead)
        return Conversation((turn,), tuple(images))

    def answered(self, conversation: Conversation, answer: str) -> tuple[Prompt, np.ndarray]:
        turns = (*conversation.turns, Turn("assistant", (answer,)))
        whole = Conversation(turns, conversation.images)
        drawn = Drawn("The conversation", whole, self._maker.render(whole))
        sample = self._maker.encode(drawn, (0, 0, None))
        pictures = self._maker.pictures(sample)
        images = np.concatenate(pictures) if pictures else ()
        if sample.answer is not None:
            return Prompt(sample.tokens, sample.place, images), sample.answer
        # Answers are learnt, and what stands between them is not.
        end = np.flatnonzero(sample.learnt)[-1] + 1
        begin = np.flatnonzero(~sample.learnt[:end])[-1] + 1
        return Prompt(sample.tokens[:begin], sample.place[:begin], images), sample.tokens[begin:end]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def _levels(options: ImageOptions) -> Levels:
    # Levels from 0 to 255 are scaled by a factor that need not be 1 / 255.
    most = 255 * (options.rescale_factor if options.do_rescale else 1.0)
    mean, std = (0.0,) * 3, (1.0,) * 3
    if options.do_normalize:
        mean, std = options.image_mean, options.image_std
    return Levels([x / most for x in mean], [x / most for x in std])


def _without_images(ids: Sequence[int]) -> Prompt:
    return Prompt(np.asarray(ids, np.int32), np.full(len(ids), TEXT, np.int32))


def _first_row(batch: dict[str, Any]) -> Prompt:
    here = batch["mask"][0]
    ids = batch["tokens"][0][here]
    if "images" not in batch:
        return _without_images(ids)
    return Prompt(ids, batch["place"][0][here], batch["images"][0])


def open_speaker(
    weights: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None
) -> Speaker:
    """The model in a directory, ready to be spoken to.

    Args:
      weights: a directory of Hugging Face format, a GGUF file, the work directory of a run, or what
        `experiments.convert` wrote as Orbax.
      dtype: of the computation; float32 if None. What is of Orbax computes in the type of its
        config.
      mesh: devices to generate on.

    Raises:
      ValueError: not a model that writes text, or no tokenizer for it; the message says what.
    """
    path = Path(weights).expanduser()
    if (path / "checkpoints").is_dir():
        return _open_orbax(path, dtype, mesh)
    model = convert.from_pretrained(path, dtype=dtype or "float32", mesh=mesh)
    if path.is_file():
        from mmjax.convert.gguf_tokenizer import read_tokenizer

        return Speaker(model, _tokenizer_speech(path, model, read_tokenizer(path)), mesh=mesh)
    return Speaker(model, _hf_speech(path, model), mesh=mesh)


def _hf_speech(path: Path, model: nnx.Module) -> Speech:
    """By the files of tokenizer and processor in a directory, which need not have the model's."""
    if not hasattr(model, "encoder_decoder"):
        raise ValueError(f"{path} holds a model that writes no text: {type(model).__name__}.")
    processor = load_processor(path, config=_config_of(model))
    if processor.tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer, so that it can read no prompt.")
    if not model.takes_images:
        return _tokenizer_speech(path, model, processor.tokenizer)
    if not isinstance(processor, VLMProcessor):
        raise ValueError(
            f"{path} holds a model that sees, but nothing that prepares images for it: its "
            "processor_config.json (or preprocessor_config.json) is missing."
        )
    tokenizer = processor.tokenizer
    ends = end_tokens(path, model, tokenizer)
    return ProcessorSpeech(processor, ends, image_words(model, tokenizer.get_vocab()))


def _tokenizer_speech(path: Path, model: nnx.Module, tokenizer: Any) -> TokenizerSpeech:
    check_vocabulary(tokenizer, model.config.vocab_size)
    return TokenizerSpeech(tokenizer, end_tokens(path, model, tokenizer))


def _open_orbax(directory: Path, dtype: str | None, mesh: Mesh | None) -> Speaker:
    """A run, which says how it was trained; or a converted model with the files of another."""
    from mmjax.train.runs import COMPANIONS, CONFIG, import_plugins, read_run

    if dtype is not None:
        raise ValueError("What is of Orbax computes in the type of its config: leave dtype out.")
    if (directory / CONFIG).is_file():
        import_plugins(directory)
        data = json.loads((directory / CONFIG).read_text("utf-8"))["data"]
        speech = RunSpeech(data["train"], build_tokenizer(data, directory))
        model = read_run(directory)
        speech.unsaid = image_words(model, {})
        return Speaker(model, speech, mesh=mesh)
    if not (directory / COMPANIONS).is_dir():
        raise ValueError(
            f"{directory} holds weights alone: convert them again from a directory that has the "
            "files of a tokenizer too, or name one with --like."
        )
    model = read_run(directory)
    return Speaker(model, _hf_speech(directory / COMPANIONS, model), mesh=mesh)


def end_tokens(weights: Path, model: nnx.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a text: of the generation config, else of the config or tokenizer.

    An IDEFICS that was taught to converse ends what it says with a token of its own, which its
    files do not name.
    """
    settings = Path(weights) / "generation_config.json"
    generation = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
    config = _config_of(model)
    said = [
        generation.get("eos_token_id"),
        config.get("eos_token_id"),
        config.get("text_config", {}).get("eos_token_id"),
        tokenizer.eos_token_id,
    ]
    ends = next((ids for ids in said if ids is not None), [])
    ends = list(ends) if isinstance(ends, list) else [ends]
    if isinstance(model, Flamingo):
        ends += _known(tokenizer.get_vocab(), END_OF_UTTERANCE)
    return list(dict.fromkeys(ends))


def image_words(model: nnx.Module, vocabulary: Mapping[str, int]) -> list[int]:
    """Tokens of a Flamingo that mean nothing where no image is: for an image, and around one.

    As transformers' guide to IDEFICS has it, by `bad_words_ids`. A Mllama's head has none of them.
    """
    if type(model) is not Flamingo:
        return []
    return sorted({model.config.image_token, *_known(vocabulary, AROUND)})


def _known(vocabulary: Mapping[str, int], token: str) -> list[int]:
    return [vocabulary[token]] if token in vocabulary else []


def _config_of(model: nnx.Module) -> dict[str, Any]:
    """Content of the config.json that a model came with; nothing where it had none."""
    origin = vars(model).get("origin")
    return {} if origin is None else json.loads(origin.config)
