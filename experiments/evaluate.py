"""Evaluate a trained run: all of its evaluators, or those of another config with the same model.

    python -m experiments.evaluate --config configs/siglip/openmoji.py --workdir runs/siglip

The work directory is only read; pictures and the scores (evaluation-STEP.json) go to --output.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from experiments import common


def main(argv: Sequence[str] | None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--output", help="where pictures and scores go; WORKDIR/evaluation by default"
    )
    args, config = common.parse(parser, argv)
    import jax

    from mmjax.train import loop
    from mmjax.train import workdir as workdirs
    from mmjax.train.checkpoints import CheckpointError, restore_params
    from mmjax.train.experiment import prepare

    workdir = Path(args.workdir)
    if not (workdir / "config.json").exists():
        raise CheckpointError(
            f"{workdir} holds no run. Train it first: python -m experiments.train --config "
            f"{args.config} --workdir {workdir}"
        )
    output = Path(args.output) if args.output else workdir / "evaluation"
    output.mkdir(parents=True, exist_ok=True)
    experiment = prepare(config)
    tokenizer = loop.build_tokenizer(experiment, workdir)
    evaluators = loop.make_evaluators(experiment, tokenizer, output)
    step, params = restore_params(workdir / "checkpoints", experiment.target_params())
    scores = {}
    for name, (evaluator, _) in evaluators.items():
        result = evaluator.run(params)
        print(f"\n{name}, step {step}\n{evaluator.describe(result)}", flush=True)
        scores |= {f"eval/{name}/{metric}": float(value) for metric, value in result.items()}
    if jax.process_index() == 0:
        path = output / f"evaluation-{step}.json"
        workdirs.write_atomically(path, json.dumps({"step": step} | scores, indent=2))
        print(f"\nScores are in {path}.")
    return 0


if __name__ == "__main__":
    common.run(main)
