"""Tiny models of transformers with random weights, and their weights in our layout.

The tables here are for tests of the layers and models; the converters of real checkpoints have
their own. The same table carries gradients over, since they have the layout of the weights.
"""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax import nnx

BLOCK = {
    r"(?:self_attn|attention)\.q_proj": "attention/query",
    r"(?:self_attn|attention)\.k_proj": "attention/key",
    r"(?:self_attn|attention)\.v_proj": "attention/value",
    r"(?:self_attn|attention)\.(?:o_proj|out_proj)": "attention/out",
    r"self_attn\.q_norm": "attention/query_norm",
    r"self_attn\.k_norm": "attention/key_norm",
    r"layernorm_before|layer_norm1|input_layernorm": "attention_norm",
    r"layernorm_after|layer_norm2|post_attention_layernorm": "mlp_norm",
    r"mlp\.(?:fc1|up_proj)": "mlp/up",
    r"mlp\.gate_proj": "mlp/gate",
    r"mlp\.(?:fc2|down_proj)": "mlp/down",
}

VIT = {
    r"(?:vit\.)?embeddings\.cls_token": "class_token",
    r"(?:vit\.)?embeddings\.position_embeddings": "position/embedding",
    r"(?:vit\.)?embeddings\.patch_embeddings\.projection": "patch/projection",
    r"(?:vit\.)?layers\.(\d+)": "encoder/layers",
    r"(?:vit\.)?layernorm": "final_norm",
    r"classifier": "head",
}

TOWERS = {
    r"text_model\.embeddings\.token_embedding": "text/token",
    r"text_model\.embeddings\.position_embedding": "text/position",
    r"text_model\.encoder\.layers\.(\d+)": "text/encoder/layers",
    r"text_model\.final_layer_norm": "text/final_norm",
    r"text_model\.head|text_projection": "text_projection",
    r"vision_model\.embeddings\.class_embedding": "image/class_token",
    r"vision_model\.embeddings\.patch_embedding": "image/patch/projection",
    r"vision_model\.embeddings\.position_embedding": "image/position",
    r"vision_model\.pre_layrnorm": "image/pre_norm",
    r"vision_model\.encoder\.layers\.(\d+)": "image/encoder/layers",
    r"vision_model\.post_layernorm": "image/final_norm",
    r"vision_model\.head\.probe": "image/pool/probe",
    r"vision_model\.head\.layernorm": "image/pool/norm",
    r"vision_model\.head": "image/pool",
    r"visual_projection": "image_projection",
    r"logit_scale": "logit_scale",
    r"logit_bias": "logit_bias",
}

DECODER = {r"layers\.(\d+)": "layers"}


def transformers():
    """The package; skips the test where it or PyTorch is not installed."""
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def randomise(model, seed: int = 0):
    """Adds noise to all weights, zero biases and unit norms included; returns the model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def weights(model) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


def gradients(model) -> dict[str, np.ndarray]:
    return {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}


def convert(tensors: dict[str, np.ndarray], table: dict[str, str], model: nnx.Module) -> nnx.State:
    """The parameters of `model`, from the tensors of its counterpart.

    Raises:
      AssertionError: if a tensor is not used or a parameter not filled, or not wholly.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in _split_fused(tensors).items():
        path, layer = _path(name, table)
        if path.endswith("kernel"):
            # [out, in] or [out, channels, height, width]
            tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
        found.setdefault(path, {})[layer] = tensor
    state = nnx.state(model, nnx.Param)
    for path, parameter in nnx.to_flat_state(state):
        parts = found.pop("/".join(map(str, path)))
        value = np.stack([parts[layer] for layer in range(len(parts))])
        assert value.size == parameter.size, (path, value.shape, parameter.shape)
        parameter.set_value(jax.numpy.array(value.reshape(parameter.shape)))
    assert not found, f"not used: {sorted(found)}"
    return state


def load(torch_model, table: dict[str, str], model: nnx.Module) -> nnx.Module:
    """`model` with the weights of its counterpart."""
    nnx.update(model, convert(weights(torch_model), table, model))
    return model


def _path(name: str, table: dict[str, str]) -> tuple[str, int]:
    for pattern, start in table.items():
        match = re.match(rf"(?:{pattern})(?:\.|$)", name)
        if match:
            layer = int(match[1]) if match.groups() else 0
            rest = name[match.end() :]
            for inner, middle in BLOCK.items():
                rest = re.sub(rf"^(?:{inner})(?=\.)", middle, rest)
            return _leaf(f"{start}/{rest}".rstrip("/").replace(".", "/")), layer
    raise AssertionError(f"no row for {name}")


def _leaf(path: str) -> str:
    owner, _, leaf = path.rpartition("/")
    if leaf != "weight":
        return path
    if owner.endswith("norm"):
        return f"{owner}/scale"
    if owner.endswith(("token", "position")):
        return f"{owner}/embedding"
    return f"{owner}/kernel"


def _split_fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, tensor in tensors.items():
        match = re.match(r"(.*)\.in_proj_(weight|bias)$", name)
        if match:
            for part, value in zip("qkv", np.split(tensor, 3), strict=True):
                out[f"{match[1]}.{part}_proj.{match[2]}"] = value
        else:
            out[name] = tensor
    return out


def assert_same_gradients(expected: nnx.State, actual: nnx.State, tolerance: float = 1e-3) -> None:
    """Every tensor's largest error is below `tolerance` of its largest entry.

    The bias of attention's keys has no gradient but rounding: the softmax is blind to it.
    """
    actual_flat = dict(nnx.to_flat_state(actual))
    for path, value in nnx.to_flat_state(expected):
        value, other = np.asarray(value[...]), np.asarray(actual_flat[path][...])
        scale = np.abs(value).max()
        error = np.abs(value - other).max()
        assert error <= tolerance * scale + 2e-6, f"{path}: error {error}, largest {scale}"
