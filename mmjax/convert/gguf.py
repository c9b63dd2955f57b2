"""GGUF files (llama.cpp) of Llama type, with their tensors dequantised to float32.

The `gguf` package parses and dequantises; this module gives its metadata and tensors the names
and the layout that transformers has, so that the Llama family reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.convert.files import Tensors
from mmjax.convert.table import ConversionError
from mmjax.registry import nearest

# Weights of llama.cpp -> those of transformers; blocks are numbered alike.
_NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.(.*)": r"model.layers.\1.input_layernorm.\2",
    r"blk\.(\d+)\.ffn_norm\.(.*)": r"model.layers.\1.post_attention_layernorm.\2",
    r"blk\.(\d+)\.attn_(q|k|v)\.(.*)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"blk\.(\d+)\.attn_output\.(.*)": r"model.layers.\1.self_attn.o_proj.\2",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.(.*)": r"model.layers.\1.mlp.\2_proj.\3",
}

# config of transformers -> metadata.
_FIELDS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}

# What is dequantised, by the names of ggml.
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@dataclasses.dataclass(frozen=True)
class _GGUFTensors:
    """Tensors by their names in transformers; `read` dequantises."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Any]
    heads: Mapping[str, int]

    def size(self, name: str) -> int:
        return 0

    def read(self, name: str, buffer: np.ndarray | None = None) -> np.ndarray:
        import gguf

        tensor = self.tensors[name]
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        array = np.ascontiguousarray(array, np.float32).reshape(self.shapes[name])
        projection = re.search(r"self_attn\.([qk])_proj", name)
        return _unpermuted(array, self.heads[projection[1]]) if projection else array


def open_file(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The content of a `config.json` for a GGUF file, and its tensors.

    Raises:
      ConversionError: if it is no GGUF file, is damaged, or is not of Llama type.
      ImportError: if the `gguf` package is not installed.
    """
    fields, tensors = open_reader(path)

    def value(key: str) -> Any:
        if key not in fields:
            raise ConversionError(f"{path} lacks the metadata {key!r}: is it a whole model?")
        return fields[key].contents()

    architecture = value("general.architecture")
    if architecture != "llama":
        raise ConversionError(
            f"{path} has the architecture {architecture!r}; of GGUF files those of type 'llama' "
            "are read. Convert the original checkpoint instead."
        )
    renamed, shapes, unknown = {}, {}, []
    for tensor in tensors:
        name = next(
            (
                re.sub(pattern, new, tensor.name)
                for pattern, new in _NAMES.items()
                if re.fullmatch(pattern, tensor.name)
            ),
            None,
        )
        if name is None:
            unknown.append(tensor.name)
        else:
            renamed[name] = tensor
            shapes[name] = tuple(int(size) for size in reversed(tensor.shape))
    if unknown:
        raise ConversionError(
            f"{path} has tensors that the Llama of transformers does not: "
            f"{', '.join(unknown[:10])}. (rope_freqs: convert the original checkpoint, whose "
            "config says how its rotary embedding is scaled.)"
        )
    config = {key: value(source) for key, source in _FIELDS.items()}
    # Stored in 32 bits: 1e-5 comes as 9.999999747e-06.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.7g}")
    heads, kv_key = config["num_attention_heads"], "llama.attention.head_count_kv"
    kv_heads = fields[kv_key].contents() if kv_key in fields else heads
    if "llama.rope.scaling.type" in fields and value("llama.rope.scaling.type") != "none":
        raise ConversionError(
            f"{path} scales its rotary embedding ({value('llama.rope.scaling.type')}): convert "
            "the original checkpoint instead."
        )
    theta = fields["llama.rope.freq_base"].contents() if "llama.rope.freq_base" in fields else 1e4
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": kv_heads,
        "vocab_size": shapes["model.embed_tokens.weight"][0]
        if "model.embed_tokens.weight" in shapes
        else value("llama.vocab_size"),
        "head_dim": fields["llama.attention.key_length"].contents()
        if "llama.attention.key_length" in fields
        else config["hidden_size"] // heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
        "tie_word_embeddings": "lm_head.weight" not in renamed,
        "attention_bias": any(name.endswith("q_proj.bias") for name in renamed),
        "mlp_bias": any(name.endswith("up_proj.bias") for name in renamed),
        "dtype": "float32",
    }
    for role in ("bos", "eos", "pad"):
        source = f"tokenizer.ggml.{'padding' if role == 'pad' else role}_token_id"
        if source in fields:
            config[f"{role}_token_id"] = int(fields[source].contents())
    found = _GGUFTensors(str(path), shapes, renamed, {"q": heads, "k": kv_heads})
    return config, found


def open_reader(path: Path) -> tuple[Mapping[str, Any], list[Any]]:
    """Metadata and tensors as the `gguf` package gives them.

    Raises:
      ConversionError: if it is no GGUF file, is damaged, or has tensors of types not read here.
      ImportError: if the `gguf` package is not installed.
    """
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ConversionError(
                f"{path} is not a GGUF file. A checkpoint is given by its directory."
            )
        stat = os.fstat(stream.fileno())
    reader = _read(path, stat.st_size, stat.st_mtime_ns)
    strange = {tensor.tensor_type.name for tensor in reader.tensors} - set(_TYPES)
    if strange:
        raise ConversionError(
            f"{path} has tensors of type {', '.join(sorted(strange))}; "
            f"{nearest(min(strange), _TYPES)}"
        )
    return reader.fields, reader.tensors


# A vocabulary takes seconds to read, and config, tokenizer and weights each open the file.
@functools.lru_cache(maxsize=1)
def _read(path: Path, size: int, modified: int) -> Any:
    """
    Args:
      size, modified: of the file; another one is read anew.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Reading GGUF files needs the gguf package: pip install gguf") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise ConversionError(
            f"{path} is a damaged or truncated GGUF file ({error}): copy it again."
        ) from error


def _unpermuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys (weight or bias) in the order of transformers.

    llama.cpp pairs neighbouring dimensions in the rotary embedding, transformers those half a head
    apart, so its converter interleaves the halves of each head; this undoes it.
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
