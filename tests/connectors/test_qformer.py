"""The Q-Former beside those of BLIP-2 and InstructBLIP."""

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import QUICK

from mmjax import params
from mmjax.config import dataclass_from
from mmjax.connectors import ConnectorConfig, ConnectorError, QFormerConfig, cost, make_connector
from mmjax.convert.families import _qformer
from mmjax.convert.table import lay_out

INPUTS, OUTPUTS, GRID = 12, 7, (3, 2)
SMALL = {"width": 16, "heads": 4, "mlp_width": 20, "queries": 5, "depth": 2, "norm_eps": 1e-6}
CONFIGS = {
    "every second of 4": {"depth": 4},
    "every third of 5, the last group is not whole": {"depth": 5, "cross_every": 3, "heads": 2},
    "every block": {"cross_every": 1, "activation": "relu", "queries": 1},
    "the first block only": {"cross_every": 7, "heads": 1, "mlp_width": 9},
}
TEXT = {"vocab_size": 30, "max_len": 9}


def reference_for(config, kind):
    """A model of transformers with random weights; `kind`: "Blip2" or "InstructBlip"."""
    transformers = hf.transformers()
    options = _qformer.options(config, reads_text=config.reads_text)
    hf_config = getattr(transformers, f"{kind}QFormerConfig")(**options, encoder_hidden_size=INPUTS)
    return hf.randomise(getattr(transformers, f"{kind}QFormerModel")(hf_config))


def with_weights(config, reference, norm):
    """Our connector with the reference's weights, and its queries: an identity projects."""
    width = config.width
    graph, shapes = params.abstract(lambda: make_connector(config, INPUTS, width, rngs=nnx.Rngs(0)))
    queries = np.random.default_rng(2).normal(size=(config.queries, width)).astype(np.float32)
    arrays = {path: np.zeros(shape.shape, np.float32) for path, shape in shapes.items()}
    arrays |= {"queries": queries, "projection/kernel": np.eye(width, dtype=np.float32)}
    rest = {path: x for path, x in shapes.items() if not path.startswith(("queries", "projection"))}
    tensors = hf.weights(reference)
    for entry in lay_out(_qformer.rows(config, "", "", norm), rest):
        (value,) = entry.transform.to_ours(tensors.pop(entry.name))
        (path,) = entry.paths
        arrays[path][slice(None) if entry.layer is None else entry.layer] = value
    assert not tensors, f"not used: {sorted(tensors)}"
    return params.merge(graph, jax.tree.map(jnp.asarray, arrays)), queries


def call(connector, *inputs, **options):
    graph, arrays = params.split(connector)

    def run(arrays, inputs, options):
        return params.merge(graph, arrays)(*inputs, GRID, **options)

    return jax.jit(run, compiler_options=QUICK)(arrays, inputs, options)


def features(extra):
    """Of two images, and a mask that hides some of the second one's."""
    length = extra + GRID[0] * GRID[1]
    values = np.random.default_rng(0).normal(size=(2, length, INPUTS)).astype(np.float32)
    mask = np.ones((2, length), bool)
    mask[1, 4:] = False
    return values, mask


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_blip2(name):
    import torch

    config = QFormerConfig(**SMALL | CONFIGS[name])
    reference = reference_for(config, "Blip2")
    connector, queries = with_weights(config, reference, "layernorm")
    seen, mask = features(extra=1)
    with torch.no_grad():
        expected = reference(
            query_embeds=torch.tensor(queries).expand(2, -1, -1),
            encoder_hidden_states=torch.tensor(seen),
            encoder_attention_mask=torch.tensor(mask, dtype=torch.long),
        ).last_hidden_state
    tokens, counting = call(connector, jnp.asarray(seen), jnp.asarray(mask))
    np.testing.assert_allclose(tokens, expected.numpy(), atol=1e-5)
    assert counting.shape == (2, config.queries) and bool(counting.all())
    found = cost(config, INPUTS, OUTPUTS, GRID, extra=1)
    count = sum(p.numel() for p in reference.parameters())
    ends = config.queries * config.width + (config.width + 1) * OUTPUTS
    assert (found.tokens, found.parameters) == (config.queries, count + ends)


@pytest.mark.torch
def test_instructblip():
    """With texts of two lengths, and without."""
    import torch

    config = QFormerConfig(**SMALL | TEXT)
    reference = reference_for(config, "InstructBlip")
    connector, queries = with_weights(config, reference, "embeddings.layernorm")
    seen, mask = features(extra=0)
    text = np.random.default_rng(1).integers(1, 30, (2, 6)).astype(np.int32)
    text_mask = np.array([[True] * 6, [True] * 4 + [False] * 2])
    whole = np.concatenate([np.ones((2, config.queries), bool), text_mask], axis=1)

    def same(theirs, **ours):
        read = {name: torch.tensor(x, dtype=torch.long) for name, x in theirs.items()}
        with torch.no_grad():
            expected = reference(
                **{"input_ids": None} | read,
                query_embeds=torch.tensor(queries).expand(2, -1, -1),
                encoder_hidden_states=torch.tensor(seen),
                encoder_attention_mask=torch.tensor(mask, dtype=torch.long),
            ).last_hidden_state.numpy()
        tokens, _ = call(connector, jnp.asarray(seen), jnp.asarray(mask), **ours)
        np.testing.assert_allclose(tokens, expected[:, : config.queries], atol=1e-5)

    given = {"text": jnp.asarray(text), "text_mask": jnp.asarray(text_mask)}
    same({"input_ids": text, "attention_mask": whole}, **given)
    same({})
    with_text, without = (cost(config, INPUTS, OUTPUTS, GRID, text=n) for n in (6, None))
    assert with_text.flops > without.flops and with_text.tokens == without.tokens == 5


def test_config_group():
    group = {"name": "qformer", "queries": 8, "depth": 2}
    config = dataclass_from(ConnectorConfig, group, "model.connector")
    assert config == QFormerConfig(8, depth=2)
    assert config.tokens((7, 5), extra=3) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries=0"),
        ({"cross_every": 0}, "cross_every=0"),
        ({"heads": 3}, "3 heads"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ConnectorError, match=message):
        QFormerConfig(**SMALL | options)


def test_texts_that_it_cannot_read():
    text = {"text": 10}
    with pytest.raises(ConnectorError, match="reads no text"):
        cost(QFormerConfig(**SMALL), INPUTS, OUTPUTS, GRID, **text)
    with pytest.raises(ConnectorError, match="max_len=9"):
        cost(QFormerConfig(**SMALL | TEXT), INPUTS, OUTPUTS, GRID, **text)
