"""BERT, RoBERTa and XLM-RoBERTa, and the sentence encoders that sentence-transformers makes of
them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax.convert.activations import NAMES, activation
from mmjax.convert.family import FAMILIES, Family, Source, read_json
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM
from mmjax.convert.table import Row
from mmjax.models import Bert, BertConfig

# Names of TensorFlow's checkpoints.
TENSORFLOW = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
# Buffers that older versions saved.
BUFFERS = r"(.*\.)?embeddings\.(position_ids|token_type_ids)"
# An entry of config.json that we add where a sentence's vector is not the mean of its tokens.
POOLING = "sentence_pooling"


def fields(hf: Any, positions: str) -> dict[str, Any]:
    """What the configs of all these encoders say alike.

    Raises:
      ValueError: if the padding token, from which positions count, is not given.
    """
    pad = hf.pad_token_id if positions == "offset" else None
    if positions == "offset" and pad is None:
        raise ValueError("pad_token_id is not given, but positions are counted from it.")
    return {
        "vocab_size": hf.vocab_size,
        "max_len": hf.max_position_embeddings - (0 if pad is None else pad + 1),
        "width": hf.hidden_size,
        "depth": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "mlp_width": hf.intermediate_size,
        "activation": activation(hf.hidden_act, "hidden_act"),
        "norm_eps": hf.layer_norm_eps,
        "token_types": hf.type_vocab_size,
        "positions": positions,
        "pad_id": pad,
    }


def options(config: BertConfig, positions: str) -> dict[str, Any]:
    """The inverse of `fields`.

    Raises:
      ValueError: if positions count in another way.
    """
    if config.positions != positions:
        raise ValueError(f"positions={config.positions!r}; the format has {positions!r} ones only.")
    result = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.first_position + config.max_len,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.token_types,
    }
    return result if config.pad_id is None else {**result, "pad_token_id": config.pad_id}


def rows(theirs: str, ours: str, layers: str = "encoder.layer") -> tuple[Row, ...]:
    """All but the pooler; `theirs` and `ours` are prefixes, "" or "text_model.", "text/"."""
    layer, block = f"{theirs}{layers}.*.", f"{ours}encoder/layers/"
    return (
        Row(theirs + "embeddings.word_embeddings", ours + "token", EMBEDDING),
        Row(theirs + "embeddings.position_embeddings", ours + "position", EMBEDDING),
        Row(theirs + "embeddings.token_type_embeddings", ours + "token_type", EMBEDDING),
        Row(theirs + "embeddings.LayerNorm", ours + "embed_norm", NORM),
        Row(layer + "attention.self.query", block + "attention/query", LINEAR),
        Row(layer + "attention.self.key", block + "attention/key", LINEAR),
        Row(layer + "attention.self.value", block + "attention/value", LINEAR),
        Row(layer + "attention.output.dense", block + "attention/out", LINEAR),
        Row(layer + "attention.output.LayerNorm", block + "attention_norm", NORM),
        Row(layer + "intermediate.dense", block + "mlp/up", LINEAR),
        Row(layer + "output.dense", block + "mlp/down", LINEAR),
        Row(layer + "output.LayerNorm", block + "mlp_norm", NORM),
    )


def _from_hf(source: Source, *, positions: str) -> BertConfig:
    hf = source.config
    content = hf.to_dict()
    if hf.is_decoder:
        raise ValueError("is_decoder=True: only encoders are supported.")
    # Older configs have this entry; transformers 5 computes "absolute" only.
    kind = content.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"position_embedding_type={kind!r}: only 'absolute' is supported.")
    pooling = content.get(POOLING, "mean")
    if source.directory is not None and (source.directory / "modules.json").is_file():
        pooling = sentence_pooling(source.directory)
    return BertConfig(
        **fields(hf, positions),
        pooler="pooler.dense.weight" in source.names,
        pooling=pooling,
    )


def sentence_pooling(directory: Path) -> str:
    """How sentence-transformers makes a vector of a sentence, by its `modules.json`.

    Raises:
      ValueError: if it does so in a way that `Bert.encode_text` does not have.
    """
    advice = "To load the encoder without its sentence head, leave modules.json away."
    pooling = "mean"
    for module in json.loads((directory / "modules.json").read_text("utf-8")):
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            content = read_json(directory / module["path"] / "config.json")
            prefix = "pooling_mode_"
            chosen = [key.removeprefix(prefix) for key in content if key.startswith(prefix)]
            chosen = [mode for mode in chosen if content[prefix + mode] is True]
            if len(chosen) != 1 or chosen[0] not in _POOLINGS:
                raise ValueError(
                    f"Pooling by {' and '.join(chosen) or 'no known mode'} is not supported, only "
                    f"one of {', '.join(_POOLINGS)}. {advice}"
                )
            pooling = _POOLINGS[chosen[0]]
        elif kind not in ("Transformer", "Normalize"):
            raise ValueError(f"modules.json has a {kind}, which is not supported. {advice}")
    return pooling


_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls"}


def _to_hf(config: BertConfig, *, positions: str, name: str) -> Any:
    import transformers

    result = options(config, positions)
    if config.pooling != "mean":
        result[POOLING] = config.pooling
    return getattr(transformers, f"{name}Config")(**result)


def _rows(config: BertConfig) -> Sequence[Row]:
    return (*rows("", ""), Row("pooler.dense", "pooler", LINEAR))


def _register(name: str, model_type: str, prefix: str, positions: str, heads: str) -> None:
    """The encoder class of one library name; the heads it was pretrained with are left out."""
    FAMILIES.register(f"{name}Model")(
        Family(
            model_type=model_type,
            model=Bert,
            from_hf=functools.partial(_from_hf, positions=positions),
            to_hf=functools.partial(_to_hf, positions=positions, name=name),
            rows=_rows,
            renames=((rf"^{prefix}\.", ""), *TENSORFLOW),
            ignored=lambda config: (BUFFERS, heads),
            aliases=(f"{name}ForMaskedLM", f"{name}ForPreTraining"),
        )
    )


_register("Bert", "bert", "bert", "absolute", heads=r"cls\..*")
_register("Roberta", "roberta", "roberta", "offset", heads=r"lm_head\..*")
_register("XLMRoberta", "xlm-roberta", "roberta", "offset", heads=r"lm_head\..*")
