"""The embedder of a Hugging Face directory or of a run of our own, as commands take it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def open_embedder(weights: str | Path, **options: Any) -> Embedder:
    """`mmjax.search.open_embedder`, which takes long to import."""
    from mmjax.search import open_embedder

    return open_embedder(weights, **options)
