"""The list of collectives is that of the compiled program."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.plan import Collective, collectives
from mmjax.sharding import MeshConfig, make_mesh


def compiled_text(function, *specs):
    mesh = make_mesh(MeshConfig(8, 1, 1))
    shapes = [
        jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in specs
    ]
    with mesh:
        return (
            jax.jit(function, out_shardings=NamedSharding(mesh, P()))
            .lower(*shapes)
            .compile()
            .as_text()
        )


def test_kinds_sizes_and_sources():
    # Products of shards of the contracted dimension are added up over the devices.
    (found,) = collectives(compiled_text(lambda a, b: a @ b, P(None, "data"), P("data")))
    assert found.kind == "all-reduce"
    assert found.mebibytes == 64 * 64 * 4 / 2**20
    assert found.source.endswith("dot_general") and not found.looped

    (found,) = collectives(compiled_text(lambda a: a + 1, P("data")))
    assert found.kind == "all-gather"

    assert collectives(compiled_text(lambda a: a + 1, P())) == []


def test_collectives_in_loops_are_marked():
    mesh = make_mesh(MeshConfig(8, 1, 1))

    def around(x):
        def step(_, x):
            return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])

        return jax.lax.fori_loop(0, 3, step, x)

    ring = jax.jit(jax.shard_map(around, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    (found,) = collectives(ring.lower(jnp.zeros((8, 4))).compile().as_text())
    assert found.kind == "collective-permute" and found.looped


def test_what_is_written_once_for_each_part_counts_once():
    line = (
        "%all-gather.1 = bf16[32,8]{1,0} all-gather(%p), channel_id=7, "
        "metadata={op_name=\"state.trainable['a/kernel']\"}"
    )
    text = "\n".join([line, line.replace(".1 ", ".2 "), line.replace("id=7", "id=8")])
    assert collectives(text) == 2 * [
        Collective("all-gather", 32 * 8 * 2 / 2**20, "state.trainable['a/kernel']", False)
    ]
