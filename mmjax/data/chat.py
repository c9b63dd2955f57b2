"""Chat templates: a conversation becomes pieces of a stream, and each piece knows whether it is
learnt. The label mask is made here, never by searching a rendered text.

Text is encoded in runs: a run ends at a special token, at an image, and where an answer begins, for
there the prompt ends in generation too. So the ids are those of the runs, one after the other, and
equal those of the rendered text encoded as a whole, as long as its tokenizer splits there as well
(all of the byte-level and SentencePiece tokenizers that we know do). About spaces:

- What a turn says is stripped of spaces and line breaks around it. (Templates of Llama and Gemma do
  so; those of ChatML do not.)
- Tokenizers of SentencePiece put a space before a text. A run has one where a text begins, and
  after special tokens and images if the tokenizer does that there (older ones do); never where an
  answer begins in the middle of a text ("ASSISTANT:" + " yes").

Special tokens are given by id; what a user writes is never read as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from mmjax.data.conversations import Conversation, Turn
from mmjax.data.tokenizer import Tokenizer
from mmjax.registry import Registry

# Encoded texts that are remembered; templates and questions come again and again.
_REMEMBERED = 100_000

BEGIN, AFTER, INSIDE = "begin", "after", "inside"


class Special(str):
    """A special token, by its text."""


class Role(str):
    """A special token, by its role: "bos", "eos"; "begin": whatever the tokenizer begins a text
    with, which may be nothing; "first": the same, or else the begin or end token."""


class Picture(int):
    """An image of the conversation, by its number."""


Part = str | Special | Role | Picture
BOS, EOS, START, FIRST = Role("bos"), Role("eos"), Role("begin"), Role("first")


class Piece(NamedTuple):
    """`learnt`: part of an answer; of a picture it has a meaning where it is drawn (see `Layout`).
    `where` a text stands: at the beginning of the stream, after a special token or an image, or
    inside a text."""

    part: Part
    learnt: bool
    where: str


@dataclass(frozen=True)
class Template:
    """How turns are written.

    Attributes:
      begin: what the stream begins with.
      system, user, assistant: what stands before and after what they say. Of the assistant, what
        stands after it is learnt, as how an answer ends; not of an image that stands alone.
      between: after each answer, not learnt.
      answer: text around an answer that belongs to it.
      chunk: of a document, an answer to nobody, what ends the text of one image before the next one
        stands; learnt. The last text ends as every answer does. What precedes the first image is of
        no chunk: it is not learnt, and nothing ends it, as in OpenFlamingo; a document without
        images is learnt whole. Empty: documents are answers like others.
      inside: whether the system's words are part of the user's first turn.
      silent: whether the user's and the system's words are left out.
      images_first: whether the images of a turn of the user stand before it, wherever in its words
        they were.
      default: what the system says if the conversation does not say it.
    """

    user: tuple[tuple[Part, ...], tuple[Part, ...]]
    assistant: tuple[tuple[Part, ...], tuple[Part, ...]]
    system: tuple[tuple[Part, ...], tuple[Part, ...]] = ((), ())
    begin: tuple[Part, ...] = ()
    between: tuple[Part, ...] = ()
    answer: tuple[str, str] = ("", "")
    chunk: tuple[Part, ...] = ()
    inside: bool = False
    silent: bool = False
    images_first: bool = False
    default: str = ""

    def render(self, conversation: Conversation, system: str | None = None) -> list[Piece]:
        """The pieces of a conversation.

        Args:
          system: what the system says if the conversation does not; None: the template's default.
        """
        return list(_pieces(self._parts(conversation, self.default if system is None else system)))

    def beginning(self) -> list[Piece]:
        """The pieces of `begin`."""
        return list(_pieces(_unlearnt(self.begin)))

    def _parts(self, conversation: Conversation, system: str) -> Iterator[tuple[Part, bool]]:
        turns = conversation.turns
        told: tuple[str | Picture, ...] = (system,) if system else ()
        if turns[0].role == "system":
            told, turns = _stripped(turns[0]), turns[1:]
        yield from _unlearnt(self.begin)
        if told and not self.silent:
            told = (*self.system[0], *told, *self.system[1])
        if not self.inside and not self.silent:
            yield from _unlearnt(told)
        for number, turn in enumerate(turns):
            said = _stripped(turn)
            if turn.role == "user":
                if self.silent or self.images_first:
                    yield from _unlearnt(part for part in said if isinstance(part, Picture))
                    words = "".join(part for part in said if not isinstance(part, Picture))
                    said = (words.strip(),)
                if self.silent:
                    continue
                before, after = self.user
                first = told if self.inside and number == 0 else ()
                yield from _unlearnt((*before, *first, *said, *after))
            else:
                before, end = self.assistant
                opening, closing = self.answer
                document = bool(self.chunk) and len(turns) == 1
                if document:  # as it is
                    before, opening, closing = (), "", ""
                yield from _unlearnt(before)
                yield opening, True
                yield from self._chunks(said, document)
                yield closing, True
                # An image without its text is also how a caption is asked for: that an end follows
                # must not be learnt.
                alone = len(turns) == 1 and not turn.text.strip()
                for part in end:
                    yield part, not alone
                yield from _unlearnt(self.between)

    def _chunks(
        self, said: tuple[str | Picture, ...], document: bool
    ) -> Iterator[tuple[Part, bool]]:
        """An answer, or a document: what ends its chunks, between them."""
        pictures = [number for number, part in enumerate(said) if isinstance(part, Picture)]
        first = pictures[0] if document and pictures else 0
        for number, part in enumerate(said):
            # The part before an image is a text, or another image of the same chunk.
            if number > first and isinstance(part, Picture) and isinstance(said[number - 1], str):
                for end in self.chunk:
                    yield end, True
            yield part, number >= first


def _unlearnt(parts: Iterable[Part]) -> Iterator[tuple[Part, bool]]:
    for part in parts:
        yield part, False


def _stripped(turn: Turn) -> tuple[str | Picture, ...]:
    """What a turn says, without spaces and line breaks around it."""
    parts: list[str | Picture] = [
        Picture(part) if isinstance(part, int) else part for part in turn.parts
    ]
    if parts and not isinstance(parts[0], Picture):
        parts[0] = parts[0].lstrip()
    if parts and not isinstance(parts[-1], Picture):
        parts[-1] = parts[-1].rstrip()
    return tuple(parts)


def _pieces(parts: Iterable[tuple[Part, bool]]) -> Iterator[Piece]:
    """Texts side by side become one run, unless only one of them is learnt."""
    where, text, learnt = BEGIN, "", False
    for part, learns in parts:
        is_text = type(part) is str
        if text and not (is_text and learns == learnt):
            yield Piece(text, learnt, where)
            where, text = INSIDE, ""
        if is_text:
            text, learnt = text + part, learns
        else:
            yield Piece(part, learns, AFTER)
            # After what the tokenizer itself begins with, a text begins as if it stood alone.
            where = BEGIN if isinstance(part, Role) and part in (START, FIRST) else AFTER
    if text:
        yield Piece(text, learnt, where)


TEMPLATES: Registry[Template] = Registry("chat template")

TEMPLATES.register("chatml")(
    # Qwen, SmolLM. Models with a default system prompt of their own: see `system` of the config.
    Template(
        system=((Special("<|im_start|>"), "system\n"), (Special("<|im_end|>"), "\n")),
        user=((Special("<|im_start|>"), "user\n"), (Special("<|im_end|>"), "\n")),
        assistant=((Special("<|im_start|>"), "assistant\n"), (Special("<|im_end|>"),)),
        between=("\n",),
    )
)


def _headed(role: str) -> tuple[Part, ...]:
    return (Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n")


TEMPLATES.register("llama3")(
    Template(
        begin=(BOS,),
        system=(_headed("system"), (Special("<|eot_id|>"),)),
        user=(_headed("user"), (Special("<|eot_id|>"),)),
        assistant=(_headed("assistant"), (Special("<|eot_id|>"),)),
    )
)
TEMPLATES.register("llama2")(
    Template(
        system=(("<<SYS>>\n",), ("\n<</SYS>>\n\n",)),
        user=((BOS, "[INST] "), (" [/INST]",)),
        assistant=((), (EOS,)),
        answer=(" ", " "),
        inside=True,
    )
)
TEMPLATES.register("gemma")(
    # Gemma 2 has no system turn; Gemma 3 puts it before the user's words, and so do we.
    Template(
        begin=(BOS,),
        system=((), ("\n\n",)),
        user=((Special("<start_of_turn>"), "user\n"), (Special("<end_of_turn>"), "\n")),
        assistant=((Special("<start_of_turn>"), "model\n"), (Special("<end_of_turn>"),)),
        between=("\n",),
        inside=True,
    )
)
TEMPLATES.register("vicuna_v1")(
    # LLaVA 1.5.
    Template(
        begin=(START,),
        system=((), (" ",)),
        user=(("USER: ",), (" ",)),
        assistant=(("ASSISTANT:",), (EOS,)),
        answer=(" ", ""),
        default=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions."
        ),
    )
)
TEMPLATES.register("paligemma")(
    Template(user=((BOS,), ("\n",)), assistant=((), (EOS,)), images_first=True)
)
TEMPLATES.register("plain")(
    # LLaVA's alignment: images, then the caption. It ends with the end token, where LLaVA has a
    # line break, so that generation ends too. Nothing is learnt from an image that stands first:
    # what a language model makes of its first token hardly depends on the token, for the others use
    # it as a place to attend to when there is nothing else (Xiao et al., 2023).
    Template(begin=(FIRST,), user=((), ()), assistant=((), (EOS,)), silent=True)
)
TEMPLATES.register("caption")(
    # The same with a space before the caption, so that its words are those within a text.
    Template(begin=(FIRST,), user=((), ()), assistant=((), (EOS,)), answer=(" ", ""), silent=True)
)

TEMPLATES.register("stream")(
    # Unified models: what is said, in its order, and nothing else.
    Template(begin=(FIRST,), user=((), ()), assistant=((), (EOS,)))
)
TEMPLATES.register("qa")(
    # The prompts of BLIP-2 and Flamingo, turn by turn: a third fewer tokens than ChatML has.
    Template(
        begin=(START,),
        system=((), ("\n",)),
        user=(("Question: ",), (" ",)),
        assistant=(("Answer:",), (EOS,)),
        between=("\n",),
        answer=(" ", ""),
    )
)
TEMPLATES.register("openflamingo")(
    # OpenFlamingo, and Flamingo: an image, then its text, then the end of the chunk.
    Template(
        begin=(START,),
        user=(("Question:",), ("",)),
        assistant=((" Short answer:",), (Special("<|endofchunk|>"),)),
        chunk=(Special("<|endofchunk|>"),),
        images_first=True,
    )
)
TEMPLATES.register("interleaved")(
    # The same for language models whose end token ends chunks: none is new.
    Template(
        begin=(START,),
        user=(("Question: ",), (" ",)),
        assistant=(("Answer:",), (EOS,)),
        answer=(" ", ""),
        chunk=(EOS,),
        images_first=True,
    )
)


class ChatTokenizer:
    """Encodes the pieces of templates.

    Args:
      tokenizer: of the run.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.backend.to_str()) | {"truncation": None, "padding": None}
        continuing = _without_space(state)
        self._whole = tokenizers.Tokenizer.from_str(json.dumps(state))
        begin = inside = _text_only(state)
        if continuing != state:
            inside = _text_only(continuing)
        self._backends = {BEGIN: begin, AFTER: inside, INSIDE: inside}
        alone = begin.encode("a").ids
        added = self._whole.get_added_tokens_decoder()
        mark = next((added[index].content for index in sorted(added) if added[index].special), "")
        # Whether a text after a special token begins like one that stands alone.
        if mark and self._whole.encode(f"{mark}a", add_special_tokens=False).ids[1:] == alone:
            self._backends[AFTER] = begin
        whole = self._whole.encode("a").ids
        first = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        self._roles = {
            START: whole[:first],
            FIRST: whole[:first] or [eos if bos is None else bos],
            BOS: [bos],
            EOS: [eos],
        }
        # What the tokenizer ends a text with.
        self.end = np.asarray(whole[first + len(alone) :], np.int32)
        self._known: dict[tuple[str, str], np.ndarray] = {}

    def __reduce__(self):
        # The copies of the tokenizer would forget that special tokens are text to them.
        return (ChatTokenizer, (self._tokenizer,))

    def check(self, template: Template, name: str) -> None:
        """Checks that the tokenizer has the template's special tokens.

        Raises:
          ValueError: naming those it lacks.
        """
        parts = [
            part
            for group in (
                *template.system,
                *template.user,
                *template.assistant,
                template.begin,
                template.chunk,
            )
            for part in group
        ]
        lacking = sorted(
            {
                str(part)
                for part in parts
                if (isinstance(part, Special) and self._whole.token_to_id(part) is None)
                or (isinstance(part, Role) and None in self._roles[part])
            }
        )
        if lacking:
            raise ValueError(
                f"The tokenizer has not what the chat template {name!r} needs: "
                f"{', '.join(lacking)}. Choose another template "
                f"({', '.join(TEMPLATES.names())}), or the tokenizer that belongs to this one."
            )

    def learn(self, pieces: Iterable[Piece]) -> None:
        """Encodes the texts of many pieces at once, to be remembered."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new: dict[str, dict[str, None]] = {}
        for piece in pieces:
            if type(piece.part) is str and (piece.where, piece.part) not in self._known:
                new.setdefault(piece.where, {})[piece.part] = None
        for where, texts in new.items():
            encodings = self._backends[where].encode_batch_fast(list(texts))
            for text, encoding in zip(texts, encodings, strict=True):
                self._known[where, text] = np.asarray(encoding.ids, np.int32)

    def encode(self, piece: Piece) -> np.ndarray:
        """The ids of a piece that is no picture."""
        part = piece.part
        if isinstance(part, Role):
            return np.asarray(self._roles[part], np.int32)
        if isinstance(part, Special):
            return np.asarray([self._whole.token_to_id(part)], np.int32)
        known = self._known.get((piece.where, part))
        if known is None:
            known = np.asarray(self._backends[piece.where].encode(part).ids, np.int32)
            self._known[piece.where, part] = known
        return known

    def markers(self, text: str) -> np.ndarray:
        """The ids of text among visual tokens: special tokens are read as such."""
        key = ("markers", text)
        if key not in self._known:
            ids = self._whole.encode(text, add_special_tokens=False).ids
            self._known[key] = np.asarray(ids, np.int32)
        return self._known[key]


def _text_only(state: dict[str, Any]) -> tokenizers.Tokenizer:
    """Adds nothing to a text and sees no special tokens in it."""
    backend = tokenizers.Tokenizer.from_str(json.dumps({**state, "post_processor": None}))
    backend.encode_special_tokens = True
    return backend


def _without_space(state: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer that puts no space before a text."""
    return {
        **state,
        "normalizer": _continuing(state["normalizer"]),
        "pre_tokenizer": _continuing(state["pre_tokenizer"]),
    }


def _continuing(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    step = dict(step)
    if "add_prefix_space" in step:
        step["add_prefix_space"] = False
    if "prepend_scheme" in step:
        step["prepend_scheme"] = "never"
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            step[key] = [kept for kept in map(_continuing, step[key]) if kept is not None]
    return step
