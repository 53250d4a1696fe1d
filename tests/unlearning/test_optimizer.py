"""Every optimizer: its formula, matrix by matrix; what is frozen stays; a mesh changes nothing."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax.models.architecture import ModelConfig, flat_specs, flatten, init_params
from trace_jax.parallel.mesh import make_mesh
from trace_jax.unlearning import optimizer as optimizer_module
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.losses import StepSettings
from trace_jax.unlearning.optimizer import Optimizer, OptimizerConfig, groups, learning_rate, make_optimizer, orthogonal
from trace_jax.unlearning.step import fresh_state, state_shardings

AXES = {
    "embed": ("vocab", "embed"),
    "q": ("layers", "embed", "heads", "head"),
    "o": ("layers", "heads", "head", "embed"),
    "q_bias": ("layers", "heads", "head"),
    "norm": ("layers", "embed"),
    "router": ("layers", "embed", "router"),
    "gate_up": ("layers", "experts", "embed", "gate_up", "expert_hidden"),
    "down": ("layers", "experts", "expert_hidden", "embed"),
}
SIZES = {"vocab": 20, "embed": 8, "layers": 2, "heads": 3, "head": 4, "router": 4, "experts": 4, "gate_up": 2}
SIZES["expert_hidden"] = 6


def arrays(seed, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(size=[sizes[n] for n in names]), jnp.float32) for p, names in AXES.items()}


def run(config, steps=3, masks=lambda step: None, params=None, gradients=arrays):
    """Parameters after some steps. The masks may change from step to step while the state goes on."""
    params = arrays(0) if params is None else params

    @jax.jit
    def step(params, state, gradient, masks):
        updates, state = make_optimizer(config, steps, AXES, masks).update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(make_optimizer(config, steps, AXES, masks(0)).init)(params)
        for index in range(steps):
            params, state = step(params, state, gradients(index + 1), masks(index))
    return params


def setting(name, weight_decay=0.0, **own):
    optimizer = {"name": name, **own}
    return OptimizerConfig(optimizer=optimizer, learning_rate=0.1, clip_norm=0.0, weight_decay=weight_decay)


# --- where the matrices are


def test_matrices_of_declared_arrays():
    assert groups(AXES["q"]) == [[1], [2, 3]] and groups(AXES["o"]) == [[1, 2], [3]]
    assert groups(AXES["gate_up"]) == [[2], [4]] and groups(AXES["q_bias"]) == [[1, 2]]
    assert {path for path, axes in AXES.items() if orthogonal(axes)} == {"q", "o", "gate_up", "down"}


LATENT = ModelConfig(
    num_layers=3, attention="latent", latent_size=8, rotary_size=4, query_latent_size=8, dense_layers=(0,),
    dense_hidden_size=10, shared_hidden_size=8, shared_gate=True,
)  # fmt: skip
BIASED = ModelConfig(
    qk_norm="full", attention_bias="all", expert_bias=True, mlp_bias=True, sinks=True, head_bias=True,
    attention_gate=True, router_bias=True, norm="layer",
)  # fmt: skip


def test_muon_takes_every_projection_and_nothing_else():
    found = {path for config in (LATENT, BIASED) for path, spec in flat_specs(config).items() if orthogonal(spec.axes)}
    names = {path.split("/")[-1] for path in found}
    assert names == {"q", "k", "v", "o", "attention_gate", "kv_down", "kv_up", "q_down", "q_up", "gate_up", "down"}


# --- the formulas


def matrices(path, array):
    """The matrices of one of `AXES` as a list of 2-D arrays."""
    array = np.asarray(array)
    if path == "gate_up":
        return [array[layer, e, :, g] for layer in range(2) for e in range(4) for g in range(2)]
    if path == "down":
        return [array[layer, e] for layer in range(2) for e in range(4)]
    return [array[layer].reshape((8, 12) if path == "q" else (12, 8)) for layer in range(2)]


def test_muon_of_each_matrix_and_adam_of_the_rest():
    end = run(setting("muon", b1=0.8, b2=0.9, eps=1e-6, momentum=0.7))
    adam = run(setting("adamw", b1=0.8, b2=0.9, eps=1e-6))
    alone = optax.contrib.scale_by_muon(beta=0.7)
    update_alone = jax.jit(alone.update)
    for path in ("q", "o", "gate_up", "down"):
        start, found = matrices(path, arrays(0)[path]), matrices(path, end[path])
        for number, matrix in enumerate(start):
            state = alone.init(matrix)
            with jax.numpy_dtype_promotion("standard"):
                for step in range(3):
                    gradient = matrices(path, arrays(step + 1)[path])[number]
                    update, state = update_alone(gradient, state)
                    matrix = matrix - 0.1 * 0.2 * np.sqrt(max(matrix.shape)) * update
            np.testing.assert_allclose(found[number], matrix, atol=2e-6, err_msg=path)
    for path in ("embed", "norm", "q_bias", "router"):
        np.testing.assert_array_equal(end[path], adam[path])


def test_adafactor_factors_the_second_moment_of_each_matrix(monkeypatch):
    monkeypatch.setattr(optimizer_module, "_FACTORED_FROM", 4)
    end = run(setting("adafactor"), steps=2)
    for path in ("q", "gate_up", "down"):
        for number, matrix in enumerate(matrices(path, np.asarray(arrays(0)[path], np.float64))):
            rows, columns = np.zeros(matrix.shape[0]), np.zeros(matrix.shape[1])
            for step in range(2):
                gradient = np.asarray(matrices(path, arrays(step + 1)[path])[number], np.float64)
                decay = 1 - (step + 1.0) ** -0.8
                rows = decay * rows + (1 - decay) * (gradient**2).mean(1)
                columns = decay * columns + (1 - decay) * (gradient**2).mean(0)
                update = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
                matrix = matrix - 0.1 * update / max(1.0, np.sqrt((update**2).mean()))
            np.testing.assert_allclose(matrices(path, end[path])[number], matrix, atol=1e-5, err_msg=path)
    state = make_optimizer(setting("adafactor"), 2, AXES).init(arrays(0))
    sizes = {path: sum(x.size for x in jax.tree.leaves(kept)) for path, kept in state[2].items()}
    assert sizes["down"] == 2 * 4 * (6 + 8 + 2) and sizes["embed"] == 20 + 8 + 2


def test_sgd_adds_up_its_momentum():
    end = run(setting("sgd", momentum=0.5))
    g = [arrays(step)["norm"] for step in (1, 2, 3)]
    expected = arrays(0)["norm"] - 0.1 * (1.75 * g[0] + 1.5 * g[1] + g[2])
    np.testing.assert_allclose(end["norm"], expected, rtol=1e-5)
    assert not jax.tree.leaves(make_optimizer(setting("sgd", momentum=0.0), 3, AXES).init(arrays(0)))[1:]


# --- what is frozen


@pytest.mark.parametrize("name", Optimizer.kinds)
def test_frozen_slices_stay_bit_identical_also_after_the_selection_changes(name):
    """Twenty steps with weight decay and momentum; experts 0 and 1 of layer 0 train, later only the second."""

    def masks(step):
        chosen = np.zeros((2, 4), np.float32)
        chosen[0, 1] = 1
        chosen[0, 0] = step < 10
        found = {path: jnp.zeros((1,) * leaf.ndim) for path, leaf in arrays(0).items()}
        return found | {path: jnp.asarray(chosen.reshape(2, 4, *(1,) * n)) for path, n in (("gate_up", 3), ("down", 2))}

    config = OptimizerConfig(optimizer=name, learning_rate=0.01, weight_decay=0.1)
    start, middle, end = arrays(0), run(config, 10, masks), run(config, 20, masks)
    for path, leaf in start.items():
        frozen = np.ones((2, 4), bool)
        if path in ("gate_up", "down"):
            frozen[0, :2] = False
            assert (np.asarray(end[path])[0, 1] != np.asarray(leaf)[0, 1]).all()
            np.testing.assert_array_equal(end[path][0, 0], middle[path][0, 0])
            np.testing.assert_array_equal(np.asarray(end[path])[frozen], np.asarray(leaf)[frozen])
        else:
            np.testing.assert_array_equal(end[path], leaf)


@pytest.mark.parametrize("name", Optimizer.kinds)
def test_rows_that_belong_nowhere_stay_zero_and_change_no_other(name, monkeypatch):
    """Layers with fewer selected experts are filled up with zeros, which get no gradient."""
    monkeypatch.setattr(optimizer_module, "_FACTORED_FROM", 4)
    rows = {path: arrays(0)[path] for path in ("gate_up", "down")}

    def filled(tree):
        return {path: jnp.concatenate([tree[path], jnp.zeros_like(tree[path][:, :2])], axis=1) for path in rows}

    config = setting(name, weight_decay=0.1)
    plain = run(config, params=rows, gradients=lambda seed: {path: arrays(seed)[path] for path in rows})
    more = run(config, params=filled(rows), gradients=lambda seed: filled(arrays(seed)))
    for path in rows:
        np.testing.assert_allclose(more[path][:, :4], plain[path], atol=1e-6)
        assert not np.asarray(more[path][:, 4:]).any()


def test_learning_rate_warms_up_then_follows_its_schedule():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer steps and floats
        rates = [float(learning_rate(config, 20)(jnp.int32(step))) for step in range(21)]
    assert rates[:5] == pytest.approx([0.25, 0.4375, 0.625, 0.8125, 1.0])
    assert rates[12] == pytest.approx(0.5, abs=1e-6) and rates[20] == pytest.approx(0.0, abs=1e-6)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


# --- on a mesh


@pytest.mark.parametrize("name", Optimizer.kinds)
def test_an_update_on_a_mesh_needs_no_array_of_experts_whole(name, monkeypatch):
    monkeypatch.setattr(optimizer_module, "_FACTORED_FROM", 4)
    mesh = make_mesh(jax.devices()[:4], expert=4)
    config, params = setting(name), {"gate_up": arrays(0)["gate_up"]}
    optimizer = make_optimizer(config, 3, AXES)
    spread = {"gate_up": NamedSharding(mesh, P(None, "expert"))}

    @jax.jit
    def two(params):
        params, state = jax.lax.with_sharding_constraint(params, spread), optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return jax.lax.with_sharding_constraint(params, spread)

    with jax.numpy_dtype_promotion("standard"):
        text = two.lower(jax.device_put(params, spread)).compile().as_text()
    assert not re.findall(r"all-gather|all-to-all|collective-permute", text)


def test_whatever_has_a_parameters_size_lies_where_it_does():
    """With "data", "expert" and "tensor" all in use; means over rows or columns at least by expert."""
    mesh = make_mesh(jax.devices()[:8], data=2, expert=2, tensor=2)
    sizes = {"hidden_size": 128, "expert_hidden_size": 128, "vocab_size": 64}
    model = ModelConfig(num_heads=4, num_kv_heads=2, num_experts=4, num_layers=2, **sizes)
    params = jax.eval_shape(lambda: flatten(init_params(model, jax.random.key(0))))
    for name in Optimizer.kinds:
        settings = StepSettings(model, setting(name), 1)
        state = jax.eval_shape(lambda p, s=settings: fresh_state(p, None, None, settings=s, mesh=mesh), params)
        placed = state_shardings(state, settings, mesh)
        leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placed.optimizer), strict=True):
            owners = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in params]
            if leaf.size <= 16:  # counts, and what stands for nothing
                continue
            assert leaf.dtype == jnp.float32
            if leaf.shape == params[owners[-1]].shape:
                assert sharding == placed.trainable[owners[-1]]
            else:
                assert name in ("adafactor", "muon") and leaf.size * 64 <= params[owners[-1]].size
                assert "experts" not in owners[-1] or sharding.spec[1] == "expert"


def test_defaults_follow_the_optimizer():
    assert [UnlearningConfig(optimizer=name).optimizer.momentum for name in ("sgd", "muon")] == [0.9, 0.95]
    assert UnlearningConfig(optimizer="muon").optimization == OptimizerConfig(optimizer="muon")
