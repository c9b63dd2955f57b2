"""What all commands share: arguments, distributed start, errors for people."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.registry import nearest


def parser(description: str, *, workdir: bool = True) -> argparse.ArgumentParser:
    """Arguments of every command that takes a config.

    Args:
      description: the command's module docstring.
      workdir: whether it needs --workdir.
    """
    result = argparse.ArgumentParser(
        description=description,
        epilog=(
            "Any key of the config can be set by --config.KEY=VALUE, such as\n"
            "  --config.seed=1\n"
            "  --config.data.train.sources.0.path=FILE     an entry of a tuple\n"
            "  --config.optimizer.options=\"{'b2': 0.95}\"  a whole group\n"
            "With --config FILE --help, FILE says what its ARGUMENTS are."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "--config", required=True, help="configs/....py, or configs/....py:ARGUMENTS"
    )
    if workdir:
        result.add_argument("--workdir", required=True, help="the run's own directory")
    group = result.add_argument_group("several processes (or set the variables JAX knows)")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the cluster that JAX detects (SLURM, MPI, TPU pods)",
    )
    group.add_argument("--coordinator", help="HOST:PORT of process 0, where none is detected")
    group.add_argument("--processes", type=int, help="number of processes")
    group.add_argument("--process", type=int, help="this process, from 0")
    return result


def plain_parser(doc: str) -> argparse.ArgumentParser:
    """Arguments of a command without a config.

    Args:
      doc: the command's module docstring.
    """
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def parse(
    result: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, ConfigDict]:
    """Arguments and config; unknown ones are errors that name the nearest.

    Raises:
      ConfigError: on anything that cannot be used.
    """
    _describe_config(result, argv)
    args, rest = result.parse_known_args(argv)
    overrides = []
    for item in rest:
        if item.startswith("--config."):
            overrides.append(item.removeprefix("--config."))
        else:
            known = [s for action in result._actions for s in action.option_strings]
            raise configs.ConfigError(
                f"Unknown argument {item!r}; {nearest(item.split('=')[0], known)} "
                "Keys of the config are set by --config.KEY=VALUE."
            )
    joins = args.distributed or args.coordinator
    if not joins and (args.processes, args.process) != (None, None):
        raise configs.ConfigError(
            "--processes and --process are of use only with --coordinator HOST:PORT (or with "
            "--distributed): without, this process would train alone."
        )
    config = configs.load(args.config, overrides)
    if joins:
        import jax

        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    return args, config


def _describe_config(result: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Adds to the help, if that is asked for, what the config file says of itself."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("-h", "--help", action="store_true")
    asked, _ = early.parse_known_args(argv)
    if asked.help and asked.config:
        file = asked.config.partition(":")[0]
        result.epilog += f"\n\n{file}:\n\n{configs.describe(asked.config)}"


class _NoMetadataWarning(logging.Filter):
    """Drops Orbax's warning that part of a checkpoint has no metadata of a whole one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Metadata file does not exist")


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a command. What a person can mend is told in a line or a few, and the exit code is 1.

    Errors that only a programmer can mend keep their traceback (as does everything if
    MMJAX_TRACEBACK is set).
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("absl", "faiss.loader", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("absl").addFilter(_NoMetadataWarning())
    try:
        code = main(None) or 0
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from what is saved.", file=sys.stderr)
        code = 130
        _leave_alone(code)
    except Exception as error:
        # JAX's errors are RuntimeErrors too; only ours are meant to be read without a traceback.
        ours = isinstance(error, ValueError | OSError | RuntimeError | ImportError) and type(
            error
        ).__module__.startswith(("mmjax", "builtins"))
        if not ours or os.environ.get("MMJAX_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}{_hint(error)}", file=sys.stderr)
        code = 1
        _leave_alone(code)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _hint(error: Exception) -> str:
    """What to do about errors of the operating system that say nothing themselves."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            "\nThe disk (or a quota) is full. What was saved is unharmed: free space, then run the "
            "same command again; a run resumes from its last whole checkpoint."
        )
    return ""


def _leave_alone(code: int) -> None:
    """Where one process of several failed, it leaves at once.

    JAX would first wait for the others, minutes long, while they wait for this one in a collective.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
