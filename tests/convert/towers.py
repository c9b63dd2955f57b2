"""One comparison for all encoders: outputs, blocks, gradients and round trips."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import parity
from flax import nnx

import mmjax.convert
from mmjax import params

# Compiling is what takes the time here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
TOKENS = {"vocab_size": 50, "max_position_embeddings": 12}


def pixels(*shape: int, seed: int = 0) -> jax.Array:
    """Images [B, H, W, C]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def channels_first(images: jax.Array):
    import torch

    return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2))


def texts(*ends: int, length: int = 12, end: int = 40, seed: int = 0):
    """Tokens of texts that end (with `end`) at these places, padded with 1, and their mask."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, end, (len(ends), length)).astype(np.int32)
    mask = np.arange(length)[None] <= np.array(ends)[:, None]
    tokens[np.arange(len(ends)), ends] = end
    return jnp.asarray(np.where(mask, tokens, 1)), jnp.asarray(mask)


def long(x: np.ndarray):
    import torch

    return torch.tensor(np.asarray(x), dtype=torch.long)


def blocks(hidden_states) -> object:
    """[F, B, N, D] of what transformers calls hidden states, whose first is the embeddings."""
    import torch

    return torch.stack(tuple(hidden_states)[1:])


def quick(model, *inputs, function=None, **options):
    """One call of a model (or of `function(model, ...)`), compiled without much optimisation."""
    graph, arrays = params.split(model)
    function = type(model).__call__ if function is None else function

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(arrays, inputs):
        return function(params.merge(graph, arrays), *inputs, **options)

    return run(arrays, inputs)


def fresh(model, config):
    """A model with random parameters, made by one compiled function."""
    graph, _ = params.abstract(lambda: model(config, rngs=nnx.Rngs(0)))
    make = jax.jit(lambda: params.split(model(config, rngs=nnx.Rngs(0)))[1], compiler_options=QUICK)
    return params.merge(graph, make())


def remember(model, name: str, result) -> None:
    """From now on `model.name` returns this, so that it is compiled once and used often."""
    object.__setattr__(model, name, lambda *args, **options: result)


def check(
    family: str,
    reference,
    directory,
    inputs: tuple,
    ours: Callable,
    theirs: Callable,
    where: Mapping[str, np.ndarray] | None = None,
    gradients: bool = True,
) -> None:
    """Everything a family must show for one config.

    Args:
      reference: a model of transformers, which is given random weights.
      directory: a scratch directory.
      inputs: arrays (JAX).
      ours: our model, *inputs -> outputs by name. "logits" are compared in their order too.
      theirs: the reference, *inputs -> the same.
      where: which positions of an output count, by name: [B, N] (or [F, B, N] for "blocks").
      gradients: whether to compare those too; else that it is saved without its origin.
    """
    import torch

    where = where or {}
    source = parity.save_hf(reference, directory / "source")
    model = mmjax.convert.from_pretrained(source)
    graph, arrays = params.split(model)
    expected = theirs(reference, *inputs)

    rng = np.random.default_rng(1)
    weights = {
        name: rng.normal(size=out.shape).astype(np.float32) / out.numel() ** 0.5
        for name, out in expected.items()
    }
    for name, mask in where.items():
        weights[name] *= mask[..., None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(arrays, inputs):
        def loss(arrays):
            out = ours(params.merge(graph, arrays), *inputs)
            assert out.keys() == expected.keys()
            return sum(jnp.sum(weights[name] * out[name]) for name in out), out

        if not gradients:
            return None, loss(arrays)[1]
        return jax.grad(loss, has_aux=True)(arrays)

    slopes, actual = run(arrays, inputs)
    for name, out in expected.items():
        parity.close(family, name, actual[name], out, where.get(name))
    if "logits" in expected:
        parity.same_argmax(actual["logits"], expected["logits"], where.get("logits"))
    if gradients:
        reference.zero_grad()
        sum((torch.tensor(weights[k]) * out).sum() for k, out in expected.items()).backward()
        parity.check_gradients(family, model, slopes, reference)
    else:
        saved_without_origin(model, source, directory / "no_origin")
    with torch.no_grad():
        parity.check_round_trip(source, directory / "target")
    same_files(source, directory / "target")


def saved_without_origin(model, source, target) -> None:
    """A model that knows nothing of where it came from is saved as the same tensors."""
    from safetensors.numpy import load_file

    architecture = model.origin.architecture
    del model.origin
    mmjax.convert.save_pretrained(model, target, architecture=architecture)
    expected, actual = (load_file(d / "model.safetensors") for d in (source, target))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensor, actual[name], err_msg=name)


def same_files(source, target) -> None:
    """Names, shapes and config are those that transformers writes."""
    from safetensors import safe_open

    found = []
    for directory in (source, target):
        with safe_open(directory / "model.safetensors", "np") as file:
            found.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    assert found[0] == found[1]
    configs = [json.loads((d / "config.json").read_text()) for d in (source, target)]
    assert configs[0] == configs[1]


def rewrite(source, target, change: Callable[[dict], dict], **config) -> object:
    """A copy of a checkpoint with other tensors (`change`: name -> tensor) and config fields."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


def same_parameters(first, second) -> None:
    first, second = params.split(first)[1], params.split(second)[1]
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=path)


def refused(name: str, hf_config) -> None:
    """Calls `from_hf` of a family; for tests of what it raises."""
    family = mmjax.convert.family.families()[name]
    family.from_hf(mmjax.convert.Source(hf_config, frozenset(), None))
