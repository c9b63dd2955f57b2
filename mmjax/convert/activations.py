"""Activations by the names that configs of transformers give them."""

from __future__ import annotations

from mmjax.registry import nearest

# Theirs -> ours. Several of theirs are one function, written in different ways.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

# Ours -> theirs, where a checkpoint is written.
NAMES = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}


def activation(name: str, field: str) -> str:
    """Our name of an activation.

    Args:
      name: theirs.
      field: of their config; it stands in the message.

    Raises:
      ValueError: if we do not have it.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"{field}={name!r} is not supported; {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
