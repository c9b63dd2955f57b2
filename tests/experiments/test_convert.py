"""experiments.convert: from format to format, and the parity table."""

import json

import hf
import numpy as np
import pytest

import mmjax
from experiments import convert
from mmjax import params
from mmjax.convert import ConversionError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 16}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
# One of each kind of comparison.
MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
    "ViTForImageClassification": ("ViTConfig", {**IMAGE, "num_labels": 5}),
    "BertModel": ("BertConfig", TEXT),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": {**TEXT, "eos_token_id": 59}, "vision_config": IMAGE, "projection_dim": 24},
    ),
    "Siglip2Model": (
        "Siglip2Config",
        {
            "text_config": {**TEXT, "projection_size": 32},
            "vision_config": {**SIZES, "patch_size": 4, "num_patches": 16},
        },
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "vocab_size": 60,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "LlavaNextForConditionalGeneration": (
        "LlavaNextConfig",
        {
            "text_config": {**TEXT, "model_type": "mistral", "num_key_value_heads": 2},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
            "image_token_index": 59,
            "image_grid_pinpoints": [[16, 32], [32, 32]],
        },
    ),
}


def directory(architecture: str, path):
    transformers = hf.transformers()
    name, options = MODELS[architecture]
    config = getattr(transformers, name)(**options)
    model = hf.randomise(getattr(transformers, architecture)(config))
    model.save_pretrained(path)
    return path


@pytest.mark.torch
@pytest.mark.parametrize("architecture", MODELS)
def test_verify_prints_every_block_and_notices_a_wrong_weight(architecture, tmp_path, capsys):
    source = directory(architecture, tmp_path / "source")
    assert convert.main(["--source", str(source), "--verify"]) == 0
    table = capsys.readouterr().out
    blocks = [line for line in table.splitlines() if "block " in line]
    assert len(blocks) >= 1 and "within 0.0001" in table
    model = mmjax.from_pretrained(source)
    graph, arrays = params.split(model)
    name = next(path for path in arrays if path.endswith("attention/value/kernel"))
    arrays[name] = arrays[name].at[0].multiply(1.5)
    broken = params.merge(graph, arrays)
    broken.origin = model.origin
    from experiments._verify import parity_table

    text, agrees = parity_table(broken, source)
    assert not agrees and "ABOVE 0.0001" in text


@pytest.mark.torch
def test_hf_to_orbax_and_back(tmp_path, capsys):
    source = directory("CLIPModel", tmp_path / "source")
    (source / "tokenizer_config.json").write_text("{}")
    orbax, again = tmp_path / "orbax", tmp_path / "again"
    assert convert.main(["--source", str(source), "--target", str(orbax)]) == 0
    assert convert.main(["--source", str(orbax), "--target", str(again), "--verify"]) == 0
    assert "image block 1" in capsys.readouterr().out
    assert (orbax / "tokenizer" / "tokenizer_config.json").exists()
    first = params.split(mmjax.from_pretrained(source))[1]
    second = params.split(mmjax.from_pretrained(again))[1]
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path])
    assert (again / "tokenizer_config.json").exists()
    original = json.loads((source / "config.json").read_text())
    assert json.loads((again / "config.json").read_text()) == original


@pytest.mark.torch
def test_targets_are_not_overwritten_unasked(tmp_path):
    source = directory("LlamaForCausalLM", tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    command = ["--source", str(source), "--target", str(target), "--to", "hf"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert.main(command)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    assert convert.main([*command, "--overwrite", "--dtype", "bfloat16"]) == 0
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="the same directory"):
        convert.main(["--source", str(source), "--target", str(source), "--overwrite"])


def test_bad_sources_say_what_to_do(tmp_path):
    with pytest.raises(ConversionError, match="There is no"):
        convert.main(["--source", str(tmp_path / "nowhere"), "--target", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="--target, or --verify"):
        convert.main(["--source", str(tmp_path)])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"neither model\.json"):
        convert.main(["--source", str(tmp_path), "--target", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
