"""The tokenizer of a run: of files, trained on the run's own texts, or of another run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmjax.config import split_name
from mmjax.data.chat import TEMPLATES
from mmjax.data.records import BadRecordError, get_field
from mmjax.data.sources import open_source
from mmjax.data.spec import DataSpec, call_strictly, parse, plain
from mmjax.data.tfds_source import locked
from mmjax.data.tokenizer import (
    READERS,
    TRAINERS,
    Tokenizer,
    TrainedTokenizer,
    train_tokenizer,
)


def captions_of(record: dict[str, Any], spec: DataSpec, record_id: str) -> list[str]:
    """All captions of a record, those of the field `also` included."""
    captions: list[str] = []
    for field in (spec.text.field, spec.text.also):
        if field is not None:
            value = get_field(record, field, record_id)
            captions += value if isinstance(value, (list, tuple)) else [value]
    return [caption for caption in captions if isinstance(caption, str) and caption.strip()]


def _texts(spec: DataSpec, limit: int) -> Iterator[str]:
    """The captions, or what is said in the conversations, of at most about `limit` records."""
    said = spec.conversation
    sources = [open_source(config)[0] for config in spec.sources]
    total = sum(len(source) for source in sources)
    stride = max(1, -(-total // limit))
    for k, source in enumerate(sources):
        for index in range(0, len(source), stride):
            if said is None:
                yield from captions_of(source[index], spec, source.id(index))
                continue
            # What is wrong with a record is said when it is used.
            with contextlib.suppress(BadRecordError):
                conversation = spec.forms[k](source[index], source.id(index), None)
                template, system = TEMPLATES[said.template], said.system
                for one in conversation.split():
                    parts = (piece.part for piece in template.render(one, system))
                    # Special tokens and images are between words: what they part is not one.
                    for is_text, run in itertools.groupby(parts, lambda part: type(part) is str):
                        if is_text:
                            yield "".join(run)


def build_tokenizer(data_config: Any, workdir: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer of `config.data`; one that is trained is kept in `workdir/tokenizer`.

    `data.tokenizer` is None (no text), `dict(name="hf", directory=...)`,
    `dict(name="gguf", path=...)`, or
    `dict(name="bpe" | "wordpiece" | "wordlevel", vocab_size=..., captions=200_000)`, trained on at
    most about `captions` captions or conversations of `data.train`, evenly spread (also
    `special_tokens=("<image>", ...)`, with the ids from 4 on); or
    `dict(name="run", directory=...)`, a copy of the one that another run trained, for a stage that
    takes its table of tokens. Safe to call from several processes.

    Raises:
      ValueError: unknown name or field, a run that trained none, or the kept tokenizer was made
        with another config.
    """
    data = plain(data_config)
    if data.get("tokenizer") is None:
        return None
    name, arguments = split_name(data["tokenizer"], "data.tokenizer")
    if name in READERS:
        return call_strictly(f"tokenizer {name!r}", READERS[name], arguments)

    def train(
        vocab_size: int, captions: int = 200_000, special_tokens: Sequence[str] = ()
    ) -> TrainedTokenizer:
        spec = parse(data["train"])
        if spec.text is None and spec.conversation is None:
            raise ValueError("data.tokenizer is set, but data.train has no text to train it on.")
        return train_tokenizer(name, _texts(spec, captions), vocab_size, special_tokens)

    make = _of_run
    if name != "run":
        TRAINERS[name]  # an unknown name is said before anything is read
        make = train
    directory = Path(workdir).expanduser() / "tokenizer"
    if not directory.exists():
        with locked(directory.with_name(".tokenizer.lock")):
            if not directory.exists():  # another process may have made it while this one waited
                _keep(call_strictly(f"tokenizer {name!r}", make, arguments), data, directory)
    kept = json.loads((directory / "config.json").read_text())
    if kept != data["tokenizer"]:
        raise ValueError(
            f"{directory} was trained with {kept}, but the config says {data['tokenizer']}: use "
            "another workdir, or remove that directory if nothing was trained with it."
        )
    return TrainedTokenizer.load(directory)


def _of_run(directory: str) -> TrainedTokenizer:
    kept = Path(directory).expanduser() / "tokenizer"
    if not kept.is_dir():
        raise ValueError(
            f"There is no {kept}: data.tokenizer is that of a run which trained one. Give the work "
            'directory of such a run, or dict(name="hf", directory=...) for a published one.'
        )
    return TrainedTokenizer.load(kept)


def _keep(tokenizer: TrainedTokenizer, data: dict[str, Any], directory: Path) -> None:
    """Writes the directory so that it appears whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=".tokenizer.", dir=directory.parent))
    try:
        tokenizer.save(temporary)
        (temporary / "config.json").write_text(json.dumps(data["tokenizer"], sort_keys=True))
        os.replace(temporary, directory)
    except OSError:
        # A host that does not share our lock (network disks) may have made the same one first.
        if not directory.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
