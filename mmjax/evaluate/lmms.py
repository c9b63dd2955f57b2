"""mmjax's models for lmms-eval, which has many public benchmarks.

    pip install lmms-eval
    python -m lmms_eval --model mmjax --model_args pretrained=DIR --batch_size 16 --tasks pope

The package metadata names `manifest` as an entry point of "lmms_eval.models", so that lmms-eval
finds the model. The interface is that of its "simple" models: a request has a text and a function
that gives its images. Source: `lmms_eval/api/model.py`, `api/instance.py` and
`docs/guides/model_guide.md` of github.com/EvolvingLMMs-Lab/lmms-eval, version 0.7.

lmms-eval is no dependency of mmjax, and this module is imported by it alone. The tests have a
stand-in for its interface, not its tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from mmjax.data.conversations import Conversation
from mmjax.evaluate.asking import batches
from mmjax.evaluate.chat import Prompt, open_speaker
from mmjax.sharding import MeshConfig, make_mesh

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError("mmjax.evaluate.lmms is for lmms-eval: pip install lmms-eval.") from error

log = logging.getLogger(__name__)

# Of tasks that do not say it, as in lmms-eval's own models.
NEW_TOKENS = 1024


def manifest() -> Any:
    """How lmms-eval knows the model: the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmjax", simple_class_path=f"{__name__}.{MMJax.__name__}")


class Asked(NamedTuple):
    """A question: its text, and a function that gives its images."""

    text: str
    visuals: Callable[[], Sequence[Any] | None]


class MMJax(lmms):
    """Any model that `open_speaker` opens. Models with a chat template, and runs, are asked in it;
    others continue the text.

    Args:
      pretrained: a directory of Hugging Face format, or the work directory of a run.
      batch_size: requests at a time.
      dtype: of the computation; see `open_speaker`.
      seed: of tasks that draw.
      data, fsdp, tensor: sizes of a mesh of devices; see `MeshConfig`.
      device, max_batch_size: lmms-eval gives them to all models; they have no meaning here.

    Raises:
      ValueError: see `open_speaker`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str | None = None,
        seed: int = 0,
        data: int = 1,
        fsdp: int = 1,
        tensor: int = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        del device, max_batch_size
        sizes = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        mesh = None if sizes == MeshConfig(data=1, fsdp=1, tensor=1) else make_mesh(sizes)
        self.speaker = open_speaker(pretrained, dtype=dtype, mesh=mesh)
        self.batch_size = int(batch_size)
        self._seed = seed

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes to each request, up to the first of its stop strings."""
        asked, settings = [], []
        for request in requests:
            text, options, to_visuals, doc_id, task, split = request.args
            asked.append(self._asked(text, to_visuals, doc_id, task, split))
            settings.append(options)
        texts = self._write(asked, settings)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return texts

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each request's rounds. The task says what is asked next."""
        rounds: list[list[str]] = [[] for _ in requests]
        info: list[Any] = [None] * len(requests)
        asked: dict[int, Asked] = {}
        for row, request in enumerate(requests):
            text, _, to_visuals, _, doc_id, task, split = request.args
            asked[row] = self._asked(text, to_visuals, doc_id, task, split)
        number = 0
        while asked:
            texts = self._write(list(asked.values()), [requests[row].args[1] for row in asked])
            number += 1
            for row, text in zip(list(asked), texts, strict=True):
                rounds[row].append(text)
                to_next, doc_id, task, split = requests[row].args[3:]
                visuals, following, done, answers, info[row] = to_next(
                    self.task_dict[task][split][doc_id],
                    previous_output=rounds[row],
                    round_idx=number,
                    previous_round_info=info[row],
                )
                rounds[row] = list(answers)
                asked[row] = Asked(following, lambda visuals=visuals: visuals)
                if done:
                    del asked[row]
        return rounds

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each answer its loss, and whether the model would write just this.

        The loss is the mean negative log probability of the answer's tokens, its end included if
        there is a template. That is what lmms-eval's own models return and what its tasks take the
        smallest of (`api/task.py`), though the interface calls it a log probability.
        """
        asked, answers = [], []
        for request in requests:
            text, target, *rest = request.args
            # Of unconditional likelihoods nothing else is given.
            asked.append(self._asked(text, *rest) if rest else Asked(text, lambda: ()))
            answers.append(self._answer(target, *rest[1:]))
        results: list[Any] = [None] * len(requests)
        sizes = [(len(one.text), len(answer)) for one, answer in zip(asked, answers, strict=True)]
        for rows in self._batches(range(len(requests)), sizes):
            pairs = [self._answered(asked[row], answers[row]) for row in rows]
            prompts, said = [prompt for prompt, _ in pairs], [ids for _, ids in pairs]
            found = self.speaker.likelihoods(prompts, said)
            written = self.speaker(prompts, max_new_tokens=max(map(len, said)), pad_id=0).tokens
            for row, likelihood, ids, tokens in zip(rows, found, said, written, strict=True):
                results[row] = -likelihood.mean, tokens[: len(ids)].tolist() == ids.tolist()
        return results

    def _asked(self, text: str, to_visuals: Callable, doc_id: int, task: str, split: str) -> Asked:
        return Asked(text, lambda: to_visuals(self.task_dict[task][split][doc_id]))

    def _answer(self, target: Any, *document: Any) -> str:
        if isinstance(target, str):
            return target
        doc_id, task, split = document
        return target(self.task_dict[task][split][doc_id])

    def _prompt(self, asked: Asked) -> Prompt:
        images, speech = _images(asked), self.speaker.speech
        if not speech.chats:
            return speech.text(asked.text, images)
        return speech.prompt(self._conversation(asked.text, images))

    def _answered(self, asked: Asked, answer: str) -> tuple[Prompt, np.ndarray]:
        images, speech = _images(asked), self.speaker.speech
        if not speech.chats:
            return speech.continued(asked.text, images, answer)
        return speech.answered(self._conversation(asked.text, images), answer)

    def _conversation(self, text: str, images: list[Image.Image]) -> Conversation:
        return Conversation((self.speaker.turn(text, len(images)),), tuple(images))

    def _write(self, asked: Sequence[Asked], settings: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the model writes to each question; those with the same settings go together."""
        groups: dict[_Settings, list[int]] = {}
        for row, options in enumerate(settings):
            groups.setdefault(_settings(options), []).append(row)
        texts = [""] * len(asked)
        key = jax.random.key(self._seed)
        for (options, stops), members in groups.items():
            given = dict(options)
            if given["num_beams"] == 1:
                given["stop_strings"] = stops
            for rows in self._batches(members, [(len(one.text),) for one in asked]):
                # A row draws the same, whatever its neighbours.
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(rows))
                generated = self.speaker(
                    [self._prompt(asked[row]) for row in rows], **given, key=keys
                )
                for row, text in zip(rows, self.speaker.texts(generated), strict=True):
                    texts[row] = _cut(text, stops)
        return texts

    def _batches(
        self, rows: Sequence[int], sizes: Sequence[tuple[int, ...]]
    ) -> Iterator[list[int]]:
        """Rows of similar sizes, always `batch_size` of them: the last ones are repeated."""
        chosen = list(batches([sizes[row] for row in rows], self.batch_size))
        for batch in tqdm(chosen, disable=self.rank != 0, desc="mmjax"):
            yield [rows[index] for index in batch]


# Options of `Generator.__call__`, and stop strings.
_Settings = tuple[tuple[tuple[str, Any], ...], tuple[str, ...]]
_KNOWN = {"max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "until"}


def _settings(options: Mapping[str, Any]) -> _Settings:
    """What a task says of its answers."""
    for name in sorted(options.keys() - _KNOWN):
        log.debug("The option %r of a task is not used.", name)
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(filter(None, until))
    temperature = options.get("temperature") or 0.0
    draws = options.get("do_sample", temperature > 0)
    given = {"max_new_tokens": options.get("max_new_tokens", NEW_TOKENS), "num_beams": 1}
    if draws:
        # Tasks say top_p=0 or 1, and top_k=0, where all may be drawn.
        top_p, top_k = options.get("top_p") or 1.0, options.get("top_k") or None
        given |= {"temperature": temperature or 1.0, "top_k": top_k}
        given["top_p"] = top_p if top_p < 1 else None
    else:
        given["num_beams"] = options.get("num_beams") or 1
    return tuple(given.items()), stops


def _images(asked: Asked) -> list[Image.Image]:
    """
    Raises:
      ValueError: if there is something else than images.
    """
    visuals = list(asked.visuals() or ())
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise ValueError(
                f"A task shows a {type(visual).__name__} ({str(visual)[:60]!r}): mmjax's models "
                "are shown images only, no video files and no sound."
            )
    return visuals


def _cut(text: str, stops: Sequence[str]) -> str:
    """Up to the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
