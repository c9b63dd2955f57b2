"""The embedder of a Hugging Face directory or of a run of our own."""

from __future__ import annotations

import json
from pathlib import Path

from mmjax.config import ConfigError
from mmjax.data.run_processor import RunProcessor
from mmjax.data.run_tokenizer import build_tokenizer
from mmjax.search.embed import Embedder, fingerprint


def open_embedder(
    weights: str | Path, *, batch_size: int = 32, dtype: str | None = None
) -> Embedder:
    """Images and texts into one space, by the model in a directory.

    Args:
      weights: a directory of Hugging Face format, or the work directory of a run.
      batch_size: images at a time.
      dtype: of the computation; float32 if None. A run computes in the type of its config.

    Raises:
      ValueError: not a model of images and texts, or not a whole one; the message says what.
    """
    directory = Path(weights).expanduser()
    if not (directory / "checkpoints").is_dir():
        return Embedder.load(directory, batch_size=batch_size, dtype=dtype)

    from mmjax.train.runs import read_run  # training evaluates, and an evaluator may come here

    if dtype:
        raise ConfigError("A run computes in the type of its config: leave --dtype out.")
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory} holds weights without preprocessing (what experiments.convert wrote as "
            "Orbax): give the directory of Hugging Face format, or the work directory of the run."
        )
    data = json.loads((directory / "config.json").read_text("utf-8"))["data"]
    return Embedder(
        read_run(directory),
        RunProcessor(data["train"], build_tokenizer(data, directory)),
        batch_size=batch_size,
        identity=fingerprint(directory, _run_files(directory)),
        directory=directory.absolute(),
    )


def _run_files(directory: Path) -> list[Path]:
    """What decides the embeddings: the config, the tokenizer, and the last checkpoint."""
    steps = [path for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(steps, key=lambda path: int(path.name))
    found = [directory / "config.json", *(directory / "tokenizer").glob("*")]
    return found + [path for path in (last / "state").rglob("*") if path.is_file()]
