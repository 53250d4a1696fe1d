"""Low-rank adapters compute what merged weights compute, in pieces and on any mesh, and become an ordinary model."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny
from tests.unlearning.conftest import CONFIG, ONE
from trace_jax.config import ConfigError
from trace_jax.models.architecture import abstract_params, flat_specs, flatten, init_params, low_rank, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.sharding import param_specs
from trace_jax.parallel.mesh import BATCH_AXES, place, to_host
from trace_jax.unlearning.optimizer import groups, orthogonal
from trace_jax.unlearning.trainable import current_params, declarations, factors, merge, split, trained_specs
from trace_jax.unlearning.unlearn import unlearn

GROUPED = dataclasses.replace(tiny.CONFIG, num_heads=4, num_kv_heads=2, expert_hidden_size=12, tie_embeddings=True)
MODELS = {
    "odd": dataclasses.replace(
        GROUPED, grouped_matmul="ragged", num_experts=5, num_heads=3, num_kv_heads=1, expert_hidden_size=9
    ),
    "latent": dataclasses.replace(
        GROUPED, num_kv_heads=4, tie_embeddings=False, attention="latent", latent_size=8, rotary_size=4,
        query_latent_size=8, value_size=6, dense_layers=(0,), dense_hidden_size=10,
    ),
}  # fmt: skip
ATTENTION = {"grouped": ("q", "k", "v", "o"), "latent": ("q_down", "q_up", "kv_down", "kv_up", "o")}
first_values = jax.jit(init_params, static_argnums=0)
RANK, SCALE = 3, jnp.float32(2.0)


def adapted_paths(config):
    """Every attention projection and both matrices of the experts."""
    stacks = ("layers", "dense") if config.dense_layers else ("layers",)
    attention = [f"{stack}/{name}" for stack in stacks for name in ATTENTION[config.attention]]
    return [*attention, "layers/experts/gate_up", "layers/experts/down"]


def first_factors(config, *, rank=RANK, seed=0, paths=None):
    return split({}, tuple(paths or adapted_paths(config)), config, ONE, rank=rank, seed=seed)


def setting(config, dtype="float32"):
    """(parameters by path, factors with nothing zero in them)."""
    params = flatten(first_values(dataclasses.replace(config, dtype=dtype), jax.random.key(0)))
    start = first_factors(config, seed=3)
    keys = {path: jax.random.fold_in(jax.random.key(1), i) for i, path in enumerate(start)}
    return params, {path: x + 0.1 * jax.random.normal(keys[path], x.shape) for path, x in to_host(start).items()}


def plainly_merged(config, params, trainable):
    """W + scale a b, one array of matrices at a time."""
    result = dict(params)
    for path in adapted_paths(config):
        spec, (a, b) = flat_specs(config)[path], (trainable[f"{path}/{name}"] for name in ("lora_a", "lora_b"))
        stack = spec.shape[: spec.sides[0]]
        product = a.reshape(*stack, -1, RANK) @ b.reshape(*stack, RANK, -1)
        result[path] = params[path] + SCALE * product.reshape(spec.shape)
    return result


def batch(config, count=8, length=10):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (count, length)).astype(np.int32)
    segments = np.ones(tokens.shape, np.int32)
    segments[0, 7:], segments[1, 4:] = 0, 2
    return tokens, segments


@partial(jax.jit, static_argnums=(1, 4))
def loss(params, config, tokens, segments, remat="none"):
    out = forward(unflatten(params), config, tokens, mask=segments, collect=("hidden",), remat=remat)
    nll = token_nll(unflatten(params), config, out.hidden, jnp.roll(tokens, -1, axis=1))
    return jnp.where(segments > 0, nll, 0.0).sum()


@partial(jax.jit, static_argnames=("config", "remat"))
def adapted_loss(trainable, params, config, tokens, segments, remat="none"):
    return loss(current_params(trainable, params, scale=SCALE), config, tokens, segments, remat)


gradient = jax.jit(jax.value_and_grad(adapted_loss), static_argnames=("config", "remat"))


@pytest.fixture(scope="module", params=MODELS)
def plain(request):
    """(config, parameters, factors, loss and gradients of the factors through plainly merged weights)."""
    config = MODELS[request.param]
    params, trainable = setting(config)
    of_loss = jax.value_and_grad(lambda factors: loss(plainly_merged(config, params, factors), config, *batch(config)))
    return config, params, trainable, *jax.jit(of_loss)(trainable)


def test_adapters_are_merged_weights_in_value_and_gradient(plain):
    config, params, trainable, value, gradients = plain
    got, of_factors = gradient(trainable, params, config, *batch(config))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for path, wanted in gradients.items():
        np.testing.assert_allclose(of_factors[path], wanted, rtol=2e-4, atol=2e-5, err_msg=path)


def test_a_mesh_gives_the_same_numbers(plain):
    config, params, trainable, value, gradients = plain
    mesh = tiny.mesh_of(1, 2, 2)
    specs, storage = param_specs(config, mesh), trained_specs(config, trainable, mesh)

    def of_device(trainable, params, tokens, segments):
        def total(trainable):
            return jax.lax.psum(adapted_loss(trainable, params, config, tokens, segments), BATCH_AXES)

        return jax.value_and_grad(total)(trainable)

    in_specs = storage, specs, P(BATCH_AXES), P(BATCH_AXES)
    run = jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=(P(), storage))
    placed = place(trainable, mesh, storage), place(params, mesh, specs)
    got, of_factors = jax.jit(run)(*placed, *place(batch(config), mesh, P(BATCH_AXES)))
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for path, wanted in gradients.items():
        np.testing.assert_allclose(of_factors[path], wanted, rtol=5e-4, atol=5e-5, err_msg=path)
    back = merge(placed[1], placed[0], config, mesh, scale=SCALE)
    for path, wanted in plainly_merged(config, params, trainable).items():
        np.testing.assert_allclose(to_host(back[path]), wanted, atol=1e-6, err_msg=path)


def test_in_bfloat16_the_first_step_sees_the_original_and_the_merged_model_computes_what_the_adapted_one_did():
    config = dataclasses.replace(GROUPED, dtype="bfloat16")
    params, trainable = setting(GROUPED, "bfloat16")
    rows, start, back = batch(config), first_factors(config), merge(params, trainable, config, ONE, scale=SCALE)
    for path, array in merge(params, start, config, ONE, scale=SCALE).items():
        assert array.dtype == params[path].dtype
        np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(params[path], np.float32))
    original = loss(params, config, *rows)
    np.testing.assert_array_equal(adapted_loss(start, params, config, *rows), original)
    assert loss(back, config, *rows) != original
    np.testing.assert_allclose(loss(back, config, *rows), adapted_loss(trainable, params, config, *rows), rtol=1e-5)


def test_first_factors_depend_on_seed_and_name_alone():
    start, other = first_factors(GROUPED), first_factors(GROUPED, seed=1)
    for path, array in first_factors(GROUPED, paths=adapted_paths(GROUPED)[1:]).items():
        np.testing.assert_array_equal(array, start[path])
    start, other = to_host(start), to_host(other)
    a = [path for path in start if path.endswith("lora_a")]
    assert len({start[path].tobytes() for path in a} | {other[path].tobytes() for path in a}) == 2 * len(a)
    assert not any(start[path].any() for path in start if path not in a)
    wide = to_host(first_factors(GROUPED, paths=["layers/experts/gate_up"], rank=8))
    assert np.std(wide["layers/experts/gate_up/lora_a"]) == pytest.approx(16**-0.5, rel=0.05)


def test_only_factors_train_and_they_are_small():
    """So is the optimizer's state: tests/plan/test_plan.py."""
    _, trainable = setting(GROUPED)
    D, H, G, C, E, F, L = 16, 4, 2, 8, 4, 12, 2
    sizes = {"q": D + H * C, "k": D + G * C, "v": D + G * C, "o": H * C + D}
    experts = E * (D + 2 * F) + E * (F + D)
    numbers = sum(x.size for x in trainable.values())
    assert numbers == L * RANK * (sum(sizes.values()) + experts)
    assert {path.rpartition("/")[0] for path in trainable} == set(adapted_paths(GROUPED))
    specs = factors(GROUPED, adapted_paths(GROUPED), RANK)
    assert declarations(GROUPED, specs) == specs


def test_neither_merged_weights_nor_their_gradients_exist_for_all_layers():
    """In the program of a gradient nothing but the frozen weights themselves is as large as all layers of one array."""
    config = dataclasses.replace(GROUPED, num_layers=6, head_size=10)
    params, paths = flatten(abstract_params(config)), adapted_paths(config)
    trainable = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), factors(config, paths, RANK))
    rows = [jax.ShapeDtypeStruct((7, 11), jnp.int32)] * 2  # no activation is as large as an array by chance
    of_loss = jax.grad(partial(adapted_loss, config=config, remat="layer"))
    traced = jax.make_jaxpr(lambda factors, params, a, b: of_loss(factors, params, tokens=a, segments=b))
    program = traced(trainable, params, *rows)
    sizes = {params[path].size for path in paths}
    shapes = [v.aval.shape for eqn in every_equation(program.jaxpr) for v in eqn.outvars]
    stacked = [shape for shape in shapes if shape[:1] == (6,)]  # what the backward pass keeps is stacked
    assert stacked and not [shape for shape in stacked if math.prod(shape) in sizes]


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from every_equation(inner)


LORA = dataclasses.replace(CONFIG, trainable="lora", retain_loss="nll", learning_rate=0.01, weight_decay=0.1, steps=10)


def test_unlearning_with_adapters_ends_in_an_ordinary_model(model, forget, retain):
    seen = []
    result = unlearn(model, forget, retain, config=LORA, mesh=ONE, evaluate=seen.append)
    before, start, end, after = (flatten(p) for p in (model.params, seen[0], seen[-1], result.model.params))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == set(adapted_paths(model.config)) == {row["path"] for row in result.trained if row["trained"]}
    for path, array in before.items():
        assert after[path].dtype == array.dtype and after[path].shape == array.shape
        np.testing.assert_array_equal(start[path], array)  # step 0 is the original
        np.testing.assert_array_equal(end[path], after[path])
    rows = forget.tokens, forget.segments
    assert loss(after, model.config, *rows) > loss(before, model.config, *rows) + 1.0


def test_a_task_vector_of_adapters_is_subtracted():
    params, trainable = setting(GROUPED)
    there, back = (merge(params, trainable, GROUPED, ONE, scale=SCALE, subtract=n) for n in (0.0, 0.5))
    for path, array in params.items():
        np.testing.assert_allclose(back[path], array - 0.5 * (there[path] - array), atol=1e-5, err_msg=path)


def test_a_rank_beyond_the_matrix_is_refused():
    message = r"trainable.rank: layers/experts/down: rank is 13; a matrix of 12 x 16 .*1 to 12"
    with pytest.raises(ConfigError, match=message):
        factors(GROUPED, adapted_paths(GROUPED), 13)
    assert low_rank(flat_specs(GROUPED)["layers/o"], 5)[0].shape == (2, 4, 8, 5)


def test_optimizers_of_matrices_know_the_sides_of_factors():
    """Each factor is one matrix for every layer and expert; heads and their width are one side of it."""
    paths = ["layers/q", "layers/o", "layers/experts/gate_up", "layers/experts/down"]
    sides = {path: groups(spec.axes) for path, spec in factors(GROUPED, paths, RANK).items()}
    expected = [[[1], [2]], [[1], [2, 3]]], [[[1, 2], [3]], [[1], [2]]], [[[2], [3]], [[2], [4]]], [[[2], [3]]] * 2
    assert sides == {
        f"{path}/lora_{n}": of
        for path, two in zip(paths, expected, strict=True)
        for n, of in zip("ab", two, strict=True)
    }
    assert all(map(orthogonal, (spec.axes for spec in factors(GROUPED, paths, RANK).values())))
