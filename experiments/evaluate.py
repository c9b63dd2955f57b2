"""Evaluate a trained run, or published weights, by all evaluators of a config.

    python -m experiments.evaluate --config configs/siglip/openmoji.py --workdir runs/siglip
    python -m experiments.evaluate --config my_evals.py --weights DIR [--workdir DIR]

A run is evaluated by its own config, or by another one with the same model. Its work directory is
only read; pictures and the scores (evaluation-STEP.json) go to --output.

Weights are a directory of Hugging Face format, or what experiments.convert wrote as Orbax. The
model is theirs: `model`, `init`, `lora` and `rules` of the config do not count, its `data` (the
tokenizer, which must be that of the weights) and `evals` do. Pictures and scores
(evaluation-0.json) go to --workdir; without it scores are only printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import common
from mmjax.config import ConfigError


def main(argv: Sequence[str] | None) -> int:
    args, config = common.parse(_parser(), argv)
    import jax

    from mmjax.train import loop
    from mmjax.train import workdir as workdirs
    from mmjax.train.checkpoints import restore_params
    from mmjax.train.experiment import load_initial, prepare

    _check(args)
    with contextlib.ExitStack() as stack:
        if args.weights is None:
            workdir = Path(args.workdir)
            check_model(config, workdir)
            output = Path(args.output) if args.output else workdir / "evaluation"
        else:
            config = with_weights(config, args.weights, args.dtype)
            named = args.workdir or stack.enter_context(tempfile.TemporaryDirectory())
            workdir = output = Path(named)
        output.mkdir(parents=True, exist_ok=True)
        experiment = prepare(config)
        tokenizer = loop.build_tokenizer(experiment, workdir)
        evaluators = loop.make_evaluators(experiment, tokenizer, output)
        if args.weights is None:
            step, params = restore_params(workdir / "checkpoints", experiment.target_params())
        else:
            step, params = 0, load_initial(experiment)
        which = f"step {step}" if args.weights is None else args.weights
        scores: dict[str, Any] = {"step": step} if args.weights is None else {"weights": which}
        for name, (evaluator, _) in evaluators.items():
            result = evaluator.run(params)
            print(f"\n{name}, {which}\n{evaluator.describe(result)}", flush=True)
            scores |= {f"eval/{name}/{metric}": float(value) for metric, value in result.items()}
        if jax.process_index() == 0 and (args.weights is None or args.workdir is not None):
            path = output / f"evaluation-{step}.json"
            workdirs.write_atomically(path, json.dumps(scores, indent=2))
            print(f"\nScores are in {path}.")
    return 0


def check_model(config: ConfigDict, workdir: Path) -> None:
    """
    Raises:
      ConfigError: if the run's model computes something else than the config's.
    """
    from mmjax.convert.save import difference
    from mmjax.train.handover import model_dataclass

    trained = json.loads((workdir / "config.json").read_text("utf-8"))["model"]
    differing = difference(model_dataclass(config.model.to_dict()), model_dataclass(trained))
    if differing:
        raise ConfigError(
            f"{workdir} was trained with another model than the config's: {', '.join(differing)}. "
            "Give the config, with the arguments, that it was trained with."
        )


def with_weights(config: ConfigDict, weights: str | Path, dtype: str | None = None) -> ConfigDict:
    """A config whose model, and all of its parameters, are those of published weights.

    Args:
      weights: a directory of Hugging Face format or a GGUF file, or what experiments.convert wrote
        as Orbax.
      dtype: of the computation; None: as the weights' own config says (float32 for Hugging Face
        format).

    Raises:
      ConfigError: if a run is there, or the config's tokenizer is one that a run trains.
      ConversionError: if no model is there.
    """
    from mmjax import convert
    from mmjax.convert.load import with_fields
    from mmjax.data.tokenizer import TRAINERS
    from mmjax.paths import located
    from mmjax.train.experiment import RulesConfig
    from mmjax.train.handover import is_run, model_dataclass
    from mmjax.train.runs import MODEL, import_plugins

    tokenizer = config.data.tokenizer
    if tokenizer is not None and tokenizer.name in TRAINERS:
        raise ConfigError(
            f"config.data.tokenizer {tokenizer.name!r} is trained on the data, but weights come "
            'with a tokenizer: set it to dict(name="hf", directory=...).'
        )
    directory = located(weights)
    if (directory / MODEL).is_file():
        import_plugins(directory)
        model = json.loads((directory / MODEL).read_text("utf-8"))["model"]
    elif directory.is_dir() and is_run(directory):
        raise ConfigError(f"{directory} holds a run: give it as --workdir, without --weights.")
    else:
        model = convert.model_config(directory)
    if dtype is not None:
        fields = dataclasses.asdict(with_fields(model_dataclass(model), dtype=dtype))
        model = {"name": model["name"]} | fields
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model = ConfigDict(model)
        config.init = ((".*", str(directory), r"\g<0>"),)
        config.lora = None
        config.rules = ConfigDict(vars(RulesConfig()))
    return config


def _check(args: argparse.Namespace) -> None:
    """Raises an error on arguments that do not go together."""
    from mmjax.train.checkpoints import CheckpointError
    from mmjax.train.handover import is_run

    if args.weights is None:
        if args.workdir is None:
            raise ConfigError("Give --workdir, of a run, or --weights, of a model.")
        if args.dtype is not None:
            raise ConfigError("A run computes in the type of its config: leave --dtype out.")
        if not (Path(args.workdir) / "config.json").exists():
            raise CheckpointError(
                f"{args.workdir} holds no run. Train it first: python -m experiments.train "
                f"--config {args.config} --workdir {args.workdir}"
            )
        return
    if args.output is not None:
        raise ConfigError("With --weights all is written to --workdir: leave --output out.")
    if args.workdir is not None and is_run(Path(args.workdir)):
        raise ConfigError(
            f"{args.workdir} holds a run: give another --workdir for scores of --weights, or leave "
            "--weights out to evaluate the run."
        )


def _parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, workdir=False)
    parser.add_argument("--workdir", help="of a run; with --weights, where results go")
    parser.add_argument("--weights", help="a directory of a model instead of a run")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="with --weights: of the computation"
    )
    parser.add_argument(
        "--output", help="of a run: where pictures and scores go; WORKDIR/evaluation by default"
    )
    return parser


if __name__ == "__main__":
    common.run(main)
