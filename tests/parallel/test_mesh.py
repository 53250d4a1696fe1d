"""The mesh, where parameters lie on it, and what keeps sums over it from being lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig, abstract_params, flatten
from trace_jax.models.sharding import param_specs
from trace_jax.parallel import mesh as meshes
from trace_jax.parallel.mesh import BATCH_AXES, make_mesh, storage_spec

GATE_UP = ("layers", "experts", "embed", "gate_up", "expert_hidden")
SIZES = {"data": 4, "expert": 2, "tensor": 2}


def test_a_mesh_has_three_axes_and_data_takes_what_is_left():
    assert make_mesh().axis_names == meshes.AXES and make_mesh().shape["data"] == len(jax.devices()) == 8
    mesh = make_mesh(expert=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "expert": 2, "tensor": 2} and meshes.row_shards(mesh) == 4


@pytest.mark.parametrize("sizes", [{"expert": 3}, {"data": 3}, {"data": 8, "tensor": 2}])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(ConfigError, match="there are 8"):
        make_mesh(**sizes)


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((2, 8, 16, 2, 6), GATE_UP, P(None, "expert", "data", None, "tensor")),
        ((2, 7, 16, 2, 6), GATE_UP, P(None, None, BATCH_AXES, None, "tensor")),
        ((2, 8, 5, 16), ("layers", "experts", "expert_hidden", "embed"), P(None, "expert", None, "data")),
        ((64, 16), ("vocab", "embed"), P("tensor", BATCH_AXES)),
        ((61, 16), ("vocab", "embed"), P(None, BATCH_AXES)),
        ((61, 6), ("vocab", "embed"), P(None, "expert")),
        ((64, 7), ("vocab", "embed"), P("tensor")),
        ((2, 16, 8), ("layers", "embed", "router"), P(None, BATCH_AXES)),
        ((2, 16), ("layers", "embed"), P()),
    ],
)  # fmt: skip
def test_storage(shape, axes, spec):
    assert storage_spec(shape, axes, SIZES) == spec


def test_every_matrix_of_an_even_model_is_cut_over_all_devices_but_tensor_at_least():
    config = ModelConfig(vocab_size=64, hidden_size=16, num_experts=8, expert_hidden_size=8, shared_hidden_size=8)
    mesh = make_mesh(expert=2, tensor=2)
    shapes = flatten(abstract_params(config))
    for path, spec in param_specs(config, mesh).items():
        used = {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
        if len(shapes[path].shape) - path.startswith("layers") > 1:
            assert used >= {"data", "expert"}, path


def test_as_varying_marks_what_differs_between_devices_and_sum_over_sums_only_that():
    mesh = make_mesh(jax.devices()[:2])

    def check(equal, split):
        assert meshes.varying_axes(equal) == frozenset() and meshes.varying_axes(split) == {"data", "expert"}
        assert meshes.varying_axes(meshes.as_varying(equal, meshes.varying_axes(equal, split))) == {"data", "expert"}
        return meshes.sum_over(equal, *BATCH_AXES), meshes.sum_over(split, *BATCH_AXES)

    run = jax.shard_map(check, mesh=mesh, in_specs=(P(), P(BATCH_AXES)), out_specs=P())
    equal, split = run(jnp.float32(3), jnp.arange(2, dtype=jnp.float32))
    assert float(equal) == 3 and split.tolist() == [1.0]
    assert meshes.varying_axes(jnp.zeros(2)) == frozenset()


def test_arrays_go_to_the_mesh_and_come_back():
    mesh, x = make_mesh(expert=2, tensor=2), np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = meshes.place({"a": x, "b": x}, mesh, {"a": P(BATCH_AXES), "b": P("tensor")})
    assert placed["a"].addressable_shards[0].data.shape == (2, 3)
    assert placed["b"].addressable_shards[0].data.shape == (4, 3)
    assert all(np.array_equal(back, x) for back in meshes.to_host(placed).values())
