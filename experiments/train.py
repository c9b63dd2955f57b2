"""Train an experiment, or resume it.

python -m experiments.train --config configs/siglip/openmoji.py --workdir runs/demo
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import common


def main(argv: Sequence[str] | None) -> int:
    """Returns 0; if the run was asked to stop and saved, 143 (SIGTERM) or 130 (Ctrl-C)."""
    args, config = common.parse(common.parser(__doc__), argv)
    from mmjax.train.loop import Preempted, train

    try:
        train(config, args.workdir)
    except Preempted as stopped:
        print(f"{stopped} Run the same command again to go on.", file=sys.stderr)
        return 128 + stopped.number
    print(f"Done: {args.workdir} holds metrics.jsonl, pictures and checkpoints.")
    return 0


if __name__ == "__main__":
    common.run(main)
