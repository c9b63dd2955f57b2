"""OpenFlamingo's checkpoints, both ways.

    model = load_openflamingo("checkpoint.safetensors", "mpt-7b", "clip-vit-large-patch14")
    save_openflamingo(model, "mine.safetensors")

Awadalla et al., "OpenFlamingo: An Open-Source Framework for Training Large Autoregressive
Vision-Language Models" (2023). A checkpoint holds what was trained: the Perceiver resampler, the
gated blocks and the language model's tables of tokens, those of `<|endofchunk|>` and `<image>`
among them. Everything else is in the directories of the language model and of CLIP, which it was
trained with.

The features are the patches after CLIP's last block and before its final norm, as open_clip gave
them when these models were trained (until its version 2.22; later ones give them after the norm).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax import rules as rule_tables
from mmjax.connectors import PerceiverConfig
from mmjax.convert import files
from mmjax.convert.families import _vlm
from mmjax.convert.family import Family, Origin
from mmjax.convert.kinds import ARRAY, LINEAR, NORM, Kind, Leaf, Transform, array, fused
from mmjax.convert.load import (
    Checkpoint,
    float_dtype,
    load,
    open_checkpoint,
    placement,
    with_fields,
)
from mmjax.convert.save import difference, item, refuse_existing
from mmjax.convert.table import ConversionError, Row, lay_out, rename
from mmjax.models import Flamingo, FlamingoConfig, LMConfig, ViTConfig
from mmjax.models.flamingo import GatedConfig
from mmjax.nn import lora
from mmjax.params import merge, split

ENCODER = _vlm.tower("vision_encoder.", ("clip_vision_model",))
TEXT = _vlm.language_model("lang_encoder.")
PERCEIVER, HEAD_DIM = "perceiver.", 64
# Of the classes that hold a CLIP, its image tower and where that stands.
CLIPS = {
    "CLIPModel": (lambda config: config.image, "vision_model."),
    "CLIPVisionModel": (lambda config: config, ""),
}
# Wrappers of distributed training and of gradient checkpointing leave their names.
WRAPPED = ((r"^module\.", ""), (r"_checkpoint_wrapped_module\.", ""))
# Frozen, and in open_clip's names; the language model's blocks a second time.
REPEATED = r"vision_encoder\..*|lang_encoder\.old_decoder_blocks\..*"
# The gated blocks are modules of two others, and old checkpoints have them under both names.
LISTED, IN_PLACE = r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.", ".gated_cross_attn_layer."
# How a pickle becomes a file that we read.
COMMAND = (
    "import torch; from safetensors.torch import save_file; "
    "s = torch.load({source!r}, map_location='cpu', weights_only=True); "
    "s = s.get('model_state_dict', s); "
    "save_file({{k: v.clone().contiguous() for k, v in s.items()}}, {target!r})"
)


def load_openflamingo(
    checkpoint: str | Path,
    language_model: str | Path,
    image_encoder: str | Path,
    *,
    new_tokens: int | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: rule_tables.Table | None = None,
) -> Flamingo:
    """The model of a checkpoint and of the directories that it was trained with.

    Args:
      checkpoint: a safetensors file. The published pickles are to be converted first; the error
        says how.
      language_model: directory of transformers, of GPT-NeoX or MPT for instance. The checkpoint's
        tables of tokens take the place of its own.
      image_encoder: directory of a `CLIPModel` or `CLIPVisionModel`.
      new_tokens: those that the tokenizer got: `<|endofchunk|>`, `<image>` and, where it had none
        for padding, that. None: those that the tokenizer in the language model's directory lacks.
      dtype, mesh, rules: as in `from_pretrained`.

    Raises:
      ConversionError: if the checkpoint is a pickle, is damaged, or does not fit the directories;
        all problems are listed, and nothing is loaded.
    """
    checkpoint = Path(checkpoint)
    trained = _open(checkpoint)
    text, images = open_checkpoint(language_model), open_checkpoint(image_encoder)
    if not isinstance(text.config, LMConfig):
        raise ConversionError(
            f"{language_model} is a {text.origin.architecture}: take the directory of a "
            "decoder-only language model."
        )
    if images.origin.architecture not in CLIPS:
        raise ConversionError(
            f"{image_encoder} is a {images.origin.architecture}: take the directory of a "
            f"{' or '.join(CLIPS)}."
        )
    tower_of, prefix = CLIPS[images.origin.architecture]
    names = _canonical(trained.shapes, text.family, _blocks(text.config), str(checkpoint))
    shapes = {name: trained.shapes[there] for name, there in names.items()}
    tables = _tables(text.config)
    lacking = [name for name in tables if name not in shapes]
    if lacking:
        raise ConversionError(
            f"{checkpoint} lacks {', '.join(lacking)}: it has no vectors for <image> and "
            "<|endofchunk|>, without which the model is not what was trained."
        )
    count = shapes[tables[0]][0]
    if new_tokens is None:
        new_tokens = _new_tokens(text.origin.directory, count)
    dtype = float_dtype(jnp.float32 if dtype is None else dtype)
    lm = dataclasses.replace(text.config, vocab_size=count - new_tokens)
    try:
        config = _config(shapes, lm, tower_of(images.config), new_tokens)
    except ValueError as error:
        raise ConversionError(f"{checkpoint}: {error}") from error
    parts = {
        **_part(images, ENCODER.theirs, prefix),
        **_part(text, TEXT.theirs),
        **{name: (trained, there) for name, there in names.items()},
    }
    tensors = _Joined(str(checkpoint), parts)
    joined = Checkpoint(
        origin=Origin("OpenFlamingo", "{}", str(checkpoint)),
        family=FORMAT,
        config=with_fields(config, dtype=dtype.name),
        tensors=tensors,
        file_names={name: name for name in parts},
    )
    return merge(*load(joined, placement(mesh, rules), lambda path, shape: dtype))


def save_openflamingo(
    model: Flamingo, file: str | Path, *, dtype: Any = None, overwrite: bool = False
) -> None:
    """Writes a checkpoint, safetensors with the names that OpenFlamingo gives its tensors.

    `load_state_dict(..., strict=False)` of its model takes them. The language model's blocks and
    the encoder are not in there: they are frozen in OpenFlamingo. Adapters (LoRA) are merged, so
    those of gated blocks are. With several processes all call this, and the first writes.

    Args:
      file: to write.
      dtype: of all tensors; None keeps each as it is here.
      overwrite: whether the file may be there already; it is then replaced.

    Raises:
      FileExistsError: if it is, and may not.
      ConversionError: if OpenFlamingo computes something else than this model.
    """
    file = Path(file).absolute()
    refuse_existing(file, overwrite=overwrite)
    model = lora.merge(model)
    _, params = split(model)
    config = model.config
    if config.new_tokens < 2:
        raise ConversionError(
            f"OpenFlamingo adds <|endofchunk|> and <image> to the language model's tokens, but "
            f"there are new_tokens={config.new_tokens}."
        )
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
    tables = _tables(config.lm)
    entries = [
        entry
        for entry in lay_out(rows(config), shapes)
        if entry.name in tables or entry.name.startswith(PERCEIVER) or IN_PLACE in entry.name
    ]
    theirs = {entry.name: entry.shape for entry in entries}
    differing = difference(
        _config(theirs, config.lm, config.encoder, config.new_tokens), _in_full(config)
    )
    if differing:
        raise ConversionError(f"OpenFlamingo cannot say {', '.join(differing)}.")
    dtype = None if dtype is None else float_dtype(dtype)
    first = jax.process_index() == 0
    scratch = file.with_name(f".{file.name}.new")
    if first:
        file.parent.mkdir(parents=True, exist_ok=True)
    files.write_file(scratch, [item(entry, params, dtype) for entry in entries], write=first)
    if first:
        os.replace(scratch, file)


def rows(config: FlamingoConfig) -> Sequence[Row]:
    """The table of the whole: what is trained, and the parts that are not."""
    tables = {
        "lm/token": ("new_token", _table(config.lm.vocab_size)),
        "lm/head": ("new_head", fused(config.lm.vocab_size, config.new_tokens)),
    }
    language = [
        row._replace(ours=(row.ours, tables[row.ours][0]), kind=tables[row.ours][1])
        if row.ours in tables
        else row
        for row in TEXT.rows(config.lm)
    ]
    latent, here = PERCEIVER + "layers.*.", "connector/resampler/"
    gated = [
        row._replace(first=config.after, step=config.every)
        for row in _gated_rows(f"{_blocks(config.lm)}.*{IN_PLACE}", "gated/layers/")
    ]
    return (
        *ENCODER.rows(config.encoder),
        Row(PERCEIVER + "latents", here + "latents", ARRAY),
        Row(latent + "0.norm_media", here + "blocks/layers/context_norm", NORM),
        Row(latent + "0.norm_latents", here + "blocks/layers/attention_norm", NORM),
        *_attention_rows(latent + "0.", here + "blocks/layers/attention/"),
        *_mlp_rows(latent + "1.", here + "blocks/layers/"),
        Row(PERCEIVER + "norm", here + "final_norm", NORM),
        *gated,
        *language,
    )


def _gated_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    gate = array((1,), ())
    return (
        Row(theirs + "attn.norm", ours + "attention_norm", NORM),
        *_attention_rows(theirs + "attn.", ours + "attention/"),
        Row(theirs + "attn_gate", ours + "attention_gate", gate),
        *_mlp_rows(theirs + "ff.", ours),
        Row(theirs + "ff_gate", ours + "mlp_gate", gate),
    )


def _attention_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(theirs + "to_q", ours + "query", LINEAR),
        Row(theirs + "to_kv", (ours + "key", ours + "value"), fused(1, 1)),
        Row(theirs + "to_out", ours + "out", LINEAR),
    )


def _mlp_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(theirs + "0", ours + "mlp_norm", NORM),
        Row(theirs + "1", ours + "mlp/up", LINEAR),
        Row(theirs + "3", ours + "mlp/down", LINEAR),
    )


@functools.cache
def _table(own: int) -> Kind:
    """A table of tokens whose last ones are new."""
    both = Transform(lambda x: (x[:own], x[own:]), lambda *xs: jnp.concatenate(xs))
    return (Leaf(".weight", "/embedding", both),)


def ignored(config: FlamingoConfig) -> Sequence[str]:
    return (*ENCODER.ignored(config.encoder), *TEXT.ignored(config.lm))


def _no_class(_: Any) -> NoReturn:
    raise ConversionError("transformers has no class for OpenFlamingo.")


# There is no config.json: shapes of tensors and the configs of both parts say all; see `_config`.
FORMAT = Family(
    model_type="openflamingo",
    model=Flamingo,
    from_hf=_no_class,
    to_hf=_no_class,
    rows=rows,
    ignored=ignored,
)


def _config(
    shapes: Mapping[str, tuple[int, ...]], lm: LMConfig, encoder: ViTConfig, new_tokens: int
) -> FlamingoConfig:
    """What tensors of these shapes (canonical names) compute.

    Raises:
      ValueError: if there are none, or they do not fit the language model.
    """

    def size(name: str) -> int:
        if name not in shapes:
            raise ConversionError(f"no checkpoint of OpenFlamingo: it lacks {name!r}.")
        return shapes[name][0]

    pattern = rf"{re.escape(_blocks(lm))}\.(\d+){re.escape(IN_PLACE)}"
    layers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    if not layers:
        raise ConversionError(
            f"no gated block stands among {_blocks(lm)!r}: is it another language model's?"
        )
    look = f"{_blocks(lm)}.{min(layers)}{IN_PLACE}"
    every = min(layers) + 1
    depth = len(
        [name for name in shapes if re.fullmatch(r"perceiver\.layers\.\d+\.1\.1\.weight", name)]
    )
    return FlamingoConfig(
        encoder=encoder,
        connector=PerceiverConfig(
            latents=size(PERCEIVER + "latents"),
            depth=depth,
            heads=size(PERCEIVER + "layers.0.0.to_q.weight") // HEAD_DIM,
            head_dim=HEAD_DIM,
            activation="gelu",
            projection=None,
        ),
        lm=lm,
        # The first of the new ones is "<|endofchunk|>".
        image_token=lm.vocab_size + 1,
        features=(-1,),
        gated=GatedConfig(
            heads=size(look + "attn.to_q.weight") // HEAD_DIM,
            head_dim=HEAD_DIM,
            mlp_width=size(look + "ff.1.weight"),
        ),
        new_tokens=new_tokens,
        every=every,
        after=every - 1,
        context_width=encoder.width,
    )


def _in_full(config: FlamingoConfig) -> FlamingoConfig:
    """With the widths that None stands for."""
    width = config.gated.mlp_width
    width = 4 * config.lm.width if width is None else width
    return dataclasses.replace(
        config,
        context_width=config.visual_width,
        gated=dataclasses.replace(config.gated, mlp_width=width),
    )


def _blocks(lm: LMConfig) -> str:
    """Where the blocks of a language model are: "lang_encoder.gpt_neox.layers"."""
    return next(row.theirs for row in TEXT.rows(lm) if "*" in row.theirs).split(".*.")[0]


def _tables(lm: LMConfig) -> list[str]:
    """Names of the table of tokens and of the head, if that is another one."""
    ours = ("lm/token",) if lm.tied else ("lm/token", "lm/head")
    theirs = {row.ours: row.theirs + ".weight" for row in TEXT.rows(lm)}
    return [theirs[path] for path in ours]


def _canonical(names: Iterable[str], family: Family, blocks: str, where: str) -> dict[str, str]:
    """Canonical name -> the name in the checkpoint, for what is of use in it.

    Args:
      family: of the language model.
      blocks: see `_blocks`.
    """
    plain = rename(names, WRAPPED, where)
    used = [name for name in plain if not re.match(REPEATED, name)]
    if any(IN_PLACE in name for name in used):
        used = [name for name in used if not re.match(LISTED, name)]
    moves = (
        (LISTED, rf"{blocks}.\1{IN_PLACE}"),
        (rf"^{re.escape(blocks)}\.(\d+)\.decoder_layer\.", rf"{blocks}.\1."),
    )
    moved = rename(used, moves, where)
    alone = [name.removeprefix(TEXT.theirs) for name in moved if name.startswith(TEXT.theirs)]
    renamed = rename(alone, family.renames, where)
    language = {TEXT.theirs + name: moved[TEXT.theirs + there] for name, there in renamed.items()}
    others = {name: there for name, there in moved.items() if not name.startswith(TEXT.theirs)}
    return {name: plain[there] for name, there in (others | language).items()}


def _new_tokens(directory: str, count: int) -> int:
    """Tokens of the checkpoint that a tokenizer lacks.

    Raises:
      ConversionError: if there is no tokenizer, or they are not those that OpenFlamingo adds.
    """
    from transformers import AutoTokenizer

    if not any(Path(directory).glob("tokenizer*")):
        raise ConversionError(
            f"{directory} has no tokenizer, to count the tokens that the checkpoint adds to: copy "
            "its files there, or say new_tokens (3 in all published models)."
        )
    own = len(AutoTokenizer.from_pretrained(directory))
    if count - own not in (2, 3):
        raise ConversionError(
            f"The checkpoint has {count} tokens and the tokenizer of {directory} {own}, but "
            "OpenFlamingo adds 2, or 3 with one for padding. Is it the tokenizer as published? Or "
            "say new_tokens."
        )
    return count - own


def _open(checkpoint: Path) -> files.SafetensorsReader:
    """
    Raises:
      ConversionError: if there is no file, or it is no safetensors file.
    """
    if not checkpoint.is_file():
        raise ConversionError(f"There is no file {checkpoint}: give that of a checkpoint.")
    if checkpoint.suffix != ".safetensors":
        target = checkpoint.with_suffix(".safetensors")
        command = COMMAND.format(source=str(checkpoint), target=str(target))
        raise ConversionError(
            f"{checkpoint} is no safetensors file. Pickles can run any code when they are opened, "
            f'so they are not. Convert it with PyTorch:\n\n  python -c "{command}"\n'
        )
    return files.open_file(checkpoint)


def _part(
    checkpoint: Checkpoint, theirs: str, prefix: str = ""
) -> dict[str, tuple[files.Tensors, str]]:
    """Tensors of a directory, as those of the whole.

    Args:
      theirs: what their names begin with there.
      prefix: what they begin with in the directory; others are left out.
    """
    return {
        theirs + name.removeprefix(prefix): (checkpoint.tensors, there)
        for name, there in checkpoint.file_names.items()
        if name.startswith(prefix)
    }


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Tensors of several places: canonical name -> where it is, and its name there."""

    where: str
    parts: Mapping[str, tuple[files.Tensors, str]]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        every = {id(tensors): tensors.shapes for tensors, _ in self.parts.values()}
        return {name: every[id(tensors)][there] for name, (tensors, there) in self.parts.items()}

    def size(self, name: str) -> int:
        tensors, there = self.parts[name]
        return tensors.size(there)

    def read(self, name: str, buffer: np.ndarray | None = None) -> np.ndarray:
        tensors, there = self.parts[name]
        return tensors.read(there, buffer)
