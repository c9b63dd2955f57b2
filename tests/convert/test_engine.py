"""Loading and saving: what must hold for every family, shown on a small CLIP of our own making.

Nothing here needs PyTorch.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax import params
from mmjax.convert import ConversionError, Row, load_params, model_config, open_checkpoint
from mmjax.convert.files import INDEX, WEIGHTS
from mmjax.convert.kinds import LINEAR, NORM, fused, patch
from mmjax.convert.table import lay_out, rename
from mmjax.sharding import MeshConfig, make_mesh

TOWER = {
    "width": 128,
    "depth": 2,
    "heads": 4,
    "mlp_width": 192,
    "activation": "quick_gelu",
    "norm_eps": 1e-5,
}
CONFIG = {
    "name": "clip",
    "embed_dim": 64,
    "image": {
        **TOWER,
        "image_size": 32,
        "patch_size": 8,
        "pooling": "cls",
        "position": "learned",
        "pre_norm": True,
        "patch_bias": False,
    },
    "text": {
        **TOWER,
        "vocab_size": 99,
        "max_len": 12,
        "attention": "causal",
        "pooling": "eos",
        "padding": "mask",
        "eos_id": 98,
    },
}


def randomised(model, seed=0):
    """Every parameter random, norms and biases too."""
    graph, arrays = params.split(model)
    rng = np.random.default_rng(seed)
    noise = {k: jnp.asarray(rng.normal(size=v.shape), v.dtype) for k, v in arrays.items()}
    return params.merge(graph, noise)


@pytest.fixture(scope="module")
def clip():
    return randomised(mmjax.build(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def saved(clip, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "clip"
    mmjax.save_pretrained(clip, directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copied")


def assert_same(actual, expected):
    actual, expected = params.split(actual)[1], params.split(expected)[1]
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def edit(directory, change):
    """Change the tensors of a checkpoint with one file."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def test_a_round_trip_is_exact(clip, saved, tmp_path):
    loaded = mmjax.from_pretrained(saved)
    assert_same(loaded, clip)
    assert loaded.config.image == clip.config.image
    assert loaded.config.text == clip.config.text
    mmjax.save_pretrained(loaded, tmp_path / "again")
    for file in ("config.json", WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


def test_several_files_are_one_checkpoint(clip, tmp_path):
    mmjax.save_pretrained(clip, tmp_path / "new", max_shard_size=200_000)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2
    assert_same(mmjax.from_pretrained(tmp_path / "new"), clip)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_and_written_exactly(copied, kind, tmp_path):
    edit(copied, lambda t: t.update({name: x.astype(kind) for name, x in t.items()}))
    original = load_file(copied / WEIGHTS)
    model = mmjax.from_pretrained(copied)
    assert all(x.dtype == jnp.float32 for x in params.split(model)[1].values())
    mmjax.save_pretrained(model, tmp_path / "again", dtype=kind)
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert {name: x.tobytes() for name, x in again.items()} == {
        name: x.tobytes() for name, x in original.items()
    }
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == (
        np.dtype(kind).name
    )


def test_a_dtype_is_that_of_matrices_and_of_the_computation(saved, tmp_path):
    model = mmjax.from_pretrained(saved, dtype="bfloat16")
    assert model.config.image.dtype == model.config.text.dtype == "bfloat16"
    arrays = params.split(model)[1]
    assert arrays["image/encoder/layers/mlp/up/kernel"].dtype == jnp.bfloat16
    assert arrays["text/token/embedding"].dtype == jnp.bfloat16
    for path in ("image/encoder/layers/mlp/up/bias", "text/final_norm/scale", "logit_scale"):
        assert arrays[path].dtype == jnp.float32
    # What is saved without a word is what is held.
    mmjax.save_pretrained(model, tmp_path / "again")
    assert_same(mmjax.from_pretrained(tmp_path / "again", dtype=jnp.bfloat16), model)


@pytest.mark.parametrize("kind", ["int8", np.int32, "flot", "bfloat17"])
def test_other_dtypes_are_refused(clip, saved, kind, tmp_path):
    """Whole numbers would have been zeros, nearly all."""
    with pytest.raises(ValueError, match="Valid: bfloat16, float16, float32"):
        mmjax.save_pretrained(clip, tmp_path / "new", dtype=kind)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="Valid: bfloat16, float16, float32"):
        mmjax.from_pretrained(saved, dtype=kind)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=["fsdp", "all"])
def test_each_device_holds_its_shard_only(clip, saved, sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    model = mmjax.from_pretrained(saved, mesh=mesh)
    assert_same(model, clip)
    kernel = params.split(model)[1]["image/encoder/layers/mlp/up/kernel"]
    shards = {shard.device: shard.data.nbytes for shard in kernel.addressable_shards}
    assert len(shards) == 8
    assert set(shards.values()) == {kernel.nbytes // (sizes[1] * sizes[2])}


def test_sharded_models_are_saved_whole(clip, saved, tmp_path):
    model = mmjax.from_pretrained(saved, mesh=make_mesh(MeshConfig(1, 4, 2)))
    mmjax.save_pretrained(model, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


def test_rules_need_a_mesh(saved):
    with pytest.raises(ValueError, match="give the mesh too"):
        mmjax.from_pretrained(saved, rules=((".*", "fsdp"),))


def test_the_config_keeps_what_it_said_and_tells_what_changed(copied, tmp_path):
    content = json.loads((copied / "config.json").read_text())
    content |= {"my_note": "kept", "transformers_version": "4.0"}
    content["vision_config"]["attention_dropout"] = 0.25
    (copied / "config.json").write_text(json.dumps(content))
    (copied / "preprocessor_config.json").write_text("{}")
    model = mmjax.from_pretrained(copied)
    mmjax.save_pretrained(model, tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == content
    assert (tmp_path / "same" / "preprocessor_config.json").read_text() == "{}"
    larger = mmjax.from_pretrained(copied, image_size=48)
    mmjax.save_pretrained(larger, tmp_path / "larger")
    changed = json.loads((tmp_path / "larger" / "config.json").read_text())
    assert changed["vision_config"].pop("image_size") == 48
    assert content["vision_config"].pop("image_size") == 32
    assert changed == content
    assert_same(mmjax.from_pretrained(tmp_path / "larger"), larger)


def test_a_model_that_no_class_computes_is_not_saved(tmp_path):
    config = {**CONFIG, "image": {**CONFIG["image"], "pooling": "mean"}}
    model = mmjax.build(config, rngs=nnx.Rngs(0))
    with pytest.raises(ConversionError, match=r"CLIPModel.*(pooling|class_token)"):
        mmjax.save_pretrained(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_replaced_only_when_asked(clip, copied):
    (copied / "notes.txt").write_text("mine")
    before = sorted(path.name for path in copied.iterdir())
    with pytest.raises(FileExistsError, match="nothing was written"):
        mmjax.save_pretrained(clip, copied)
    assert sorted(path.name for path in copied.iterdir()) == before
    mmjax.save_pretrained(clip, copied, overwrite=True)
    assert sorted(path.name for path in copied.iterdir()) == ["config.json", WEIGHTS]
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_nothing_half_written_remains(clip, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("mmjax.convert.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        mmjax.save_pretrained(clip, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_directories_that_are_no_checkpoints(tmp_path):
    with pytest.raises(ConversionError, match=r"There is no .*nowhere"):
        mmjax.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match=r"it has no config\.json"):
        mmjax.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="is not JSON"):
        mmjax.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clipp"}')
    with pytest.raises(ConversionError, match=r"'clipp'.*did you mean 'clip'.*siglip.*vit"):
        mmjax.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="model_type=None"):
        mmjax.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ConversionError, match=r"neither model\.safetensors"):
        mmjax.from_pretrained(tmp_path)


def test_all_that_does_not_fit_is_listed_at_once(copied):
    def change(tensors):
        tensors["extra.weight"] = np.zeros((2, 2), np.float32)
        del tensors["text_model.final_layer_norm.bias"]
        tensors["logit_scale"] = np.zeros((3,), np.float32)

    edit(copied, change)
    with pytest.raises(ConversionError) as caught:
        mmjax.from_pretrained(copied)
    message = str(caught.value)
    for problem in (
        "3 problem(s)",
        "missing: 'text_model.final_layer_norm.bias' (128,)",
        "not used: 'extra.weight' (2, 2)",
        "shape of 'logit_scale': (3,) in the file, () by the config",
        "Nothing was loaded",
    ):
        assert problem in message


def test_a_config_of_another_model_is_noticed(copied):
    content = json.loads((copied / "config.json").read_text())
    content["text_config"]["hidden_size"] = 64
    content["vision_config"]["num_hidden_layers"] = 3
    (copied / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConversionError, match=r"shape of 'text_model\.embeddings"):
        mmjax.from_pretrained(copied)


def test_a_missing_file_of_several_is_named(clip, tmp_path):
    mmjax.save_pretrained(clip, tmp_path / "new", max_shard_size=200_000)
    name = sorted(json.loads((tmp_path / "new" / INDEX).read_text())["weight_map"].values())[-1]
    (tmp_path / "new" / name).unlink()
    with pytest.raises(ConversionError, match=f"lacks 1 of the .* files.*{name}"):
        mmjax.from_pretrained(tmp_path / "new")


def test_parts_of_a_checkpoint(clip, saved):
    """What config.init reads: some parameters, where they are wanted."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[3])

    def target(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    expected = params.split(clip)[1]
    wanted = {
        "image/final_norm/scale": target(128),
        "text/encoder/layers/attention/query/kernel": target(2, 128, 128),
        "image/position/embedding": target(1 + 36, 128),
    }
    loaded = load_params(saved, wanted)
    assert loaded.keys() == wanted.keys()
    assert all(array.devices() == {jax.devices()[3]} for array in loaded.values())
    for path in list(wanted)[:2]:
        np.testing.assert_array_equal(loaded[path], expected[path])
    larger = params.split(mmjax.from_pretrained(saved, image_size=48))[1]
    np.testing.assert_allclose(
        loaded["image/position/embedding"], larger["image/position/embedding"], atol=1e-6
    )
    with pytest.raises(ConversionError) as caught:
        load_params(saved, {"image/final_nrm/scale": target(128), "logit_scale": target(2)})
    assert "did you mean 'image/final_norm/scale'" in str(caught.value)
    assert "'logit_scale' has shape () there, (2,) here" in str(caught.value)


def test_a_config_of_an_experiment_from_a_directory(clip, saved):
    config = model_config(saved)
    assert config["name"] == "clip"
    again = mmjax.build(config, rngs=nnx.Rngs(0))
    assert (again.config.image, again.config.text) == (clip.config.image, clip.config.text)


def test_looking_at_a_checkpoint_reads_no_tensor(saved, monkeypatch):
    monkeypatch.setattr("mmjax.convert.files.SafetensorsReader.read", None)
    checkpoint = open_checkpoint(saved)
    assert checkpoint.origin.architecture == "CLIPModel"
    assert checkpoint.config.image.width == 128


def test_tables_must_cover_a_model_exactly():
    shapes = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in {"a/kernel": (2, 3), "a/bias": (3,), "n/scale": (3,)}.items()
    }
    rows = (Row("A", "a", LINEAR), Row("N", "n", NORM))
    assert [(entry.name, entry.shape) for entry in lay_out(rows, shapes)] == [
        ("A.weight", (3, 2)),
        ("A.bias", (3,)),
        ("N.weight", (3,)),
    ]
    with pytest.raises(ConversionError, match="no row fills n/scale"):
        lay_out(rows[:1], shapes)
    with pytest.raises(ConversionError, match="a/kernel comes from A and from B"):
        lay_out((*rows, Row("B", "a", LINEAR)), shapes)
    with pytest.raises(ConversionError, match=r"only \['a/kernel'\] exist"):
        lay_out((Row("N", "n", NORM), Row("AB", ("a", "b"), fused(1, 1))), shapes)


def test_old_names_may_not_collide():
    renames = ((r"^old\.", ""), (r"gamma$", "weight"))
    assert rename(["old.a.gamma", "b"], renames, "x") == {"a.weight": "old.a.gamma", "b": "b"}
    with pytest.raises(ConversionError, match=r"'a\.weight' and 'old\.a\.gamma' are both"):
        rename(["a.weight", "old.a.gamma"], renames, "x")


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(LINEAR, (16, 5)), (patch(4, 3), (16, 3, 4, 4)), (fused(8, 4, 4), (16, 5))],
    ids=["linear", "patch", "fused"],
)
def test_transforms_are_bijections(kind, shape):
    transform = kind[0].transform
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    ours = transform.to_ours(jnp.asarray(x))
    np.testing.assert_array_equal(transform.to_theirs(*ours), x)
