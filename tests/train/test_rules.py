"""Rules tables are exact; shardings follow them."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from mmjax import rules, sharding

PATHS = ["image/layers/mlp/up/kernel", "image/layers/mlp/up/bias", "logit_scale"]


def test_the_first_row_that_matches_wins():
    table = [(".*/kernel", 1), ("image/.*", 2), (".*", 3)]
    assert list(rules.match(table, PATHS, name="t").values()) == [1, 2, 3]


def test_everything_wrong_is_listed_at_once():
    table = [("text/.*", 1), ("image/.*", 2), (".*/bias", 3), ("(", 4)]
    with pytest.raises(rules.RuleError) as error:
        rules.match(table, PATHS, name="rules.x")
    message = str(error.value)
    assert "no row covers parameter 'logit_scale'" in message
    assert "row ('text/.*', 1) matches no parameter" in message
    assert "row ('.*/bias', 3) decides nothing" in message
    assert "row ('(', 4) is not" in message
    assert "rules.x" in message


def test_patterns_match_whole_paths():
    with pytest.raises(rules.RuleError, match="matches no parameter"):
        rules.match([("mlp", 1), (".*", 2)], PATHS, name="t")


@pytest.mark.parametrize(
    "sizes, devices, expected",
    [((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 8, 1), 8, (1, 8, 1))],
)
def test_mesh_shapes(sizes, devices, expected):
    assert sharding.mesh_shape(sharding.MeshConfig(*sizes), devices) == expected


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (16, 1, 1)])
def test_meshes_that_do_not_fit_say_so(sizes):
    with pytest.raises(sharding.MeshError, match=r"8 device|at most one"):
        sharding.mesh_shape(sharding.MeshConfig(*sizes), 8)


@pytest.mark.parametrize("batch, nearest", [(30, "24 or 48"), (5, "24")])
def test_batches_that_do_not_divide_say_so(batch, nearest):
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 4, 1))
    sharding.check_batch(48, mesh, accumulate=3, processes=2)
    with pytest.raises(sharding.MeshError, match=re.escape(f"Nearest train.batch_size: {nearest}")):
        sharding.check_batch(batch, mesh, accumulate=3, processes=2)


@pytest.mark.parametrize(
    "path, shape, strategy, expected",
    [
        ("image/layers/mlp/up/kernel", (4, 256, 512), "tensor(-1)+fsdp", P(None, "fsdp", "tensor")),
        (
            "image/layers/mlp/down/kernel",
            (4, 512, 256),
            "tensor(-2)+fsdp",
            P(None, "tensor", "fsdp"),
        ),
        # The stacked dimension is never sharded, though it is the largest.
        ("image/layers/mlp/up/bias", (512, 64), "fsdp", P(None, "fsdp")),
        ("text/embedding", (512, 64), "fsdp", P("fsdp", None)),
        ("text/embedding", (511, 64), "fsdp", P(None, "fsdp")),
        ("text/embedding", (511, 63), "fsdp", P(None, None)),
        ("logit_scale", (), "fsdp", P()),
        ("image/layers/norm/scale", (4, 64), "fsdp", P(None, None)),
        ("text/embedding", (512, 64), "replicate", P(None, None)),
    ],
)
def test_parameter_specs(path, shape, strategy, expected):
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    assert sharding.parameter_spec(path, shape, strategy, mesh) == expected


@pytest.mark.parametrize(
    "shape, strategy, message",
    [
        ((3, 5), "tensor(-1)", "does not divide by the tensor axis"),
        ((3, 5), "tensor(2)", "has no dimension 2"),
        ((3, 5), "fdsp", "unknown"),
    ],
)
def test_strategies_that_do_not_fit_say_so(shape, strategy, message):
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    with pytest.raises(sharding.MeshError, match=message):
        sharding.parameter_spec("text/embedding", shape, strategy, mesh)


def test_a_mesh_of_some_devices():
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 2), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
