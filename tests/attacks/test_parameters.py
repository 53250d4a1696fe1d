"""Attacks on plants of which the answer is known.

A change below a step of rounding is undone; what was hidden by routers alone is back with the original routing, and
what experts have lost is not.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.attacks.attack import (
    ExpertForcing,
    Quantization,
    RouterSwap,
    quantized,
    round_to_nearest,
    with_routers_of,
)
from trace_jax.config import ConfigError
from trace_jax.models.architecture import ModelConfig, flat_specs, flatten, parameter_specs, unflatten
from trace_jax.models.decoder import forward

RATIO = "forget_probability_ratio"
NAMES = ("forget_accuracy", "forget_nll", RATIO)
UNROUNDED = ("embed", "head", "layers/router", "layers/router_bias")


def test_each_output_has_a_step_of_its_own():
    weights = jnp.asarray([[1.4, 0.07, 0], [0.5, -0.021, 0], [-0.29, 0.0, 0]], jnp.float32)  # [inputs, outputs]
    # 4 bits: 7 steps to the largest, .2 and .01. .5 / .2 = 2.5 goes to the even 2, -.29 / .2 = -1.45 to -1.
    expected = np.float32([[1.4, 0.07, 0], [0.4, -0.02, 0], [-0.2, 0, 0]])
    np.testing.assert_allclose(round_to_nearest(weights, axes=(0,), bits=4), expected, rtol=1e-6, atol=1e-9)
    fine = round_to_nearest(weights, axes=(0,), bits=8)
    assert (np.abs(fine - weights) <= np.float32([1.4, 0.07, 0]) / 127 / 2 + 1e-9).all()


def test_matrices_are_rounded_and_the_rest_is_left(original):
    before, after = flatten(original.params), flatten(quantized(original.params, original.config, bits=4))
    same = {path for path in before if after[path] is before[path]}
    assert {path for path in same if "norm" not in path} == set(UNROUNDED)
    assert {"layers/q", "layers/o", "layers/experts/gate_up", "layers/experts/down"} <= set(before) - same
    gate_up = np.asarray(after["layers/experts/gate_up"])  # [L, E, D, 2, F]: inputs D
    assert all(len(np.unique(gate_up[0, 1, :, 0, f])) <= 15 for f in range(gate_up.shape[-1]))
    o = np.asarray(after["layers/o"])  # [L, H, C, D]: inputs H and C together
    assert all(len(np.unique(o[0, :, :, d])) <= 15 for d in range(o.shape[-1]))


def test_no_bias_norm_or_gate_vector_counts_as_a_matrix(monkeypatch):
    monkeypatch.setattr("trace_jax.attacks.attack.round_to_nearest", lambda array, **_: array + 0)
    config = ModelConfig(
        num_experts=4, router_bias=True, router_correction=True, expert_bias=True, attention_bias="all",
        qk_norm="full", norm="layer", sinks=True, shared_hidden_size=8, shared_gate=True, mlp_bias=True,
    )  # fmt: skip
    flat = {path: np.zeros(spec.shape, spec.dtype) for path, spec in flat_specs(config).items()}
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
        matrix = path not in UNROUNDED and first < second < array.ndim
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


# --- routing


def changed(params, **arrays):
    """Parameters with `change(array)` in the place of the layers' array of each name."""
    flat = flatten(params)
    return unflatten(flat | {f"layers/{name}": change(flat[f"layers/{name}"]) for name, change in arrays.items()})


def hidden(params, *layers):
    """Routers of these layers with their experts in turn: every token goes to the expert after its own."""

    def turned(array):
        for layer in layers:
            array = array.at[layer].set(jnp.roll(array[layer], 1, axis=-1))
        return array

    return changed(params, router=turned, router_bias=turned)


def emptied(params):
    return unflatten({path: 0 * a if "layers/experts/" in path else a for path, a in flatten(params).items()})


@pytest.mark.parametrize("by", ["router", "router_bias"])
def test_knowledge_that_only_the_router_hid_is_back_exactly(original, make_case, value, by, measured):
    """The experts that a token likes least; or all tokens moved to one expert by the bias alone."""
    change = jnp.negative if by == "router" else lambda bias: bias + np.float32([[99, 0, 0, 0]])
    case = make_case(RouterSwap(), changed(original.params, **{by: change}))
    assert value(measured(case), RATIO) < 0.9
    (point,) = case.context.attack.points(case)
    assert point.at == "original routers"
    evaluator = case.context.evaluator
    assert point.measurements == evaluator.measure(evaluator.original)  # to the last bit: the same arrays
    assert value(point.measurements, RATIO) == 1


def test_only_routers_are_swapped_and_nothing_is_copied(original):
    other = jax.tree.map(lambda x: np.asarray(x) + 1, original.params)
    swapped, own, donor = flatten(with_routers_of(other, original.params)), flatten(other), flatten(original.params)
    routers = {"layers/router", "layers/router_bias"}
    assert all(swapped[path] is (donor if path in routers else own)[path] for path in own)
    assert set(swapped) == set(own)


def test_what_was_only_routed_around_comes_back_whole(original, make_case, value, measured):
    case = make_case(ExpertForcing(), hidden(original.params, 0, 1))
    before, after = measured(make_case(ExpertForcing(), original.params)), measured(case)
    assert value(before, "forget_accuracy") == 1 and value(after, "forget_accuracy") < 1
    assert value(after, "forget_nll") > value(before, "forget_nll") + 1 and value(after, RATIO) < 0.4
    [point] = ExpertForcing().points(case)
    assert point.at == "original's experts"
    assert value(point.measurements, "forget_accuracy") == 1
    assert value(point.measurements, "forget_nll") == pytest.approx(value(before, "forget_nll"), rel=1e-5)
    assert value(point.measurements, RATIO) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("attack", [RouterSwap(), ExpertForcing()])
def test_what_was_taken_out_of_the_experts_does_not_come_back(original, make_case, measured, value, attack):
    """Without experts, it can't matter which are used."""
    case = make_case(attack, emptied(hidden(original.params, 0, 1)))
    after, result = measured(case), case.attack()
    assert value(after, RATIO) < 0.9 and result["measure"] == RATIO and result["strongest"] == 0
    scored = {m["name"]: m["value"] for m in result["points"][0]["measurements"]}
    for name in NAMES:
        assert scored[name] == pytest.approx(value(after, name), rel=1e-5)
    assert scored.get("forced_share", 1) > 0


def test_forced_share_counts_tokens_and_layers_that_were_sent_elsewhere(original, probes, make_case):
    forcing = ExpertForcing()
    same = forcing.forced_share(make_case(forcing, original.params))
    assert (same.value, same.low, same.high, same.n, same.split) == (0, 0, 0, 8, "train")
    one_of_two = forcing.forced_share(make_case(forcing, hidden(original.params, 1)))  # its layer reads what it did
    assert (one_of_two.value, one_of_two.low, one_of_two.high) == (0.5, 0.5, 0.5)
    case, rows = make_case(forcing, hidden(original.params, 0)), probes.text["forget"]
    run = jax.jit(lambda p, t: forward(p, original.config, t, collect=("indices",)).router.indices)
    before, after = (np.asarray(run(model.params, rows.tokens))[:, rows.valid] for model in (original, case.unlearned))
    assert (before[0] != after[0]).all()
    share = forcing.forced_share(case)
    assert share.value == pytest.approx((before != after).mean())
    assert share.low < share.value < share.high
