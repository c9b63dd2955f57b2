"""Training that starts from a checkpoint of Hugging Face format: one tower, or all."""

import jax
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax import config as configs
from mmjax import params
from mmjax.config import ConfigError
from mmjax.train.experiment import load_initial, prepare

TOWER = {
    "width": 32,
    "depth": 2,
    "heads": 4,
    "mlp_width": 48,
    "activation": "quick_gelu",
    "norm_eps": 1e-5,
}
IMAGE = {
    **TOWER,
    "image_size": 32,
    "patch_size": 16,
    "pooling": "cls",
    "position": "learned",
    "pre_norm": True,
    "patch_bias": False,
}
TEXT = {
    **TOWER,
    "vocab_size": 99,
    "max_len": 12,
    "attention": "causal",
    "pooling": "argmax",
    "padding": "mask",
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(directory, parameters)"""
    model = {"name": "clip", "embed_dim": 24, "image": IMAGE, "text": TEXT}
    return saved(model, tmp_path_factory.mktemp("weights") / "clip")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    fields = {**IMAGE, "pre_norm": False, "patch_bias": True, "num_classes": 7}
    return saved({"name": "vit", **fields}, tmp_path_factory.mktemp("weights") / "vit")


def saved(config, directory):
    model = mmjax.build(config, rngs=nnx.Rngs(0))
    graph, arrays = params.split(model)
    rng = np.random.default_rng(0)
    arrays = {k: jax.numpy.float32(rng.normal(size=v.shape)) for k, v in arrays.items()}
    mmjax.save_pretrained(params.merge(graph, arrays), directory)
    return directory, {k: np.asarray(v) for k, v in arrays.items()}


def start(config, arguments, *overrides):
    """The model's config, and what is loaded before the first step, on 8 devices."""
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    config = configs.load(f"configs/{config}.py:{text}", overrides)
    return config.model, load_initial(prepare(config))


def test_a_whole_pair(clip):
    directory, there = clip
    model, loaded = start("clip/b32", {"weights": directory, "res": 32, "batch": 64, "fsdp": 4})
    assert model.embed_dim == 24 and model.image.image_size == 32
    assert loaded.keys() == there.keys()
    for path, value in there.items():
        np.testing.assert_array_equal(loaded[path], value)
    kernel = loaded["image/encoder/layers/mlp/up/kernel"]
    assert kernel.dtype == np.float32 and len(kernel.sharding.device_set) == 8


def test_another_resolution_interpolates(clip):
    directory, there = clip
    _, loaded = start("clip/b32", {"weights": directory, "res": 48, "batch": 64})
    table = loaded.pop("image/position/embedding")
    expected = mmjax.from_pretrained(directory, image_size=48).image.position.embedding[...]
    assert table.shape == (1 + 9, 32)
    np.testing.assert_allclose(table, expected, atol=1e-6)
    assert loaded.keys() == there.keys() - {"image/position/embedding"}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_of_a_pair(clip, tower):
    """Into a model of another kind, whose other tower is its own."""
    directory, there = clip
    arguments = {"weights": directory, "towers": tower, "res": 32, "patch": 8}
    model, loaded = start("siglip/openmoji", arguments)
    assert model.name == "siglip"
    assert loaded.keys() == {path for path in there if path.startswith(f"{tower}/")}
    for path, value in loaded.items():
        np.testing.assert_array_equal(value, there[path])
    other = model["text" if tower == "image" else "image"]
    assert model[tower].width == 32 and other.width == 192


def test_the_tokenizer_comes_with_the_text_tower(clip):
    load = configs.load
    for towers, name in (("text", "hf"), ("image", "wordpiece")):
        config = load(f"configs/siglip/openmoji.py:weights={clip[0]},towers={towers},res=32")
        assert config.data.tokenizer.name == name
        assert config.data.train.text.max_len == config.model.text.max_len


@pytest.mark.parametrize("source", ["clip", "vit"])
def test_a_tower_for_classification(source, request):
    directory, there = request.getfixturevalue(source)
    arguments = {"weights": directory, "res": 32, "batch": 64, "classes": 5}
    model, loaded = start("vit/s16_imagenet", arguments)
    assert model.num_classes == 5 and model.width == 32
    prefix = "image/" if source == "clip" else ""
    assert "head/kernel" not in loaded and "final_norm/scale" in loaded
    for path, value in loaded.items():
        np.testing.assert_array_equal(value, there[prefix + path])


def test_what_does_not_fit_is_said(clip, vit, tmp_path):
    for config, arguments, message in (
        ("siglip/openmoji", {"weights": clip[0]}, "holds a 'clip', this config trains a 'siglip'"),
        ("clip/b32", {"weights": vit[0], "towers": "text"}, "has no text tower"),
        ("clip/b32", {"weights": clip[0], "towers": "images"}, "did you mean 'image'"),
    ):
        with pytest.raises(ConfigError, match=message):
            start(config, arguments)
    with pytest.raises(ValueError, match="is no checkpoint"):
        start("clip/b32", {"weights": tmp_path})
