"""`python -m experiments.generate`, on a tiny model with a tokenizer."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import mmjax
from experiments import common, generate
from mmjax import params
from mmjax.evaluate.chat import end_tokens
from mmjax.generation import Printer
from mmjax.models.lm import LM, LMConfig
from mmjax.nn.rope import Rope

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory of Hugging Face format."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"{PROMPT} jumps over the lazy dog"], trainer)
    config = LMConfig(
        vocab_size=backend.get_vocab_size(),
        max_len=128,
        width=32,
        depth=1,
        heads=2,
        mlp_width=48,
        activation="silu",
        norm_eps=1e-5,
        tied=False,
        rope=Rope(theta=1e4),
    )
    graph, shapes = params.abstract(lambda: LM(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0).standard_normal
    weights = {path: 0.3 * draw(s.shape) + path.endswith("scale") for path, s in shapes.items()}
    model = params.merge(graph, {path: jax.numpy.float32(x) for path, x in weights.items()})
    path = tmp_path_factory.mktemp("models") / "tiny"
    mmjax.save_pretrained(model, path, architecture="LlamaForCausalLM")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} dog{% endif %}"
    )
    tokenizer.save_pretrained(path)
    return path


def run(directory, *arguments):
    return generate.main(["--weights", str(directory), "--max-new-tokens", "12", *arguments])


def test_writes_what_generate_returns(directory, capsys):
    assert run(directory, "--prompt", PROMPT, "--prompt", "lazy dog") == 0
    tokenizer = mmjax.load_processor(directory).tokenizer
    rows = mmjax.generate(
        mmjax.from_pretrained(directory),
        [tokenizer(text)["input_ids"] for text in (PROMPT, "lazy dog")],
        max_new_tokens=12,
        eos_id=tokenizer.eos_token_id,
    )
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert expected[0] != expected[1]
    out = capsys.readouterr().out
    assert out == "\n".join(expected) + "\n"
    # The same, as it comes: characters of several bytes are written when they are whole.
    assert run(directory, "--prompt", PROMPT, "--stream") == 0
    assert capsys.readouterr().out == expected[0] + "\n"


def test_chat_uses_the_template(directory, capsys):
    run(directory, "--prompt", PROMPT, "--chat")
    chatted = capsys.readouterr().out
    run(directory, "--prompt", f"{PROMPT} dog")
    assert capsys.readouterr().out == chatted


def test_end_tokens_come_from_the_generation_config(directory):
    model, tokenizer = mmjax.from_pretrained(directory), mmjax.load_processor(directory).tokenizer
    file = directory / "generation_config.json"
    before = file.read_text() if file.exists() else None
    try:
        file.write_text(json.dumps({"eos_token_id": [5, 6]}))
        assert end_tokens(directory, model, tokenizer) == [5, 6]
    finally:
        file.unlink() if before is None else file.write_text(before)


def test_printer_waits_for_whole_characters(capsys):
    data = "a é日🎉.".encode()
    printer = Printer(lambda ids: bytes(ids).decode(errors="replace"))
    written = []
    for byte in data:
        printer([[byte]])
        written.append(capsys.readouterr().out)
    printer.finish()
    assert "".join(written) == data.decode() and "\N{REPLACEMENT CHARACTER}" not in "".join(written)
    assert capsys.readouterr().out == "\n"


BAD = {
    ("--stream", "--prompt", "again"): "give one --prompt",
    ("--prompt", ""): "Prompt 1 is empty",
    ("--top-p", "0.5"): "temperature=0 takes the most",
    ("--beams", "2", "--temperature", "1"): "Beam search",
    ("--mesh", "data=3,tensor=5"): "does not divide",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_arguments(directory, arguments):
    with pytest.raises(ValueError, match=BAD[arguments]):
        run(directory, "--prompt", PROMPT, *arguments)


def test_no_directory_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    missing = str(tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["generate", "--weights", missing, "--prompt", "x"])
    with pytest.raises(SystemExit) as left:
        common.run(lambda argv: generate.main(argv))
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert missing in error and "Traceback" not in error
