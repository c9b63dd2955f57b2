"""Measurements, as ratios side by side in one run.

python -m experiments.bench contrastive [--size S/16] [--batch 16] [--dtype float32]
python -m experiments.bench loader
python -m experiments.bench loss-memory
python -m experiments.bench compile
python -m experiments.bench frozen
python -m experiments.bench generate [--weights DIR_OR_GGUF] [--batch 1 8]
python -m experiments.bench load
python -m experiments.bench vlm [--connectors mlp qformer]
python -m experiments.bench search [--images 10000]
python -m experiments.bench attention
python -m experiments.bench unified
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from experiments import common
from mmjax.config import ConfigError
from mmjax.registry import nearest

# What each measures stands in its module.
BENCHES = {
    "contrastive": "experiments._bench_contrastive",
    "loader": "experiments._bench_loader",
    "loss-memory": "experiments._bench_loss",
    "compile": "experiments._bench_compile",
    "frozen": "experiments._bench_frozen",
    "generate": "experiments._bench_generate",
    "vlm": "experiments._bench_vlm",
    "load": "experiments._bench_load",
    "search": "experiments._bench_search",
    "attention": "experiments._bench_attention",
    "unified": "experiments._bench_unified",
}


def main(argv: Sequence[str] | None) -> int:
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in BENCHES:
        raise ConfigError(f"There is no benchmark {name!r}; {nearest(name, BENCHES)}")
    return importlib.import_module(BENCHES[name]).main(rest)


if __name__ == "__main__":
    common.run(main)
