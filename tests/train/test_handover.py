"""Parameters are taken only from where they mean the same."""

from __future__ import annotations

import json

import pytest

from mmjax.config import ConfigError
from mmjax.data.run_tokenizer import build_tokenizer
from mmjax.data.tokenizer import train_tokenizer
from mmjax.train.handover import check_handover, check_tokens, model_dataclass

ENCODER = dict(
    image_size=16,
    patch_size=8,
    width=32,
    depth=2,
    heads=2,
    mlp_width=64,
    activation="gelu_tanh",
    norm_eps=1e-6,
    pooling="none",
    position="learned",
)
LM = dict(
    vocab_size=64,
    max_len=32,
    width=32,
    depth=2,
    heads=4,
    mlp_width=64,
    activation="silu",
    norm_eps=1e-5,
    tied=True,
    rope=dict(theta=1e4),
)
TEXT = dict(
    vocab_size=64,
    max_len=8,
    width=32,
    depth=2,
    heads=2,
    mlp_width=64,
    activation="gelu_tanh",
    norm_eps=1e-6,
    attention="bidirectional",
    pooling="last",
    padding="attend",
)


def vlm(**changes):
    fields = dict(name="vlm", encoder=ENCODER, connector=dict(name="mlp"), lm=LM, image_token=63)
    return {**fields, **changes}


def run(tmp_path, model):
    (tmp_path / "checkpoints").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    return tmp_path


def test_the_same_model_as_json_is_the_same(tmp_path):
    source = run(tmp_path, vlm(features=(-2, -1), lm={**LM, "remat": "full", "dtype": "bfloat16"}))
    names = {path: path for path in ("connector/linears/0/kernel", "lm/final_norm/scale")}
    check_handover(vlm(features=(-2, -1)), source, names)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(connector=dict(name="mlp", activation="relu")), "connector.activation"),
        (dict(lm={**LM, "heads": 2}), "lm.heads"),
        (dict(lm={**LM, "rope": dict(theta=5e5)}), "lm.rope.theta"),
        (dict(encoder={**ENCODER, "activation": "quick_gelu"}), "encoder.activation"),
    ],
)
def test_a_part_that_computes_something_else_is_named(tmp_path, changes, field):
    names = {
        path: path
        for path in (
            "connector/linears/0/kernel",
            "lm/final_norm/scale",
            "encoder/final_norm/scale",
        )
    }
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        check_handover(vlm(**changes), run(tmp_path, vlm()), names)


def test_how_parts_go_together_counts_where_all_are_taken(tmp_path):
    source = run(tmp_path, vlm(features=(-1,)))
    every = ("encoder/final_norm/scale", "connector/linears/0/kernel", "lm/final_norm/scale")
    check_handover(vlm(), source, {path: path for path in every[1:]})
    with pytest.raises(ConfigError, match=r"features: \(-2,\) here, \(-1,\) there"):
        check_handover(vlm(), source, {path: path for path in every})


def test_only_what_is_taken_is_compared(tmp_path):
    source = run(tmp_path, vlm(connector=dict(name="mlp", activation="relu")))
    check_handover(vlm(), source, {"lm/final_norm/scale": "lm/final_norm/scale"})


def test_a_tower_from_another_model(tmp_path):
    image = {**ENCODER, "pooling": "mean", "image_size": 32}
    source = run(tmp_path, dict(name="siglip", image=image, text=TEXT))
    names = {"encoder/encoder/layers/mlp/up/kernel": "image/encoder/layers/mlp/up/kernel"}
    check_handover(vlm(), source, names)
    with pytest.raises(ConfigError, match=r"encoder\.heads: 4 here, 2 there"):
        check_handover(vlm(encoder={**ENCODER, "heads": 4}), source, names)


def test_a_table_of_tokens_comes_with_its_tokenizer(tmp_path):
    source, second = run(tmp_path / "first", vlm()), tmp_path / "second"
    one, other = (train_tokenizer("wordlevel", [text], 64) for text in ("a red dog", "a blue cat"))
    (source / "tokenizer").mkdir()
    one.save(source / "tokenizer")
    table, scale = ({path: path} for path in ("lm/token/embedding", "lm/final_norm/scale"))
    check_tokens(one, source, table)
    check_tokens(other, source, scale)
    with pytest.raises(ConfigError, match=r'lm/token/embedding .*name="run", directory='):
        check_tokens(other, source, table)
    copied = dict(tokenizer=dict(name="run", directory=str(source)))
    second.mkdir()
    check_tokens(build_tokenizer(copied, second), source, table)
    assert (second / "tokenizer").is_dir()  # which a third stage is compared with


def test_a_config_is_read_as_build_reads_it():
    assert model_dataclass(vlm()).lm.rope.theta == 1e4
    with pytest.raises(ConfigError, match="encoder"):
        model_dataclass({"name": "vlm"})
