"""What every family must show beside transformers, and the largest differences seen.

The checks take a tiny model of transformers with random weights; `tests/convert/conftest.py` prints
the differences in the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import hf
import jax
import numpy as np

import mmjax.convert
from mmjax import params

LIMIT = 1e-4
# (family, what) -> the largest absolute difference, or relative one of gradients.
LARGEST: dict[tuple[str, str], float] = {}


def close(family: str, what: str, ours, theirs, where=None) -> None:
    """Within 1e-4 absolute of each other, and finite.

    Args:
      where: a boolean mask over leading dimensions; the rest (padding) does not count.
    """
    ours, theirs = _numpy(ours), _numpy(theirs)
    assert ours.shape == theirs.shape, (family, what, ours.shape, theirs.shape)
    if where is not None:
        ours, theirs = ours[_numpy(where).astype(bool)], theirs[_numpy(where).astype(bool)]
    assert ours.size, (family, what, "nothing to compare")
    assert np.isfinite(ours).all() and np.isfinite(theirs).all(), (family, what)
    difference = float(np.abs(ours.astype(np.float64) - theirs).max())
    LARGEST[family, what] = max(LARGEST.get((family, what), 0.0), difference)
    assert difference <= LIMIT, (family, what, difference)


def same_argmax(ours, theirs, where=None) -> None:
    """The largest entry along the last dimension is the same one."""
    ours, theirs = _numpy(ours).argmax(-1), _numpy(theirs).argmax(-1)
    if where is not None:
        ours, theirs = ours[_numpy(where).astype(bool)], theirs[_numpy(where).astype(bool)]
    np.testing.assert_array_equal(ours, theirs)


def check_gradients(family: str, model, gradients: Mapping[str, jax.Array], reference) -> None:
    """Our gradients, by path, beside those of a reference on which `backward` has been called.

    Both go through the family's table. Every tensor's largest error is below 1e-3 of its largest
    entry. Gradients that are zero but for rounding (the bias of attention's keys) are compared with
    the largest gradient of the model.

    Args:
      model: ours, read by `from_pretrained`.
      reference: the model of transformers; tensors without a gradient (buffers) count as zero.
    """
    theirs = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in (*reference.named_parameters(), *reference.named_buffers())
    }
    top = max(np.abs(g).max() for g in theirs.values())
    assert top > 1e-3, "a loss without gradients shows nothing"
    family_, entries = _layout(model)
    renamed = {}
    for name, value in theirs.items():
        renamed |= {c: value for c in mmjax.convert.table.rename([name], family_.renames, "")}
    worst = 0.0
    for entry in entries:
        parts = [np.asarray(gradients[path]) for path in entry.paths]
        parts = parts if entry.layer is None else [part[entry.layer] for part in parts]
        ours = np.asarray(entry.transform.to_theirs(*parts))
        expected = renamed[entry.name]
        scale = max(np.abs(expected).max(), 1e-3 * top)
        error = float(np.abs(ours - expected).max() / scale)
        worst = max(worst, error)
        assert error <= 1e-3, (family, entry.name, error)
    key = (family, "gradients (relative)")
    LARGEST[key] = max(LARGEST.get(key, 0.0), worst)


def save_hf(reference, directory: Path) -> Path:
    """The directory that transformers writes, with every parameter random."""
    hf.randomise(reference).save_pretrained(directory)
    return directory


def check_round_trip(directory: Path, target: Path, call: Callable | None = None) -> None:
    """Loading, saving and loading again is exact, and transformers agrees with what we saved.

    Args:
      directory: as transformers wrote it.
      target: where to save; it must not exist.
      call: torch model -> tensor; the same from both directories. None compares weights only.
    """
    import torch
    import transformers

    model = mmjax.convert.from_pretrained(directory)
    mmjax.convert.save_pretrained(model, target)
    again = mmjax.convert.from_pretrained(target)
    assert again.config == model.config
    before, after = params.split(model)[1], params.split(again)[1]
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path], err_msg=path)
    architecture = json.loads((target / "config.json").read_text())["architectures"][0]
    loader = getattr(transformers, architecture)
    theirs, info = loader.from_pretrained(target, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], (problem, info[problem])
    original = loader.from_pretrained(directory).eval()
    state = theirs.state_dict()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    if call is not None:
        with torch.no_grad():
            assert torch.equal(call(theirs.eval()), call(original))


def check_saving_without_origin(directory: Path, target: Path) -> None:
    """A model that knows nothing of where it came from is saved as something equal."""
    model = mmjax.convert.from_pretrained(directory)
    architecture = model.origin.architecture
    del model.origin
    mmjax.convert.save_pretrained(model, target, architecture=architecture)
    again = mmjax.convert.from_pretrained(target)
    assert again.config == model.config
    before, after = params.split(model)[1], params.split(again)[1]
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path], err_msg=path)


def _layout(model):
    family = mmjax.convert.FAMILIES[model.origin.architecture]
    _, arrays = params.split(model)
    return family, mmjax.convert.table.lay_out(family.rows(model.config), arrays)


def _numpy(x) -> np.ndarray:
    return x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)
