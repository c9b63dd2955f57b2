"""Our reader and writer beside the safetensors package, and what damaged files get."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmjax.convert.files import INDEX, WEIGHTS, Item, open_directory, write_directory
from mmjax.convert.table import ConversionError

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.normal(size=(3, 5)).astype(np.float32),
    "b": np.array(2.5, np.float32),
    "c": RNG.normal(size=(7,)).astype(np.float16),
    "d": RNG.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
    "e": np.arange(6, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


def items(tensors):
    return [Item(name, x.dtype, x.shape, lambda x=x: x) for name, x in tensors.items()]


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape
        assert actual[name].tobytes() == value.tobytes()


def test_we_read_what_the_package_writes(tmp_path):
    save_file(TENSORS, tmp_path / WEIGHTS)
    reader = open_directory(tmp_path)
    assert reader.shapes == {name: value.shape for name, value in TENSORS.items()}
    same({name: reader.read(name) for name in reader.shapes}, TENSORS)


@pytest.mark.parametrize("size", [10**9, 100, 1])
def test_the_package_reads_what_we_write(tmp_path, size):
    write_directory(tmp_path, items(TENSORS), size)
    if size == 10**9:
        files = [WEIGHTS]
    else:
        weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        assert set(weight_map) == set(TENSORS)
        files = sorted(set(weight_map.values()))
        assert len(files) > 1
        for name, file in weight_map.items():
            assert name in load_file(tmp_path / file)
    found = {}
    for file in files:
        found |= load_file(tmp_path / file)
    same(found, TENSORS)
    reader = open_directory(tmp_path)
    same({name: reader.read(name) for name in reader.shapes}, TENSORS)


def test_a_truncated_file_is_an_error(tmp_path):
    save_file(TENSORS, tmp_path / WEIGHTS)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        (tmp_path / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(ConversionError, match="damaged or truncated"):
            open_directory(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole + b"x")
    with pytest.raises(ConversionError, match="damaged or truncated"):
        open_directory(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole[:8] + b"\xff" + whole[9:])
    with pytest.raises(ConversionError, match="not JSON"):
        open_directory(tmp_path)


def test_shards_and_their_index_must_agree(tmp_path):
    write_directory(tmp_path, items(TENSORS), 100)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = tmp_path / "elsewhere"
    (tmp_path / files[1]).rename(moved)
    with pytest.raises(ConversionError, match=f"lacks 1 of the {len(files)} files.*{files[1]}"):
        open_directory(tmp_path)
    moved.rename(tmp_path / files[1])
    index["weight_map"]["ghost"] = files[0]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"lacks tensors.*ghost"):
        open_directory(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ConversionError, match="damaged"):
        open_directory(tmp_path)


def test_directories_without_weights_say_what_to_do(tmp_path):
    with pytest.raises(ConversionError, match="is no checkpoint"):
        open_directory(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"must be named model\.safetensors"):
        open_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConversionError, match=r"pickles.*save_pretrained"):
        open_directory(tmp_path)


def test_unknown_types_are_named(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ConversionError, match=r"'x'.*type F4.*Supported: F64"):
        open_directory(tmp_path).read("x")
