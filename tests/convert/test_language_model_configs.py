"""Configs of published language models, older forms of checkpoints, and what is refused."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_language_models import CASES, FULL, SLIDING, reference, rope

import mmjax.convert
from mmjax import params as parameters
from mmjax.convert.family import Source, families, transformers_config
from mmjax.nn.rope import Rope

pytestmark = pytest.mark.torch

# What matters of the config.json on the model's page, in its form there, and the number of
# parameters that the page counts.
PUBLISHED = {
    "SmolLM2-135M": (
        "LlamaForCausalLM",
        134_515_008,
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 49152,
        },
    ),
    "Vicuna-7B-16k": (
        "LlamaForCausalLM",
        6_738_415_616,
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_sequence_length": 16384,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
            "vocab_size": 32000,
        },
    ),
    "Llama-3.1-8B": (
        "LlamaForCausalLM",
        8_030_261_248,
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "vocab_size": 128256,
        },
    ),
    "Qwen2.5-0.5B": (
        "Qwen2ForCausalLM",
        494_032_768,
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        "Qwen3ForCausalLM",
        596_049_920,
        {
            "model_type": "qwen3",
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Mistral-7B": (
        "MistralForCausalLM",
        7_241_732_096,
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 32000,
        },
    ),
    "gemma-2b": (
        "GemmaForCausalLM",
        2_506_172_416,
        {
            "model_type": "gemma",
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "max_position_embeddings": 8192,
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rope_theta": 10000.0,
            "vocab_size": 256000,
        },
    ),
    "gemma-2-2b": (
        "Gemma2ForCausalLM",
        2_614_341_888,
        {
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
    ),
    "gemma-3-1b": (
        "Gemma3ForCausalLM",
        999_885_952,
        {
            "model_type": "gemma3_text",
            "attn_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
    ),
    "opt-350m": (
        "OPTForCausalLM",
        331_196_416,
        {
            "model_type": "opt",
            "do_layer_norm_before": False,
            "ffn_dim": 4096,
            "hidden_size": 1024,
            "max_position_embeddings": 2048,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "vocab_size": 50272,
            "word_embed_proj_dim": 512,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        124_439_808,
        {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
    ),
    "pythia-70m": (
        "GPTNeoXForCausalLM",
        70_426_624,
        {
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "num_hidden_layers": 6,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
    ),
    "mpt-7b": (
        "MptForCausalLM",
        6_649_286_656,
        {
            "model_type": "mpt",
            "architectures": ["MPTForCausalLM"],
            "attn_config": {
                "alibi": True,
                "alibi_bias_max": 8,
                "attn_impl": "torch",
                "attn_pdrop": 0,
                "attn_type": "multihead_attention",
                "attn_uses_sequence_id": False,
                "clip_qkv": None,
                "prefix_lm": False,
                "qk_ln": False,
                "softmax_scale": None,
            },
            "d_model": 4096,
            "expansion_ratio": 4,
            "learned_pos_emb": True,
            "logit_scale": None,
            "max_seq_len": 2048,
            "n_heads": 32,
            "n_layers": 32,
            "no_bias": True,
            "norm_type": "low_precision_layernorm",
            "vocab_size": 50432,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters(name):
    architecture, count, content = PUBLISHED[name]
    family = families()[architecture]
    config = family.from_hf(Source(transformers_config(content, name), frozenset(), None))
    _, shapes = parameters.abstract(lambda: family.model(config, rngs=nnx.Rngs(0)))
    assert parameters.count(shapes) == count
    again = family.from_hf(Source(family.to_hf(config), frozenset(), None))
    assert again == config


def test_older_forms_of_configs_are_understood():
    def config(name):
        architecture, _, content = PUBLISHED[name]
        source = Source(transformers_config(content, name), frozenset(), None)
        return families()[architecture].from_hf(source)

    assert config("Vicuna-7B-16k").rope == Rope(10_000.0, scaling="linear", factor=4.0)
    assert config("Llama-3.1-8B").rope.scaling == "llama3"
    assert config("gemma-2b").activation == "gelu_tanh"
    gemma = config("gemma-3-1b")
    assert (gemma.rope.theta, gemma.window_rope.theta) == (1e6, 1e4)
    assert [i for i in range(26) if not gemma.windowed[i]] == [5, 11, 17, 23]
    assert config("Qwen2.5-0.5B").window is None
    assert config("gemma-2-2b").windowed[:2] == (True, False)


# Tensors as older versions named them, and those that they saved besides.
OLDER = {
    "GPT2": (
        lambda name: name.removeprefix("transformer."),
        {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "h.1.attn.masked_bias": np.float32([1.0])},
    ),
    "OPT": (lambda name: name.removeprefix("model."), {}),
    "GPTNeoX": (
        lambda name: name,
        {
            "gpt_neox.layers.0.attention.masked_bias": np.float32([-1e9]),
            "gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.ones(2, np.float32),
        },
    ),
    "Llama": (
        lambda name: name,
        {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)},
    ),
    "Gemma": (lambda name: name.removeprefix("model."), {"lm_head.weight": None}),
}


@pytest.mark.parametrize("family", OLDER)
def test_older_checkpoints_load(family, tmp_path):
    original = reference(family, CASES[family][1])
    original.save_pretrained(tmp_path)
    expected = parameters.split(mmjax.convert.from_pretrained(tmp_path))[1]
    rename, more = OLDER[family]
    file = tmp_path / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    if family == "Gemma":  # the tied table a second time
        more = {"lm_head.weight": tensors["embed_tokens.weight"].copy()}
    save_file(tensors | more, file)
    actual = parameters.split(mmjax.convert.from_pretrained(tmp_path))[1]
    jax.tree.map(np.testing.assert_array_equal, expected, actual)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("Llama", {"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ("Llama", {"is_causal": False}, "is_causal=False"),
        (
            "Llama",
            {
                "rope_parameters": rope(
                    "longrope",
                    short_factor=[1.0] * 3,
                    long_factor=[2.0] * 3,
                    original_max_position_embeddings=8,
                )
            },
            "rope_type='longrope' is not supported",
        ),
        (
            "Llama",
            {"rope_parameters": rope("default", partial_rotary_factor=0.5)},
            "partial_rotary_factor=0.5",
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "linear"}},
            "cannot read the config.json.*factor",
        ),
        ("Gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Qwen2", {"layer_types": [FULL, SLIDING, FULL]}, "sliding_window is not given"),
        ("Qwen3", {"layer_types": ["chunked_attention", FULL, FULL]}, "chunked_attention"),
        ("Qwen3", {"layer_types": [FULL, FULL]}, "cannot read the config.json"),
        ("GPT2", {"add_cross_attention": True}, "add_cross_attention"),
        ("OPT", {"activation_function": "elu"}, "activation_function='elu'"),
        ("Mpt", {"no_bias": False}, "no_bias=False is not supported"),
        ("Mpt", {"attn_config": {"qk_ln": True}}, "qk_ln=True is not supported"),
    ],
)
def test_options_that_we_do_not_compute_are_refused(family, options, message, tmp_path):
    reference(family, CASES[family][1]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    with pytest.raises(mmjax.convert.ConversionError, match=message):
        mmjax.convert.from_pretrained(tmp_path)


def test_mpt_1b_is_refused_by_its_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mosaic_gpt"}')
    with pytest.raises(
        mmjax.convert.ConversionError, match="MPT-1B, the language model of OpenFlamingo-3B"
    ):
        mmjax.convert.from_pretrained(tmp_path)


def test_a_model_that_no_class_expresses_is_not_saved(tmp_path):
    """OPT has no window, and nothing was written."""
    reference("Mistral", CASES["Mistral"][1]).save_pretrained(tmp_path / "hf")
    model = mmjax.convert.from_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="window=4"):
        mmjax.convert.save_pretrained(model, tmp_path / "no", architecture="LlamaForCausalLM")
    assert not (tmp_path / "no").exists()
    del model.origin  # the first class that fits is found
    mmjax.convert.save_pretrained(model, tmp_path / "found")
    content = json.loads((tmp_path / "found" / "config.json").read_text())
    assert content["architectures"] == ["MistralForCausalLM"] and content["sliding_window"] == 4
