"""Every file under configs/: it builds, can be prepared, and is as reviewed.

`MMJAX_REWRITE_GOLDEN=1 pytest tests/configs` writes tests/configs/golden anew; the change then
stands in the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

from mmjax import config as configs
from mmjax.config import ConfigError
from mmjax.convert import ConversionError
from mmjax.data.spec import parse
from mmjax.sharding import MeshConfig, make_mesh
from mmjax.train.experiment import prepare

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config(" in path.read_text()
)


def golden(name: str) -> Path:
    return GOLDEN / (name.removeprefix("configs/").removesuffix(".py").replace("/", "_") + ".json")


def load(name: str):
    """The config; the test is skipped if it reads a package that is not here."""
    try:
        return configs.load(str(ROOT / name))
    except ConversionError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_config_is_as_reviewed(name):
    text = configs.to_json(load(name)) + "\n"
    if os.environ.get("MMJAX_REWRITE_GOLDEN"):
        golden(name).write_text(text)
    assert golden(name).is_file(), f"{name} is new: run with MMJAX_REWRITE_GOLDEN=1"
    changed = configs.difference(golden(name).read_text(), text)
    assert not changed, (
        f"{name} is no longer what was reviewed. If that is meant, run these tests with "
        "MMJAX_REWRITE_GOLDEN=1 and commit the change:\n" + "\n".join(changed)
    )


def test_no_golden_file_is_left_over():
    assert {path.name for path in GOLDEN.glob("*.json")} == {golden(name).name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_config_can_be_prepared(name):
    """On the simulated devices and on one; the data stream is checked without being opened."""
    config = load(name)
    # Those for one machine have small batches, which need not divide over many devices.
    config.train.batch_size += -config.train.batch_size % len(jax.devices())
    everywhere = prepare(config)
    single = prepare(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert everywhere.shapes == single.shapes
    assert set(everywhere.task.fields) <= set(everywhere.batch_shapes())
    parse(config.data.train)


@pytest.mark.parametrize("name", NAMES)
def test_config_refuses_unknown_arguments_and_keys(name):
    with pytest.raises(ConfigError, match="has no argument 'nonsense'"):
        configs.load(f"{ROOT / name}:nonsense=1")
    load(name)
    with pytest.raises(ConfigError, match=r"did you mean 'train\.batch_size'"):
        configs.load(str(ROOT / name), ["train.batchsize=8"])
