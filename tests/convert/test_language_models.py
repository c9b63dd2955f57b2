"""Language models beside transformers: every option of their configs."""

import functools

import hf
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from functional import QUICK
from safetensors.numpy import load_file

import mmjax.convert
from mmjax import params as parameters

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # several would wait for each other longer than such models take

VOCAB, LENGTH = 45, 11
# Tokens of each text: whole, padded on the left, padded on the right.
VALID = np.stack([np.ones(LENGTH, bool), np.arange(LENGTH) >= 4, np.arange(LENGTH) < 6])

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "ffn_dim": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MPT = {"vocab_size": VOCAB, "d_model": 24, "n_layers": 3, "n_heads": 4, "max_seq_len": 16}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 16,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rope(kind, **options):
    return {"rope_type": kind, "rope_theta": 1000.0, **options}


FULL, SLIDING = "full_attention", "sliding_attention"
# Options that matter, per family; lengths and caps are small, so that each changes the result.
CASES = {
    "Llama": (
        LLAMA,
        {"num_key_value_heads": 4},
        {
            "hidden_size": 42,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "attention_bias": True,
            "rope_parameters": rope("linear", factor=3.0),
            "rms_norm_eps": 1e-2,
        },
        {
            "num_key_value_heads": 1,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "rope_parameters": rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
        {
            "num_key_value_heads": 2,
            "max_position_embeddings": 8,
            "rope_parameters": rope("dynamic", factor=2.0),
        },
        {
            "head_dim": 12,
            "hidden_act": "gelu_new",
            "rope_parameters": rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=40,
                beta_fast=8.0,
                beta_slow=0.5,
                truncate=False,
                mscale=0.7,
                mscale_all_dim=1.5,
            ),
        },
    ),
    "Mistral": (
        LLAMA,
        {"num_key_value_heads": 2, "sliding_window": 4},
        {"num_key_value_heads": 4, "sliding_window": None, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 10, "sliding_window": 1, "hidden_act": "relu"},
        {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "sliding_window": 7,
            "rope_parameters": rope("linear", factor=2.0),
        },
    ),
    "Qwen2": (
        LLAMA,
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        {
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
        },
        {
            "num_key_value_heads": 2,
            "head_dim": 10,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": [SLIDING, FULL, SLIDING],
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16),
        },
    ),
    "Qwen3": (
        LLAMA,
        {"num_key_value_heads": 2, "head_dim": 6},
        {"num_key_value_heads": 4, "head_dim": 10, "attention_bias": True, "rms_norm_eps": 1e-2},
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 0,
        },
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 2,
            "layer_types": [FULL, FULL, SLIDING],
            "rope_parameters": rope("dynamic", factor=2.0),
            "max_position_embeddings": 8,
        },
    ),
    "Gemma": (
        LLAMA,
        {"num_key_value_heads": 4, "head_dim": 6},
        {"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": False},
        {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True, "hidden_act": "gelu"},
        {
            "hidden_size": 42,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 14,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-2,
            "rope_parameters": rope("linear", factor=2.0),
        },
    ),
    "Gemma2": (
        LLAMA,
        {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": 4}
        | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
        {"num_key_value_heads": 4, "head_dim": 8, "query_pre_attn_scalar": 24}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": 1.0, "sliding_window": 3},
        {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 2}
        | {"final_logit_softcapping": None, "attn_logit_softcapping": 0.3}
        | {"layer_types": [FULL, FULL, FULL], "tie_word_embeddings": False, "sliding_window": 3},
        {"num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 6}
        | {"layer_types": [SLIDING, SLIDING, FULL], "sliding_window": 2, "attention_bias": True}
        | {"hidden_activation": "relu", "attn_logit_softcapping": None}
        | {"final_logit_softcapping": None},
    ),
    "Gemma3": (
        LLAMA,
        {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 9}
        | {"layer_types": [SLIDING, FULL, SLIDING]},
        {"num_key_value_heads": 4, "head_dim": 8, "sliding_window": 2, "query_pre_attn_scalar": 8}
        | {"final_logit_softcapping": 1.0, "attention_bias": True, "sliding_window_pattern": 2}
        | {
            "rope_parameters": {
                FULL: rope("linear", factor=8.0),
                SLIDING: {"rope_type": "default", "rope_theta": 20.0},
            }
        },
        {"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": False}
        | {"layer_types": [FULL, FULL, FULL], "rms_norm_eps": 1e-2},
        {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": 3, "hidden_activation": "gelu"}
        | {"layer_types": [SLIDING, SLIDING, SLIDING], "query_pre_attn_scalar": 3},
    ),
    "OPT": (
        OPT,
        {},
        {"do_layer_norm_before": False, "word_embed_proj_dim": 20, "activation_function": "gelu"},
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "num_attention_heads": 3},
        {"_remove_final_layer_norm": True, "tie_word_embeddings": False, "ffn_dim": 50},
        {"word_embed_proj_dim": 32, "tie_word_embeddings": False, "hidden_size": 30}
        | {"num_attention_heads": 5, "activation_function": "gelu_new"},
    ),
    "GPT2": (
        GPT2,
        {},
        {"scale_attn_by_inverse_layer_idx": True, "n_inner": 50, "activation_function": "gelu"},
        {"scale_attn_weights": False, "n_head": 3, "layer_norm_epsilon": 1e-2},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_embd": 30}
        | {"n_head": 5, "tie_word_embeddings": False, "activation_function": "relu"}
        | {"reorder_and_upcast_attn": True},
    ),
    "GPTNeoX": (
        LLAMA,
        {"rope_parameters": rope("default", partial_rotary_factor=0.7)},
        {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
        {"attention_bias": False, "tie_word_embeddings": True, "layer_norm_eps": 1e-2}
        | {"rope_parameters": rope("linear", factor=3.0, partial_rotary_factor=0.4)},
    ),
    "Mpt": (
        MPT,
        {"n_heads": 3, "layer_norm_epsilon": 1e-2},
        {"attn_config": {"softmax_scale": 0.3}, "tie_word_embeddings": False},
    ),
}
CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
}


def reference(family, options):
    transformers = hf.transformers()
    names = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    config, model = (getattr(transformers, name) for name in names)
    # Copies, since configs of transformers write into the dictionaries they are given.
    options = jax.tree.map(lambda x: x, CASES[family][0] | options, is_leaf=lambda x: x is None)
    torch.manual_seed(0)
    return model._from_config(config(**options), attn_implementation="eager")


def layers_of(model):
    base = model.base_model
    named = [getattr(base, name) for name in ("h", "blocks") if hasattr(base, name)]
    return named[0] if named else getattr(base, "decoder", base).layers


def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, VALID.shape).astype(np.int32)


def run_reference(model, weight):
    """Logits, what the head is applied to, what the first block gets and each block gives."""
    seen = {"blocks": []}
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0])),
        layers_of(model)[0].register_forward_pre_hook(
            lambda _, args: seen.update(embeddings=args[0])
        ),
    ]
    hooks += [
        layer.register_forward_hook(
            lambda _, __, out: seen["blocks"].append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in layers_of(model)
    ]
    positions = np.maximum(np.cumsum(VALID, axis=1) - 1, 0)
    logits = model(
        input_ids=torch.tensor(tokens(), dtype=torch.long),
        attention_mask=torch.tensor(VALID, dtype=torch.long),
        position_ids=torch.tensor(positions, dtype=torch.long),
    ).logits
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    (torch.tensor(weight) * logits).sum().backward()
    return logits, seen


@pytest.mark.parametrize(
    ("family", "number"),
    [(family, number) for family in CASES for number in range(1, len(CASES[family]))],
)
def test_equals_transformers(family, number, tmp_path):
    original = reference(family, CASES[family][number])
    directory = parity.save_hf(original, tmp_path / "hf")
    model = mmjax.convert.from_pretrained(directory)
    graph, params = parameters.split(model)
    weight = np.random.default_rng(1).normal(size=(*VALID.shape, VOCAB)).astype(np.float32)
    weight *= VALID[..., None] / LENGTH
    depth = model.config.depth

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, ids, mask):
        def loss(params):
            model = parameters.merge(graph, params)
            out = model.run(ids, mask=mask, features=range(depth))
            return jnp.sum(weight * out.logits), (out, model._start(ids, None, mask, None)[0])

        return jax.grad(loss, has_aux=True)(params)

    gradients, (out, embeddings) = run(params, tokens(), VALID)
    logits, seen = run_reference(original, weight)
    parity.close(family, "logits", out.logits, logits, VALID)
    parity.same_argmax(out.logits, logits, VALID)
    parity.close(family, "hidden", out.hidden, seen["hidden"], VALID)
    parity.close(family, "embeddings", embeddings, seen["embeddings"], VALID)
    for ours, theirs in zip(out.features, seen["blocks"], strict=True):
        parity.close(family, "blocks", ours, theirs, VALID)
    parity.check_gradients(family, model, gradients, original)
    check_config(family, model, original)
    if number == 1:
        ids = torch.tensor(tokens()[:1], dtype=torch.long)
        call = lambda model: model(input_ids=ids).logits  # noqa: E731
        parity.check_round_trip(directory, tmp_path / "saved", call)
        parity.check_saving_without_origin(directory, tmp_path / "plain")
    else:
        check_saved(model, directory, tmp_path / "saved")


def check_config(family, model, original):
    """What we say of the model to transformers makes it compute the same.

    But for rounding: it has several formulas for one activation.
    """
    config = mmjax.convert.FAMILIES[model.origin.architecture].to_hf(model.config)
    ours = type(original)._from_config(config, attn_implementation="eager").eval()
    ours.load_state_dict(original.state_dict())
    ids = torch.tensor(tokens(), dtype=torch.long)
    with torch.no_grad():
        actual, expected = (model(input_ids=ids).logits for model in (ours, original))
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def check_saved(model, directory, target):
    """The tensors that we write are those we read, by name and to the bit."""
    mmjax.convert.save_pretrained(model, target)
    before, after = (load_file(path / "model.safetensors") for path in (directory, target))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
