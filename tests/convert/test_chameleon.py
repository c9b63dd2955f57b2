"""Chameleon, both ways: logits, gradients, generation."""

import dataclasses

import hf
import numpy as np
import processors
import pytest
import unified
from towers import refused
from vlms import LANGUAGE

import mmjax.convert
from mmjax.data.load_processor import load_processor
from mmjax.models import Unified
from mmjax.models.lm import QKNorm

transformers = hf.transformers()
pytestmark = pytest.mark.torch

CODES = 16
TOKENIZER = {
    **{"base_channels": 32, "channel_multiplier": [1, 2], "resolution": 8, "num_res_blocks": 1},
    **{"num_embeddings": CODES, "embed_dim": 6, "latent_channels": 10},
}
# Ids of text are 8 to 20.
WORDS = (8, 20)
MARKS = {"<image>": 5, "<racm3:break>": 3, "<eoss>": 7}
ORDER = np.random.default_rng(3).permutation(CODES)


def vocabulary(order=ORDER, first=20):
    """Codes whose ids are in this order, among other names."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = {
        f"IMGIMG{str(code).translate(letters)}Z": first + int(place)
        for code, place in enumerate(order)
    }
    return {"<s>": 0, "word": 9, **MARKS, **codes}


def config(**changes):
    options = {**LANGUAGE, "vq_config": TOKENIZER, "vocabulary_map": vocabulary()}
    return transformers.ChameleonConfig(**options | changes)


CASES = {
    "grouped heads": {},
    "norms after the branches, biases": {
        **{"swin_norm": True, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
        "vocabulary_map": vocabulary(range(CODES), first=30),
    },
    "one head of keys, tied, narrow": {
        **{"num_key_value_heads": 1, "hidden_size": 24, "tie_word_embeddings": True},
        **{"num_attention_heads": 3, "num_hidden_layers": 3, "hidden_act": "gelu"},
        "vq_config": {**TOKENIZER, "channel_multiplier": [1, 1, 2], "attn_type": "none"},
    },
    "long": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        "num_key_value_heads": 4,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_generation(name, tmp_path):
    reference = transformers.ChameleonForConditionalGeneration(config(**CASES[name]))
    index = list(CASES).index(name)

    unified.check(
        reference,
        tmp_path,
        lambda ours: unified.stream(ours, size=(8, 8), words=WORDS, seed=index),
        lambda inputs: reference.get_image_tokens(inputs["pixel_values"]),
        derived=index != 1,
        generator=index == 0,
        gradients=index == 1,
        origin=index != 2,
    )


PICTURES = [
    [processors.picture(0, 30, 20)],
    [processors.picture(1, 9, 14), processors.picture(2, 40, 11)],
    [],
]
TEXTS = ["a red <image> dog", "<image><image> a cat", "bot : !"]


@pytest.mark.parametrize("named", [False, True])
def test_processor(named, tmp_path):
    marks = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    if named:
        marks = {"image_token": "<picture>", "boi_token": "<begin>", "eoi_token": "<end>"}
    tokenizer = processors.tokenizer(
        *marks.values(),
        "<sep>",
        sep_token="<sep>",
        **({"extra_special_tokens": marks} if named else {}),
    )
    images = transformers.ChameleonImageProcessorPil(size={"shortest_edge": 12}, crop_size=8)
    theirs = transformers.ChameleonProcessor(images, tokenizer, image_seq_length=16)
    names = vocabulary() | {"<image>": tokenizer.get_vocab()[marks["image_token"]]}
    directory = processors.save(tmp_path / "whole", theirs, config(vocabulary_map=names))
    texts = [text.replace("<image>", marks["image_token"]) for text in TEXTS]
    batch = processors.check(directory, theirs, PICTURES, texts)
    assert batch["images"].shape == (3, 2, 8, 8, 3)
    assert (batch["tokens"][:, -1] == tokenizer.sep_token_id).all()
    theirs.image_seq_length = 25
    wrong = processors.save(tmp_path / "wrong", theirs, config(vocabulary_map=names))
    with pytest.raises(ValueError, match=r"image_seq_length is 25 .* and 16 in config.json"):
        load_processor(wrong)


def test_what_is_not_supported():
    names = vocabulary()
    wrong = {name: number for name, number in names.items() if name != "IMGIMGBCZ"}
    for changes, message in (
        ({"vocabulary_map": wrong}, "names of 15 codes, but the image tokenizer has 16"),
        ({"vocabulary_map": {k: v for k, v in names.items() if k != "<eoss>"}}, "has no '<eoss>'"),
        ({"vocabulary_map": None}, "vocabulary_map has"),
        ({"vocabulary_map": vocabulary(first=40)}, "outside of a vocabulary of 50 tokens"),
        ({"head_dim": 16}, "head_dim=16 with 4 heads does not make hidden_size=32"),
        ({"vq_config": TOKENIZER | {"double_latent": True}}, "vq_config: double_latent=True"),
    ):
        with pytest.raises(ValueError, match=message):
            refused("ChameleonForConditionalGeneration", config(**changes))


def test_what_the_format_cannot_say():
    family = mmjax.convert.family.families()["ChameleonForConditionalGeneration"]
    ours = family.from_hf(mmjax.convert.Source(config(), frozenset(), None))
    say = mmjax.convert.save.say
    # Which tokens may follow is chosen when a model is used.
    say(family, dataclasses.replace(ours, follow="grammar"), frozenset())
    for wrong, message in (
        (dataclasses.replace(ours, grid_positions=True), "grid_positions=True"),
        (dataclasses.replace(ours, image=dataclasses.replace(ours.image, row=6)), "image.row=6"),
        (with_lm(ours, qk_norm_as=QKNorm("layernorm", 1e-6, each=True)), "eps=1e-06"),
        (with_lm(ours, head_dim=16), "head_dim=16"),
        (with_lm(ours, norm_placement="sandwich"), "norm_placement='sandwich'"),
        (with_lm(ours, qkv_bias=True), "qkv_bias=True"),
    ):
        with pytest.raises(ValueError, match=f"it cannot say .*{message}"):
            say(family, wrong, frozenset())


def with_lm(ours, **changes):
    return dataclasses.replace(ours, lm=dataclasses.replace(ours.lm, **changes))


def test_the_published_shapes():
    """Every tensor of the default config, whose image tokenizer has 8192 codes."""
    import torch

    from mmjax.convert.load import structure
    from mmjax.convert.table import lay_out

    names = vocabulary(range(8192), first=8)
    hf_config = transformers.ChameleonConfig(vocabulary_map=names)
    with torch.device("meta"):
        reference = transformers.ChameleonForConditionalGeneration(hf_config)
    family = mmjax.convert.family.families()["ChameleonForConditionalGeneration"]
    source = mmjax.convert.Source(hf_config, frozenset(), None)
    ours = family.from_hf(source)
    assert (ours.image.ids, ours.image.length, ours.vocab_size) == (8, 1024, 65536)
    _, shapes = structure(Unified, ours)
    found = {entry.name: entry.shape for entry in lay_out(family.rows(ours), shapes)}
    assert found == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert family.from_hf(source._replace(config=family.to_hf(ours))) == ours
