"""Tiny random language models on both sides, whose choices are clear."""

from __future__ import annotations

import re

import hf
import numpy as np

import mmjax

VOCABULARY, NEW = 97, 64
LENGTHS = (3, 11, 7, 20)
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=80,
    pad_token_id=2,
    bos_token_id=1,
    eos_token_id=None,
)

# name -> (configuration class, model class, options)
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", dict(**_SIZES, max_position_embeddings=256)),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        dict(
            **_SIZES,
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=16,
            tie_word_embeddings=False,
        ),
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(
            vocab_size=VOCABULARY,
            n_embd=48,
            n_layer=2,
            n_head=4,
            n_positions=90,
            pad_token_id=2,
            bos_token_id=1,
            eos_token_id=None,
        ),
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(
            vocab_size=VOCABULARY,
            d_model=48,
            d_kv=12,
            d_ff=80,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            pad_token_id=2,
            decoder_start_token_id=0,
            eos_token_id=None,
        ),
    ),
}


# Sizes of random weights, by the beginning of a match: with these the most probable token is clear
# (near ties would be decided by rounding), and texts go on changing. Token tables are small, since
# where they are the output head as well a token would only repeat; T5 does not scale its queries.
_SIZES_OF_WEIGHTS = {
    r"embed_tokens|wte|shared": 0.1,
    r"SelfAttention\.q|EncDecAttention\.q": 0.05,
    r"relative_attention_bias": 1.0,
    r"": 0.25,
}


def reference(name: str):
    """A model of transformers."""
    transformers = hf.transformers()
    import torch

    torch.set_num_threads(1)  # quicker, for models as small as these
    config, model, options = FAMILIES[name]
    config = getattr(transformers, config)(**options)
    # Not torch's own attention: that of Gemma has a cap.
    result = getattr(transformers, model)._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, weight in result.named_parameters():
            size = next(s for key, s in _SIZES_OF_WEIGHTS.items() if re.search(key, path))
            noise = torch.randn(weight.shape, generator=generator)
            is_scale = re.search(r"(norm|ln_\w)\.weight", path) is not None
            weight.copy_(size * noise + is_scale)
    return result


def pair(name: str, directory):
    """The model of transformers and ours, read from what it saved."""
    theirs = reference(name)
    theirs.save_pretrained(directory)
    return theirs, mmjax.from_pretrained(directory)


def prompts() -> list[list[int]]:
    """Of unequal lengths."""
    random = np.random.default_rng(0)
    return [random.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]


def padded(rows: list[list[int]], side: str = "left") -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask."""
    longest = max(map(len, rows))
    tokens, mask = np.full((len(rows), longest), 2), np.zeros((len(rows), longest), bool)
    for row, (ids, valid) in zip(rows, zip(tokens, mask, strict=True), strict=True):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[place], valid[place] = row, True
    return tokens, mask


def continued(model, rows: list[list[int]], **options):
    """The new tokens that transformers chooses, or all that it returns where that is a record."""
    import torch

    tokens, mask = padded(rows)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), do_sample=False, **options
        )
    if not torch.is_tensor(out):
        return out
    return out.numpy()[:, 1 if model.config.is_encoder_decoder else tokens.shape[1] :]
