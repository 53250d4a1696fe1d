"""GRIP's numerics on explicit arrays: against slow float64 loops, and what it promises of every protected input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig
from trace_jax.models.moe import route
from trace_jax.parallel.mesh import make_mesh, place, to_host
from trace_jax.unlearning import grip
from trace_jax.unlearning.config import GripProject

L, N, D, E, K = 2, 12, 24, 6, 2
CONFIG = ModelConfig(num_layers=L, hidden_size=D, num_experts=E, experts_per_token=K)
GRIP = GripProject(null=1e-2, margin=1e-2, sweeps=100)
ROUTERS = {
    "softmax": CONFIG,
    "sigmoid": dataclasses.replace(CONFIG, router_score="sigmoid"),
    "softmax_top_k, bias": dataclasses.replace(CONFIG, router_score="softmax_top_k", router_bias=True),
    "sigmoid, correction": dataclasses.replace(CONFIG, router_score="sigmoid", router_correction=True),
    "sparsemixer": dataclasses.replace(CONFIG, router_score="sparsemixer"),
}


def routers(seed=0):
    """(inputs [L,N,D], routers [L,D,E], changes of them [L,D,E]); the changes alter most choices."""
    rng = np.random.default_rng(seed)
    inputs, router, change = (rng.normal(size=size).astype(np.float32) for size in ((L, N, D), (L, D, E), (L, D, E)))
    return inputs, router / 5, change / 5


def decided(config, router, bias, correction, inputs):
    """(scores [L,N,E], choices [L,N,K]) as the model itself makes them."""
    names, layers = ("router", "router_bias", "router_correction"), zip(router, bias, correction, strict=True)
    said = [route(dict(zip(names, of, strict=True)), config, x) for of, x in zip(layers, inputs, strict=True)]
    return np.stack([s.logits for s in said]), np.stack([s.indices for s in said])


def constrained(router, original, protection, devices=1, step=0):
    expert, data = (2, devices // 2) if devices > 1 else (1, 1)
    mesh = make_mesh(jax.devices()[:devices], data=data, expert=expert)
    placed, bias = place(protection, mesh, grip.protection_specs(E, mesh)), router.shape[1] > D
    arrays = place(tuple(grip.parted(routers, bias) for routers in (router, original)), mesh)
    held, missed = grip.keep_routers(*arrays, placed, place(np.int32(step), mesh), mesh=mesh)
    return to_host((grip.joined(held, bias), missed))


@pytest.mark.parametrize("name", ROUTERS)
def test_protected_inputs_keep_their_experts_and_scores(name):
    config, rng = ROUTERS[name], np.random.default_rng(1)
    inputs, router, change = routers()
    bias, correction = rng.normal(size=(2, L, E)).astype(np.float32) / 10
    scores, indices = decided(config, router, bias, correction, inputs)
    reads, rows, moved = inputs, router, router + change
    if config.router_bias:
        reads = np.pad(inputs, ((0, 0), (0, 0), (0, 1)), constant_values=1)
        rows = np.concatenate([router, bias[:, None]], axis=1)
        moved = np.concatenate([moved, bias[:, None] + 0.3], axis=1)
    added = correction if config.router_correction else None
    protection = grip.protect(reads, scores, indices, config, GRIP, correction=added, seed=3)
    kept, missed = constrained(moved, rows, protection)
    assert missed <= grip.TOLERANCE
    assert not np.allclose(kept, rows, atol=0.01)  # there is room, and it is used
    new_bias = kept[:, D] if config.router_bias else bias
    new_scores, new_indices = decided(config, kept[:, :D], new_bias, correction, inputs)
    free_scores, free_indices = decided(config, moved[:, :D], bias, correction, inputs)
    assert (np.sort(free_indices) != np.sort(indices)).any(axis=-1).mean() > 0.5  # without it, most choices change
    np.testing.assert_array_equal(np.sort(new_indices), np.sort(indices))
    chosen = [np.take_along_axis(s, indices, axis=-1) for s in (scores, new_scores, free_scores)]
    np.testing.assert_allclose(chosen[1], chosen[0], atol=1e-4)
    assert np.abs(chosen[2] - chosen[0]).mean() > 0.1


@pytest.fixture(scope="module")
def world():
    """(inputs, routers, changed ones, scores and choices of the original) of plain routers."""
    inputs, router, change = routers()
    return inputs, router, router + change, *decided(CONFIG, router, np.zeros((L, E)), np.zeros((L, E)), inputs)


def protected(world, **changes):
    inputs, _, _, scores, indices = world
    return grip.protect(inputs, scores, indices, CONFIG, dataclasses.replace(GRIP, **changes), seed=3)


def test_margins_hold_for_experts_that_were_not_chosen(world):
    inputs, router, changed, scores, indices = world
    now = np.einsum("lnd,lde->lne", inputs, constrained(changed, router, protected(world))[0])
    lowest = np.take_along_axis(scores, indices, axis=-1).min(axis=-1, keepdims=True)
    other = np.ones_like(scores, bool)
    np.put_along_axis(other, indices, False, axis=-1)
    close = lowest - scores < GRIP.margin  # such an expert may come no closer
    limit = np.where(close, scores, lowest - GRIP.margin)
    assert (now <= limit + grip.TOLERANCE + 1e-5)[other].all()
    assert (np.einsum("lnd,lde->lne", inputs, changed) > limit + 0.1)[other].sum() > 10


def test_the_projection_is_that_of_a_slow_one_in_float64(world):
    inputs, router, changed, _, indices = world
    projected, _ = constrained(changed, router, protected(world, sweeps=0))
    for layer, expert in np.ndindex(L, E):
        chose = (indices[layer] == expert).any(axis=1)
        u = (changed - router)[layer, :, expert].astype(np.float64)
        left, values, _ = np.linalg.svd(inputs[layer, chose].astype(np.float64).T, full_matrices=False)
        left = left[:, values**2 > GRIP.null]
        wanted = router[layer, :, expert] + u - left @ (left.T @ u)
        np.testing.assert_allclose(projected[layer, :, expert], wanted, atol=2e-6)


@pytest.mark.parametrize("devices", [4, 8])  # 6 experts: split over two of four and of eight
def test_the_same_routers_on_any_devices_and_again(world, devices):
    _, router, changed, _, _ = world
    how = (), (), (devices,), (1, 1)
    alone, again, many, other = (constrained(changed, router, protected(world), *each)[0] for each in how)
    np.testing.assert_array_equal(alone, again)
    np.testing.assert_allclose(alone, many, atol=1e-5)
    assert (alone != other).any()  # another step: another order of draws


def test_what_is_not_protected_against_leaves_routers_alone(world):
    """A router that has not changed stays bit for bit, also where the original decides by less than the margin."""
    router = world[1]
    same, missed = constrained(router, router, protected(world, margin=10.0))
    np.testing.assert_array_equal(same, router)
    assert missed == 0


@pytest.mark.parametrize("count", [0, 1, 5, 24, 40])
def test_the_span_leaves_out_directions_that_hardly_occur(count):
    rng = np.random.default_rng(count)
    inputs = rng.normal(size=(count, D))
    if count > 2:
        inputs[1] = inputs[0] + 1e-4 * rng.normal(size=D)  # nearly the same input twice
    basis = grip.span(inputs, 1e-2)
    values = np.linalg.svd(inputs, compute_uv=False) if count else np.zeros(0)
    assert basis.shape == (D, (values**2 > 1e-2).sum())
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-9)
    rest = inputs - inputs @ basis @ basis.T
    assert (np.linalg.norm(rest, 2) ** 2 if count else 0.0) <= 1e-2


def walk(change, inputs, bound, limit, seed=0):
    arrays = map(jnp.asarray, (change, np.zeros((len(change), 1), np.float32), bound, inputs))
    return jax.jit(grip.constrained_row)(*arrays, jax.random.key(seed), jnp.int32(limit))


def test_kaczmarz_meets_bounds_that_can_be_met_and_moves_no_further_than_its_limit():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(30, 8)).astype(np.float32)
    change, bound = 3 * rng.normal(size=8).astype(np.float32), np.full(30, 0.1, np.float32)
    far = float((inputs @ change - bound).max())
    found, missed = walk(change, inputs, bound, 100 * 30)
    assert float(missed) <= grip.TOLERANCE < far
    assert (inputs @ np.asarray(found) <= bound + grip.TOLERANCE + 1e-5).all()
    stopped, missed = walk(change, inputs, bound, 1)
    assert float(missed) > grip.TOLERANCE
    step = np.asarray(stopped) - change  # one move: the nearest change that meets one bound
    hit = np.isclose(inputs @ np.asarray(stopped), bound, atol=1e-5)
    assert hit.sum() == 1
    np.testing.assert_allclose(step, inputs[hit][0] * (step @ inputs[hit][0]) / (inputs[hit][0] ** 2).sum(), atol=1e-5)
    impossible = np.stack([inputs[0], -inputs[0]])
    _, missed = walk(change, impossible, np.full(2, -1.0, np.float32), 50)
    assert float(missed) > 0.5  # and it ended


def test_kaczmarz_draws_inputs_by_their_squared_length():
    inputs = np.eye(3, dtype=np.float32) * np.array([[1.0], [2.0], [3.0]], np.float32)
    firsts = []
    for seed in range(400):
        found, _ = walk(np.ones(3, np.float32), inputs, np.zeros(3, np.float32), 1, seed)
        firsts.append(int(np.argmin(np.abs(found))))
    np.testing.assert_allclose(np.bincount(firsts) / 400, np.array([1, 4, 9]) / 14, atol=0.07)


def test_routers_whose_choice_is_no_matter_of_single_scores_are_refused():
    groups, correction = {"num_groups": 3, "groups_per_token": 2}, {"router_correction": True}
    for changes, message in ((groups, "3 groups of experts"), (correction, "adds a correction to probabilities")):
        with pytest.raises(ConfigError, match=message):
            grip.check_router(dataclasses.replace(CONFIG, **changes), {grip.ROUTER})


def test_realignment_is_the_closed_form_and_gives_the_old_scores_on_new_inputs():
    rng = np.random.default_rng(0)
    inputs, router = rng.normal(size=(200, D)), rng.normal(size=(D, E))
    new = inputs @ (np.eye(D) + 0.3 * rng.normal(size=(D, D)))
    moments = inputs.T @ inputs, inputs.T @ new, new.T @ new
    found = grip.realigned(router, moments, 1e-6)
    x, y, theta = inputs.T, new.T, router.T  # as the paper writes them
    ridge = 1e-6 * np.trace(y @ y.T) / D
    np.testing.assert_allclose(found.T, theta @ x @ y.T @ np.linalg.inv(y @ y.T + ridge * np.eye(D)), atol=1e-8)
    np.testing.assert_allclose(new @ found, inputs @ router, atol=1e-2)
    flat = [(inputs @ router).ravel(), (new @ router).ravel(), (new @ found).ravel()]
    for other, scores in ((router, flat[1]), (found, flat[2])):
        wanted = flat[0] @ scores / np.linalg.norm(flat[0]) / np.linalg.norm(scores)
        assert grip.cosine(router, other, moments) == pytest.approx(wanted, abs=1e-9)
    assert grip.cosine(router, router, moments) < 0.95 < grip.cosine(router, found, moments)
