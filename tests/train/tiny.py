"""Tiny experiments on random arrays, shared by the tests of training."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from mmjax.train.experiment import base_config

VIT = dict(
    image_size=16,
    patch_size=8,
    width=32,
    depth=2,
    heads=2,
    mlp_width=64,
    activation="gelu_tanh",
    norm_eps=1e-6,
    pooling="map",
    position="learned",
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


def contrastive(model: str = "siglip", *, chunked: bool = False, **groups) -> ConfigDict:
    """A SigLIP or CLIP of 2 layers; groups of the config replace or extend the defaults."""
    if model == "clip":
        text = {**TEXT, "attention": "causal", "pooling": "argmax"}
        fields = dict(name="clip", image=VIT, text=text, embed_dim=32)
    else:
        fields = dict(name="siglip", image=VIT, text=TEXT)
    return _config(
        task=dict(
            name="contrastive", loss="sigmoid" if model == "siglip" else "softmax", chunked=chunked
        ),
        model=fields,
        groups=groups,
    )


def classification(**groups) -> ConfigDict:
    return _config(
        task=dict(name="classification"),
        model=dict(name="vit", **VIT, num_classes=10),
        groups=groups,
    )


def _config(*, task: dict, model: dict, groups: dict) -> ConfigDict:
    defaults = dict(
        task=task,
        model=model,
        data=dict(tokenizer=None),
        optimizer=dict(
            name="adamw",
            learning_rate=1e-3,
            schedule=dict(name="constant", warmup=2),
            weight_decay=0.1,
        ),
        train=dict(steps=10, batch_size=16),
        checkpoint=dict(every=100),
    )
    for name, fields in groups.items():
        defaults[name] = (
            {**defaults.get(name, {}), **fields} if isinstance(fields, dict) else fields
        )
    return base_config(**defaults)


def batch(step: int = 0, size: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    return {
        "image": random.standard_normal((size, 16, 16, 3), np.float32),
        "text": random.integers(0, 64, (size, 8), dtype=np.int32),
        "text_mask": np.ones((size, 8), bool),
        "label": random.integers(0, 10, size, dtype=np.int32),
    }


def steps(experiment, count: int, fields=None, state=None, compiler_options=None):
    """Run some steps on random batches; returns the state and the losses. `state` is given up."""
    from mmjax import sharding

    fields = experiment.task.fields if fields is None else fields
    state = experiment.initial_state({}) if state is None else state
    compiled, losses = None, []
    for index in range(count):
        arrays = {name: batch(index, experiment.train.batch_size)[name] for name in fields}
        arrays = sharding.global_batch(arrays, experiment.mesh)
        if compiled is None:
            compiled = experiment.lower_step(arrays).compile(compiler_options)
        state, metrics = compiled(state, arrays)
        losses.append(float(metrics["loss"]))
    return state, losses


def only(params):
    """A training state with nothing but parameters."""
    from mmjax.train.state import TrainState

    return TrainState(step={}, rng={}, trainable=params, frozen={}, opt_state={}, ema={})
