"""The mesh, where parameters lie on it, what is sent, and the same numbers on every mesh: steps, optimizers, drops.

Gradients of every switch are in tests/models/test_architecture.py, decoding in test_generate.py.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.tiny import LENGTH, make_rows, mesh_of, random_params
from trace_jax.config import ConfigError
from trace_jax.models import moe
from trace_jax.models.architecture import ModelConfig, flat_specs, flatten
from trace_jax.models.decoder import forward
from trace_jax.models.families import PUBLISHED, model_config
from trace_jax.models.sharding import chosen_mesh, on_mesh, param_specs, placed_params, sent_bytes
from trace_jax.parallel import mesh as meshes
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, ParallelConfig, make_mesh, place, to_host
from trace_jax.plan.hlo import traffic
from trace_jax.unlearning import optimizer as optimizer_module
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.losses import Constants
from trace_jax.unlearning.optimizer import OptimizerConfig, make_optimizer
from trace_jax.unlearning.step import initial_state, row_multiple, set_up, unlearning_step

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, num_experts=8,
    experts_per_token=2, expert_hidden_size=12, shared_hidden_size=8,
)  # fmt: skip
STEPS = 6
GATE_UP = ("layers", "experts", "embed", "gate_up", "expert_hidden")
SIZES = {"data": 4, "expert": 2, "tensor": 2}


def test_a_mesh_has_three_axes_and_data_takes_what_is_left():
    assert make_mesh().axis_names == meshes.AXES and make_mesh().shape["data"] == len(jax.devices()) == 8
    mesh = make_mesh(expert=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "expert": 2, "tensor": 2} and meshes.row_shards(mesh) == 4


@pytest.mark.parametrize(
    "sizes",
    [{"expert": 3}, {"data": 3}, {"data": 8, "tensor": 2}, {"expert": 0}, {"data": 8, "expert": -1, "tensor": -1}],
)
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
    assert meshes.storage_spec(shape, axes, SIZES) == spec


def trajectory(config, sizes, parallel=PLAIN):
    """(losses and gradient norms [STEPS, 2], parameters and metrics after the last step) of unlearning on a mesh."""
    mesh = mesh_of(*sizes)
    unlearning = UnlearningConfig(objective="npo", retain_loss="kl", alpha=3.0, learning_rate=3e-3, clip_norm=1.0)
    placed = place(flatten(random_params(config, noise=0.05)), mesh, param_specs(config, mesh))
    settings, constants, _ = set_up(placed, unlearning, config, selected=None, parallel=parallel, mesh=mesh)
    constants = Constants(placed, *place(constants[1:], mesh))
    state = initial_state({path: leaf * 1.05 for path, leaf in placed.items()}, settings, mesh)
    forget, retain = (make_rows(count, seed=count).batch(np.arange(count)) for count in (6, 8))
    weights = np.random.default_rng(0).exponential(size=(8, LENGTH)).astype(np.float32)
    padded = (pad_rows(part, row_multiple(settings, mesh)) for part in (forget, retain, weights))
    inputs, metrics = place(StepRows(*padded), mesh, P(BATCH_AXES)), []
    compiled = unlearning_step._cache_size()
    for _ in range(STEPS):
        state, now = unlearning_step(state, constants, inputs, settings=settings, mesh=mesh)
        metrics.append([float(now["loss"]), float(now["gradient_norm"])])
    assert unlearning_step._cache_size() == compiled + 1
    return np.array(metrics), to_host(state.trainable), now


RAGGED = dataclasses.replace(CONFIG, grouped_matmul="ragged")


@pytest.fixture(scope="module")
def oracle():
    """Every expert on every token, one device."""
    return trajectory(RAGGED, (1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "parallel"),
    [
        ((8, 1, 1), PLAIN),
        ((2, 2, 2), ParallelConfig(remat="layer", microbatches=2)),
        ((1, 4, 2), ParallelConfig(remat="dots", expert_buffer=4.0)),
    ],
)
def test_steps_are_those_of_the_ragged_product_on_one_device_whatever_memory_is_saved(sizes, parallel, oracle):
    metrics, params, last = trajectory(CONFIG, sizes, parallel)
    np.testing.assert_allclose(metrics, oracle[0], rtol=1e-4)
    for path, wanted in oracle[1].items():
        np.testing.assert_allclose(params[path], wanted, atol=2e-3, err_msg=path)
    assert not parallel.expert_buffer or float(last["dropped"]) == 0


@pytest.mark.parametrize(("sizes", "likely"), [((1, 4, 2), (1.0,)), ((2, 4, 1), (0.3, 1.0))])
def test_steps_are_the_same_where_a_devices_experts_have_the_likely_room_and_where_it_is_too_small(
    sizes, likely, oracle, monkeypatch
):
    """1: too small on some devices, not on others; 0.3: on all, and then as much."""
    monkeypatch.setattr(moe, "LIKELY", likely)
    metrics, params, _ = trajectory(RAGGED, sizes)
    np.testing.assert_allclose(metrics, oracle[0], rtol=1e-4)
    for path, wanted in oracle[1].items():
        np.testing.assert_allclose(params[path], wanted, atol=2e-3, err_msg=path)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizers_take_the_same_steps_on_four_devices(name, monkeypatch):
    """Factored means and orthogonal updates are of whole matrices, wherever their parts lie."""
    monkeypatch.setattr(optimizer_module, "_FACTORED_FROM", 8)
    mesh, specs = mesh_of(2, 1, 2), param_specs(CONFIG, mesh_of(2, 1, 2))
    config = OptimizerConfig(optimizer=name, learning_rate=3e-3, weight_decay=0.1, clip_norm=1.0)
    axes = {path: spec.axes for path, spec in flat_specs(CONFIG).items()}
    optimizer = make_optimizer(config, 4, axes=axes)
    params, gradients = (flatten(random_params(CONFIG, seed, noise=0.05)) for seed in (0, 1))

    @jax.jit
    def step(params, state, gradients):
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def steps(params, gradients):
        state = jax.jit(optimizer.init)(params)
        for _ in range(3):
            params, state = step(params, state, gradients)
        return to_host(params)

    one, four = steps(params, gradients), steps(*(place(tree, mesh, specs) for tree in (params, gradients)))
    for path, wanted in one.items():
        np.testing.assert_allclose(four[path], wanted, atol=1e-4, err_msg=path)


def test_choices_without_room_are_counted():
    mesh, params = mesh_of(1, 4, 1), random_params(CONFIG)

    def dropped(params, tokens):
        router = forward(params, CONFIG, tokens, collect=("dropped",), expert_buffer=0.25).router
        return jax.lax.psum(router.dropped, BATCH_AXES)

    run = jax.jit(on_mesh(dropped, CONFIG, mesh, out_specs=P()))
    assert np.all(run(placed_params(params, CONFIG, mesh), make_rows(8).tokens) > 0)


@pytest.mark.parametrize(
    ("model", "devices", "expected"),
    [
        ("olmoe-1b-7b", 8, (1, 8)),
        ("qwen1.5-moe-a2.7b", 16, (4, 4)),  # of 60 experts
        ("deepseek-v2-lite", 16, (1, 16)),
        ("mixtral-8x7b", 8, (1, 8)),
        ("mixtral-8x7b", 1, (1, 1)),
        ("", 8, (8, 1)),  # what is small is rather gathered than its tokens sent
    ],
)
def test_the_mesh_is_the_one_that_sends_least(model, devices, expected):
    config = model_config(PUBLISHED[model], dtype="bfloat16") if model else ModelConfig()
    chosen = chosen_mesh(PLAIN, config, (16, 16), 512, devices)
    assert (chosen.data, chosen.expert, chosen.tensor) == (*expected, 1)
    kinds = [{"data": devices // n, "expert": n, "tensor": 1} for n in (1, 2, 4, 8, 16) if devices % n == 0]
    tokens = 2 * -(-16 // devices) * 512
    sent = {sizes["expert"]: sum(sent_bytes(config, sizes, tokens).values()) for sizes in kinds}
    assert min(sent[n] for n in sent if config.num_experts % n == 0) == sent[expected[1]]


def test_sizes_that_are_given_stay():
    for given, expected in (
        ({"data": 4}, (4, 2, 1)),
        ({"expert": 1}, (8, 1, 1)),
        ({"data": 2, "tensor": 2}, (2, 2, 2)),
    ):
        chosen = chosen_mesh(ParallelConfig(**given), ModelConfig(), (16, 16), 512, 8)
        assert (chosen.data, chosen.expert, chosen.tensor) == expected
        assert chosen.mesh().size == 8
    with pytest.raises(ConfigError, match="there are 8"):
        chosen_mesh(ParallelConfig(data=3), ModelConfig(), (16, 16), 512, 8).mesh()


def test_devices_send_each_other_what_the_documents_say_to_the_byte():
    """The forward pass of docs/scaling.md."""
    L, V, D, H, C, E, K, F = 6, 64, 16, 4, 8, 8, 2, 12  # so many layers are a loop
    config = dataclasses.replace(CONFIG, num_layers=L, num_kv_heads=H, shared_hidden_size=0)
    mesh, tokens = mesh_of(2, 2, 1), 2 * 8  # of a device

    def run(params, tokens):
        return forward(params, config, tokens, collect=("hidden",)).hidden

    params = placed_params(random_params(config), config, mesh)
    spread = jax.jit(on_mesh(run, config, mesh, out_specs=P(BATCH_AXES)))
    program = spread.lower(params, np.zeros((4 * 2, 8), np.int32)).compile()
    sent = dict.fromkeys(("all-gather", "reduce-scatter"), 0.0)
    for collective in traffic(program.as_text(), 4).collectives:
        sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.bytes

    over_all = V * D + L * (4 * D * H * C + D * E)  # embedding; q, k, v, o; router
    over_data = L * E // 2 * 3 * D * F  # one device's experts
    shown = L * tokens * (D + 2 * K)  # tokens, indices, gates, to the one other device
    gathered = over_all * 3 / 4 + over_data / 2 + shown
    assert sent == {"all-gather": 4 * gathered, "reduce-scatter": 4 * L * tokens * D}
