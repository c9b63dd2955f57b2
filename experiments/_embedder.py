"""The embedder of what a user names by --weights: a Hugging Face directory, or a run's workdir."""

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


def open_embedder(args: argparse.Namespace) -> Embedder:
    """The embedder that the arguments ask for.

    Raises:
      ValueError: not a model of images and texts, or not a whole one; the message says what.
    """
    from mmjax.search import Embedder, fingerprint

    directory = Path(args.weights).expanduser()
    if not (directory / "checkpoints").is_dir():
        return Embedder.load(directory, batch_size=args.batch_size, dtype=args.dtype)

    from experiments.convert import read_orbax
    from mmjax.data.run_processor import RunProcessor
    from mmjax.data.tokenizer import build_tokenizer

    if args.dtype:
        raise ConfigError("A run computes in the type it was trained in: leave --dtype out.")
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory} holds weights without preprocessing (what experiments.convert wrote as "
            "Orbax): give the directory of Hugging Face format, or the work directory of the run."
        )
    data = json.loads((directory / "config.json").read_text("utf-8"))["data"]
    return Embedder(
        read_orbax(directory),
        RunProcessor(data["train"], build_tokenizer(data, directory)),
        batch_size=args.batch_size,
        identity=fingerprint(directory, _run_files(directory)),
        directory=directory.absolute(),
    )


def _run_files(directory: Path) -> list[Path]:
    """What decides the embeddings: the config, the tokenizer, and the last checkpoint."""
    steps = [path for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(steps, key=lambda path: int(path.name))
    found = [directory / "config.json", *(directory / "tokenizer").glob("*")]
    return found + [path for path in (last / "state").rglob("*") if path.is_file()]
