"""configs/llava/tune.py, as with a directory and conversations of one's own."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import mmjax
from experiments import convert
from mmjax import config as configs
from mmjax import params
from mmjax.train.logging import read_metrics
from mmjax.train.loop import train

CONFIG = "configs/llava/tune.py"
WORDS = "A chat between a curious user and an assistant. USER: What is it? ASSISTANT: red green"
TOWER = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "norm_eps": 1e-5}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A LLaVA of Hugging Face format with its tokenizer."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS], trainer)
    config = json.loads(configs.to_json(configs.load(CONFIG)))["model"]
    config["encoder"] |= {**TOWER, "image_size": 8, "patch_size": 4}
    config["lm"] |= {**TOWER, "max_len": 512, "vocab_size": 320}
    model = mmjax.build(config | {"image_token": 1}, rngs=nnx.Rngs(0))
    path = tmp_path_factory.mktemp("models") / "llava"
    mmjax.save_pretrained(model, path, architecture="LlavaForConditionalGeneration")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, colour in enumerate(("red", "green") * 4):
        Image.new("RGB", (10 + number, 12), colour).save(folder / f"{number}.png")
        said = [("human", "<image>\nWhat is it?"), ("gpt", colour)]
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


@pytest.mark.parametrize("trained", ["lm", pytest.param("lora", marks=pytest.mark.slow)])
def test_from_a_directory_to_another(directory, conversations, trained, tmp_path):
    arguments = dict(
        weights=directory, data=conversations, val=conversations, train=trained, steps=2,
        batch=len(jax.devices()), length=256, dtype="float32", lr=1e-2,
    )  # fmt: skip
    spec = ",".join(f"{key}={value}" for key, value in arguments.items())
    overrides = ["lora.rank=2"] if trained == "lora" else []
    train(configs.load(f"{CONFIG}:{spec}", overrides), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["eval/val/loss"] for row in rows if "eval/val/loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert convert.main(["--source", str(tmp_path / "run"), "--target", str(tmp_path / "hf")]) == 0
    before, after = (
        params.split(mmjax.from_pretrained(path))[1] for path in (directory, tmp_path / "hf")
    )
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed and not any(path.startswith("encoder/") for path in changed)
    assert any(path.startswith("connector/") for path in changed)
    assert any(path.startswith("lm/decoder/") for path in changed)
    assert ("lm/token/embedding" in changed) == (trained == "lm")
