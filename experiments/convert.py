"""Convert checkpoints: Hugging Face directories, GGUF files and Orbax checkpoints.

    python -m experiments.convert --source DIR --target NEW_DIR [--to hf|orbax|peft] [--verify]
    python -m experiments.convert --source checkpoint.safetensors --language-model DIR \\
        --image-encoder DIR --target NEW_DIR                           # OpenFlamingo's; and back:
    python -m experiments.convert --source DIR --target mine.safetensors --to openflamingo

The source is a directory of Hugging Face format, a GGUF file, the work directory of a run, or what
this command wrote as Orbax. By default the target has the other format (of a GGUF file: hf).
An Orbax target has the layout of a work directory, so that `config.init` can name it, and
`experiments.generate` speaks to it where the source had a tokenizer.
A checkpoint of OpenFlamingo has what was trained; the rest is in the directories of its language
model and of CLIP.
Adapters (LoRA) of a run, or of a directory of PEFT given as --adapter, are merged into the model;
--to peft writes the adapters alone, as PEFT loads them.
--verify compares with transformers, layer by layer, and fails where they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import mmjax
from experiments import common
from mmjax.config import ConfigError
from mmjax.convert import (
    load_adapter,
    load_openflamingo,
    save_adapter,
    save_openflamingo,
)
from mmjax.data.openflamingo import write_processor
from mmjax.data.sources import existing
from mmjax.registry import plugins
from mmjax.train.handover import is_run
from mmjax.train.runs import COMPANIONS, MODEL, PLUGINS, read_run


def main(argv: Sequence[str] | None) -> int:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--source", required=True, help="directory, or .gguf file")
    parser.add_argument("--target", help="a new directory; may be left out with --verify")
    formats = ("hf", "orbax", "peft", "openflamingo")
    parser.add_argument("--to", choices=formats, help="format of the target")
    parser.add_argument("--language-model", help="directory; of a checkpoint of OpenFlamingo")
    parser.add_argument("--image-encoder", help="directory of its CLIP")
    parser.add_argument("--adapter", help="directory of PEFT whose adapters the model is given")
    parser.add_argument("--base", help="name of the base model for --to peft; the source's origin")
    parser.add_argument("--architecture", help="class in transformers to save as, e.g. CLIPModel")
    parser.add_argument("--like", help="directory of transformers whose tokenizer files are taken")
    parser.add_argument("--dtype", help="of the tensors written; as they are by default")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="of a file of weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
    parser.add_argument("--verify", action="store_true", help="print the parity table")
    args = parser.parse_args(argv)
    if args.target is None and not args.verify:
        raise ConfigError("Give --target, or --verify to compare only.")
    if args.verify and (args.to == "peft" or args.adapter):
        raise ConfigError("--verify compares whole models: leave out --adapter and --to peft.")
    if args.base is not None and args.to != "peft":
        raise ConfigError("--base is named by what --to peft writes: leave it out.")
    parts = (args.language_model, args.image_encoder)
    if any(parts) and not all(parts):
        raise ConfigError("Give both --language-model and --image-encoder.")
    if args.verify and (any(parts) or args.to == "openflamingo"):
        raise ConfigError("--verify compares with transformers, which has no OpenFlamingo.")
    source = Path(args.source)
    run = is_run(source)
    to = args.to or ("orbax" if any(parts) or (source.is_dir() and not run) else "hf")
    target = None if args.target is None else Path(args.target)
    if target is not None:
        _check_target(source, target, overwrite=args.overwrite)
    if all(parts):
        model = load_openflamingo(source, *parts)
    elif run:
        model = read_run(source, merged=to != "peft")
    else:
        model = mmjax.from_pretrained(source)
    if args.adapter is not None:
        load_adapter(model, args.adapter, architecture=args.architecture)
    if to == "peft":
        if run:
            _check_adapters_only(model, source)
        save_adapter(
            model,
            target,
            base=args.base,
            architecture=args.architecture,
            overwrite=args.overwrite,
        )
    elif to == "openflamingo":
        save_openflamingo(model, target, dtype=args.dtype, overwrite=args.overwrite)
    elif target is not None:
        with _companions(args) as companions:
            if to == "orbax":
                write_orbax(model, target, args.dtype, companions)
            else:
                _to_hf(model, target, args, companions)
    if target is not None:
        print(f"{target} is written ({to}).", flush=True)
    if args.verify:
        return _verify(model, source, target, to)
    return 0


def write_orbax(model, directory: Path, dtype: str | None, companions: Path | None) -> None:
    """The parameters as an Orbax checkpoint, in the layout of a run's work directory.

    Args:
      companions: a directory whose tokenizer and processor files are copied.
    """
    import dataclasses

    import jax
    import orbax.checkpoint as ocp

    from mmjax.convert.save import copy_companions, whole_directory
    from mmjax.models import MODELS
    from mmjax.nn import lora
    from mmjax.params import split

    model = lora.merge(model)
    names = [name for name in MODELS if MODELS[name][1] is type(model)]
    if not names:
        raise ConfigError(
            f"A {type(model).__name__} has no name among mmjax's models, by which it could be "
            "built again: convert the whole model it is a part of."
        )
    _, params = split(model)
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    origin = vars(model).get("origin")
    content = {
        "model": {"name": names[0], **dataclasses.asdict(model.config)},
        "origin": origin and dataclasses.asdict(origin),
        PLUGINS: plugins(),
    }
    with whole_directory(directory) as scratch:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(scratch / "checkpoints" / "0" / "state", {"trainable": params})
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (scratch / MODEL).write_text(text, encoding="utf-8")
        if companions is not None:
            copy_companions(companions, scratch / COMPANIONS)


@contextlib.contextmanager
def _companions(args: argparse.Namespace) -> Iterator[Path]:
    """A directory with what there is of tokenizer and processor files."""
    source = Path(args.source)
    if args.like is not None:
        yield existing(args.like, "--like")
    elif args.language_model is not None:
        with tempfile.TemporaryDirectory() as scratch:
            write_processor(args.language_model, args.image_encoder, Path(scratch))
            yield Path(scratch)
    elif source.is_file():
        from mmjax.convert.gguf_tokenizer import read_tokenizer

        with tempfile.TemporaryDirectory() as scratch:
            read_tokenizer(source).save_pretrained(scratch)
            yield Path(scratch)
    elif (source / COMPANIONS).is_dir():
        yield source / COMPANIONS
    else:
        yield source


def _to_hf(model, target: Path, args: argparse.Namespace, companions: Path) -> None:
    mmjax.save_pretrained(
        model,
        target,
        architecture=args.architecture,
        like=companions,
        dtype=args.dtype,
        max_shard_size=int(args.max_shard_gb * 10**9),
        overwrite=args.overwrite,
    )


def _check_adapters_only(model, source: Path) -> None:
    """Raises ConfigError if a run trained what its adapters do not hold."""
    from mmjax import rules
    from mmjax.nn.lora import is_adapter
    from mmjax.params import split

    content = json.loads((source / "config.json").read_text("utf-8"))
    table = content["rules"]["trainable"]
    trained = rules.match(table, split(model)[1], name="rules.trainable")
    others = [path for path in trained if trained[path] and not is_adapter(path)]
    if others:
        raise ConfigError(
            f"{source} trained parameters besides its adapters, which a directory of PEFT does not "
            "hold:\n"
            + "\n".join(f"  {path}" for path in others[:20])
            + "\nWrite the merged model: --to hf."
        )


def _check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError("--source and --target are the same directory.")
    if not overwrite and target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} is there already and nothing was written: choose another --target, or say "
            "--overwrite."
        )


def _verify(model, source: Path, target: Path | None, to: str) -> int:
    """Compares with transformers, which reads the source or what was written."""
    from experiments._verify import parity_table

    hf = target if target is not None and to == "hf" else source
    if not (hf / "config.json").is_file() or is_run(hf):
        raise ConfigError(
            "--verify compares with a directory that transformers reads: the source or the target "
            "must be of Hugging Face format."
        )
    text, agrees = parity_table(model, hf)
    print(text, flush=True)
    return 0 if agrees else 1


if __name__ == "__main__":
    common.run(main)
