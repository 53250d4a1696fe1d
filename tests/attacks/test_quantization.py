"""Rounding to nearest by hand; a change below a step is undone, a larger one is not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.attacks.quantization import Quantization, quantized, round_to_nearest
from trace_jax.config import ConfigError
from trace_jax.models.arrays import flat_specs, flatten, parameter_specs, unflatten
from trace_jax.models.config import ModelConfig

RATIO = "forget_probability_ratio"
KEPT = ("embed", "head", "layers/router", "layers/router_bias")


def test_each_output_has_a_step_of_its_own():
    weights = jnp.asarray([[1.4, 0.07], [0.5, -0.021], [-0.29, 0.0]], jnp.float32)  # [inputs, outputs]
    # 4 bits: 7 steps to the largest, .2 and .01. .5 / .2 = 2.5 goes to the even 2, -.29 / .2 = -1.45 to -1.
    expected = np.float32([[1.4, 0.07], [0.4, -0.02], [-0.2, 0]])
    np.testing.assert_allclose(round_to_nearest(weights, axes=(0,), bits=4), expected, rtol=1e-6, atol=1e-9)
    fine = round_to_nearest(weights, axes=(0,), bits=8)
    assert (np.abs(fine - weights) <= np.float32([1.4, 0.07]) / 127 / 2 + 1e-9).all()


def test_an_output_of_zeros_stays_zero():
    assert (round_to_nearest(jnp.zeros((3, 2), jnp.float32), axes=(0,), bits=4) == 0).all()


def test_matrices_are_rounded_and_the_rest_is_left(original):
    before, after = flatten(original.params), flatten(quantized(original.params, original.config, bits=4))
    same = {path for path in before if after[path] is before[path]}
    assert {path for path in same if "norm" not in path} == set(KEPT)
    assert {"layers/q", "layers/o", "layers/experts/gate_up", "layers/experts/down"} <= set(before) - same
    gate_up = np.asarray(after["layers/experts/gate_up"])  # [L, E, D, 2, F]: inputs D
    assert all(len(np.unique(gate_up[0, 1, :, 0, f])) <= 15 for f in range(gate_up.shape[-1]))
    o = np.asarray(after["layers/o"])  # [L, H, C, D]: inputs H and C together
    assert all(len(np.unique(o[0, :, :, d])) <= 15 for d in range(o.shape[-1]))


def test_no_bias_norm_or_gate_vector_counts_as_a_matrix():
    config = ModelConfig(
        num_experts=4, router_bias=True, router_correction=True, expert_bias=True, attention_bias="all",
        qk_norm="full", norm="layer", sinks=True, shared_hidden_size=8, shared_gate=True, mlp_bias=True,
    )  # fmt: skip
    flat = {path: jnp.full(spec.shape, 0.3, spec.dtype) for path, spec in flat_specs(config).items()}
    flat = {path: array.at[(0,) * array.ndim].set(1) for path, array in flat.items()}
    after = flatten(quantized(unflatten(flat), config, bits=2))
    rounded = {path.rsplit("/", 1)[-1] for path in flat if after[path] is not flat[path]}
    assert rounded == {"q", "k", "v", "o", "gate_up", "down"}
    assert set(flatten(parameter_specs(config))) == set(after)


def test_a_change_below_a_step_is_undone(original, make_case, value):
    # The original lies on the grid of 4 bits; the change is a fifth of a step of its channel, and spares the largest.
    on_grid = flatten(quantized(original.params, original.config, bits=4))
    off_grid = {}
    for path, array in on_grid.items():
        first, second = flat_specs(original.config)[path].sides
        matrix = path not in KEPT and first < second < array.ndim
        largest = np.abs(array).max(axis=tuple(range(first, second)), keepdims=True) if matrix else None
        off_grid[path] = array if largest is None else np.where(np.abs(array) < largest, array + largest / 35, array)
    case = make_case(Quantization(), unflatten(off_grid))
    before = case.context.evaluator.score(original.replace(params=unflatten(on_grid)), full=True)
    evaluator = dataclasses.replace(case.context.evaluator, original=before)
    eight, four = Quantization().points(make_case(Quantization(), unflatten(off_grid), evaluator=evaluator))
    assert (eight.at, four.at) == ("8 bits", "4 bits")
    unlearned = value(evaluator.measure(evaluator.score(case.unlearned)), RATIO)
    assert unlearned < 0.97
    assert value(four.measurements, RATIO) == pytest.approx(1, abs=1e-5)
    assert abs(value(eight.measurements, RATIO) - unlearned) < 0.2 * (1 - unlearned)  # too fine to undo it


def test_bits_are_a_list_of_2_to_8():
    with pytest.raises(ConfigError, match=r"bits is 16; expected one of 2, 3, .* 8"):
        Quantization(bits=(16,))
    with pytest.raises(ConfigError, match="empty list"):
        Quantization(bits=())
