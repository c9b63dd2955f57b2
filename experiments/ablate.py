"""Run a study: a grid of arms, each with a search of its learning rate and several seeds.

python -m experiments.ablate --study configs/ablate/digits.py --workdir runs/study

Its directory holds the runs, rows.csv and rows.parquet (a row for each run), summary.csv,
report.html with its figures, report.md and table.tex. The same command goes on after an
interruption. A run that fails does not stop the others; the command then ends with 1.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import common


def main(argv: Sequence[str] | None) -> int:
    """Returns 0, or 1 if runs failed."""
    result = common.plain_parser(__doc__)
    result.add_argument(
        "--study",
        "--config",
        required=True,
        help="a file with get_study(arg), or FILE:ARG",
    )
    result.add_argument("--workdir", required=True, help="the study's own directory")
    result.add_argument("--launcher", choices=("local", "slurm"), default="local")
    result.add_argument("--devices", help="CUDA devices to use here, such as 0,1")
    result.add_argument(
        "--processes", type=int, default=1, help="how many runs share a device, or the cores here"
    )
    args = result.parse_args(argv)
    from mmjax import study as studies

    study = studies.load_study(args.study)
    directory = Path(args.workdir)
    if args.launcher == "slurm":
        executor = studies.slurm(study, directory)
    else:
        devices = args.devices and args.devices.split(",")
        executor = studies.Local(devices or None, args.processes)
    # As by Ctrl-C: what runs here saves, and ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures = studies.run_study(study, directory, executor)
    print(f"Done: {directory} holds report.html, report.md, rows.csv and summary.csv.")
    if failures:
        print(f"{len(failures)} runs failed; report.md says why.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    common.run(main)
