"""The embedder of a Hugging Face directory or of a run of our own, as commands take it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mmjax.config import ConfigError

if TYPE_CHECKING:
    from mmjax.search import Embedder


def add_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--weights, --batch-size and --dtype."""
    parser.add_argument(
        "--weights",
        required=required,
        help="a directory of Hugging Face format (CLIP, SigLIP, AltCLIP), or the work directory of "
        "a run",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time")
    parser.add_argument("--dtype", help="of the computation: float32 (default) or bfloat16")


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
    from mmjax.search import Embedder, fingerprint

    directory = Path(weights).expanduser()
    if not (directory / "checkpoints").is_dir():
        return Embedder.load(directory, batch_size=batch_size, dtype=dtype)

    from mmjax.data.run_processor import RunProcessor
    from mmjax.data.tokenizer import build_tokenizer
    from mmjax.train.runs import read_run

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
