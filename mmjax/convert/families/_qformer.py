"""The Q-Former of BLIP-2 and InstructBLIP."""

from __future__ import annotations

from typing import Any

from mmjax.connectors import QFormerConfig
from mmjax.convert.families._towers import block_fields, block_options
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM, array
from mmjax.convert.table import Row

# Tensors of every block, of the first of a group, and of those that read text.
_BLOCK = (
    ("attention.attention.query", "attention/query", LINEAR),
    ("attention.attention.key", "attention/key", LINEAR),
    ("attention.attention.value", "attention/value", LINEAR),
    ("attention.output.dense", "attention/out", LINEAR),
    ("attention.output.LayerNorm", "attention_norm", NORM),
    ("crossattention.attention.query", "cross/query", LINEAR),
    ("crossattention.attention.key", "cross/key", LINEAR),
    ("crossattention.attention.value", "cross/value", LINEAR),
    ("crossattention.output.dense", "cross/out", LINEAR),
    ("crossattention.output.LayerNorm", "cross_norm", NORM),
    ("intermediate_query.dense", "mlp/up", LINEAR),
    ("output_query.dense", "mlp/down", LINEAR),
    ("output_query.LayerNorm", "mlp_norm", NORM),
    ("intermediate.dense", "text_mlp/up", LINEAR),
    ("output.dense", "text_mlp/down", LINEAR),
    ("output.LayerNorm", "text_norm", NORM),
)


def fields(hf: Any, queries: int, *, reads_text: bool) -> QFormerConfig:
    """`Blip2QFormerConfig` or `InstructBlipQFormerConfig` -> ours."""
    text = {"vocab_size": hf.vocab_size, "max_len": hf.max_position_embeddings}
    return QFormerConfig(
        **block_fields(hf),
        queries=queries,
        mlp_width=hf.intermediate_size,
        cross_every=hf.cross_attention_frequency,
        **(text if reads_text else {}),
    )


def options(config: QFormerConfig, *, reads_text: bool) -> dict[str, Any]:
    """The inverse of `fields`.

    Raises:
      ValueError: if it reads text where the format does not, or the other way round.
    """
    if config.reads_text != reads_text:
        raise ValueError(f"vocab_size={config.vocab_size}: a Q-Former that reads text or not.")
    text = {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_len}
    return {
        **block_options(config),
        "intermediate_size": config.mlp_width,
        "cross_attention_frequency": config.cross_every,
        **(text if reads_text else {}),
    }


def rows(config: QFormerConfig, theirs: str, ours: str, norm: str) -> tuple[Row, ...]:
    """All but queries and projection.

    Args:
      theirs, ours: prefixes, such as "qformer." and "connector/".
      norm: their name of the norm of what goes into the first block.
    """
    size = config.group
    whole = config.depth - config.depth % size
    blocks = [
        Row(f"{theirs}encoder.layer.*.{a}", f"{ours}groups/layers/blocks/{n}/{b}", kind, n, size)
        for n in range(size)
        for a, b, kind in _BLOCK
    ]
    blocks += [
        Row(f"{theirs}encoder.layer.{whole + n}.{a}", f"{ours}rest/blocks/{n}/{b}", kind)
        for n in range(config.depth - whole)
        for a, b, kind in _BLOCK
    ]
    return (
        Row(theirs + "embeddings.word_embeddings", ours + "token", EMBEDDING),
        Row(theirs + "embeddings.position_embeddings", ours + "position", EMBEDDING),
        Row(theirs + norm, ours + "embed_norm", NORM),
        *blocks,
    )


def ends(config: QFormerConfig, ours: str) -> tuple[Row, ...]:
    """Queries and projection, which their models have beside the Q-Former."""
    queries = array((1, -1, config.width), (-1, config.width))
    return (
        Row("query_tokens", ours + "queries", queries),
        Row("language_projection", ours + "projection", LINEAR),
    )
