"""Attacks on plants of which the answer is known.

A change below a step of rounding is undone; what was hidden by routers alone is back with the original routing, and
what experts have lost is not. Relearning is next-token training on the rows that it says, measured as it goes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attacks.conftest import emptied, measured, value
from trace_jax.attacks import attack as attacks
from trace_jax.attacks.attack import BenignRelearning, ExpertForcing, Quantization, Relearning, RouterSwap
from trace_jax.config import ConfigError
from trace_jax.data.rows import epoch_sampler
from trace_jax.evaluation.likelihood import score_rows
from trace_jax.models.architecture import ModelConfig, flat_specs, flatten, parameter_specs, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.unlearning.metrics import front_rows
from trace_jax.unlearning.optimizer import learning_rate

RATIO = "forget_probability_ratio"
NAMES = ("forget_accuracy", "forget_nll", RATIO)
UNROUNDED = ("embed", "head", "layers/router", "layers/router_bias")


def test_each_output_has_a_step_of_its_own():
    weights = jnp.asarray([[1.4, 0.07, 0], [0.5, -0.021, 0], [-0.29, 0.0, 0]], jnp.float32)  # [inputs, outputs]
    # 4 bits: 7 steps to the largest, .2 and .01. .5 / .2 = 2.5 goes to the even 2, -.29 / .2 = -1.45 to -1.
    expected = np.float32([[1.4, 0.07, 0], [0.4, -0.02, 0], [-0.2, 0, 0]])
    np.testing.assert_allclose(attacks.round_to_nearest(weights, 4, sides=(0, 1)), expected, rtol=1e-6, atol=1e-9)
    # LLM.int8() of a layer [outputs, inputs]: round(127 A / absmax of its row), and back.
    row = np.abs(weights.T[:2]).max(axis=1, keepdims=True)
    vectorwise = np.zeros((3, 3), np.float32)
    vectorwise[:2] = np.round(weights.T[:2] * (127 / row)) * row / 127
    fine = attacks.round_to_nearest(weights, 8, sides=(0, 1))
    np.testing.assert_allclose(fine.T, vectorwise, rtol=1e-6, atol=1e-9)


def test_four_bits_in_blocks_are_those_of_bitsandbytes():
    """The levels that it publishes, and its rule on a matrix [outputs, inputs] as it lies in memory, in plain numpy."""
    nf4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    nf4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    fp4 = [0.0052, 0.1667, 0.25, 0.3333, 0.5, 0.6667, 1.0]
    tables = {"nf4": np.array(nf4), "fp4": np.sort([*fp4, 0.0, *np.negative(fp4)])}
    # [layers, H, C, D], written by heads and their width: 2 matrices of 5 outputs and 6 x 5 inputs, 150 weights each.
    weights = np.random.default_rng(0).normal(size=(2, 6, 5, 5)).astype(np.float32)
    weights[1, ..., :3] = 0  # a block without a scale
    for name, table in tables.items():
        np.testing.assert_allclose(attacks.BLOCK_LEVELS[name], table, atol=1e-6 if name == "nf4" else 5e-5)
        expected = np.zeros((2, 150), np.float32)
        for layer, matrix in enumerate(weights.reshape(2, 30, 5)):
            flat = matrix.T.reshape(-1)
            for start in (0, 64, 128):
                block = flat[start : start + 64]
                scale = np.abs(block).max()
                if scale > 0:
                    code = np.abs(block[:, None] / scale - attacks.BLOCK_LEVELS[name]).argmin(axis=1)
                    expected[layer, start : start + 64] = attacks.BLOCK_LEVELS[name][code] * scale
        found = np.asarray(attacks.round_in_blocks(jnp.asarray(weights), name, sides=(1, 3)))
        layers = expected.reshape(2, 5, 30).swapaxes(1, 2).reshape(weights.shape)
        np.testing.assert_allclose(found, layers, rtol=1e-5, atol=1e-7)


def test_matrices_are_rounded_and_the_rest_is_left(original):
    before, after = flatten(original.params), flatten(attacks.quantized(original.params, original.config, form=4))
    same = {path for path in before if after[path] is before[path]}
    assert {path for path in same if "norm" not in path} == set(UNROUNDED)
    gate_up = np.asarray(after["layers/experts/gate_up"])  # [L, E, D, 2, F]: inputs D
    assert all(len(np.unique(gate_up[0, 1, :, 0, f])) <= 15 for f in range(gate_up.shape[-1]))
    o = np.asarray(after["layers/o"])  # [L, H, C, D]: inputs H and C together
    assert all(len(np.unique(o[0, :, :, d])) <= 15 for d in range(o.shape[-1]))


def test_no_bias_norm_or_gate_vector_counts_as_a_matrix(monkeypatch):
    monkeypatch.setattr(attacks, "round_to_nearest", lambda array, *_, **__: array + 0)
    config = ModelConfig(
        num_experts=4, router_bias=True, router_correction=True, expert_bias=True, attention_bias="all",
        qk_norm="full", norm="layer", sinks=True, shared_hidden_size=8, shared_gate=True, mlp_bias=True,
    )  # fmt: skip
    flat = {path: np.zeros(spec.shape, spec.dtype) for path, spec in flat_specs(config).items()}
    after = flatten(attacks.quantized(unflatten(flat), config, form=2))
    rounded = {path.rsplit("/", 1)[-1] for path in flat if after[path] is not flat[path]}
    assert rounded == {"q", "k", "v", "o", "gate_up", "down"}
    assert set(flatten(parameter_specs(config))) == set(after)


def test_a_change_below_a_step_is_undone(original, make_case):
    # The original lies on the grid of 4 bits; the change is a fifth of a step of its channel, and spares the largest.
    on_grid = flatten(attacks.quantized(original.params, original.config, form=4))
    off_grid = {}
    for path, array in on_grid.items():
        first, second = flat_specs(original.config)[path].sides
        matrix = path not in UNROUNDED and first < second < array.ndim
        largest = np.abs(array).max(axis=tuple(range(first, second)), keepdims=True) if matrix else None
        off_grid[path] = array if largest is None else np.where(np.abs(array) < largest, array + largest / 35, array)
    case = make_case(Quantization(), unflatten(off_grid))
    before = case.context.evaluator.score(original.replace(params=unflatten(on_grid)), full=True)
    evaluator = dataclasses.replace(case.context.evaluator, original=before)
    eight, four, *blocks = Quantization().points(make_case(Quantization(), unflatten(off_grid), evaluator=evaluator))
    assert [point.at for point in (eight, four, *blocks)] == ["8 bits", "4 bits", "nf4", "fp4"]
    unlearned = value(evaluator.measure(evaluator.score(case.unlearned)), RATIO)
    assert unlearned < 0.97
    assert value(four.measurements, RATIO) == pytest.approx(1, abs=1e-5)
    assert abs(value(eight.measurements, RATIO) - unlearned) < 0.2 * (1 - unlearned)  # too fine to undo it


def test_bits_are_a_list_of_2_to_8():
    with pytest.raises(ConfigError, match=r"bits is 16; expected one of 2, 3, .* 8"):
        Quantization(bits=(16,))
    with pytest.raises(ConfigError, match="empty list"):
        Quantization(bits=(), blocks=())


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


@pytest.mark.parametrize("by", ["router", "router_bias"])
def test_knowledge_that_only_the_router_hid_is_back_exactly(original, make_case, by):
    """The experts that a token likes least; or all tokens moved to one expert by the bias alone."""
    change = jnp.negative if by == "router" else lambda bias: bias + np.float32([[99, 0, 0, 0]])
    case = make_case(RouterSwap(), changed(original.params, **{by: change}))
    assert value(measured(case), RATIO) < 0.9
    (point,) = case.context.attack.points(case)
    assert point.at == "original routers"
    evaluator = case.context.evaluator
    assert point.measurements == evaluator.measure(evaluator.original)  # to the last bit: the same arrays
    assert value(point.measurements, RATIO) == 1


def test_what_was_only_routed_around_comes_back_whole(original, make_case):
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
def test_what_was_taken_out_of_the_experts_does_not_come_back(original, make_case, attack):
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


# --- training goes on


TRAINING = {"steps": (3, 6), "batch_size": 4, "learning_rate": 2e-3, "schedule": "constant"}


@pytest.fixture(scope="module")
def forgetful(original):
    """The original with a weaker output head: it knows less of everything."""
    return {**original.params, "head": original.params["head"] * 0.3}


def test_a_step_is_a_step_of_gradient_descent_on_the_forget_rows(forgetful, make_case):
    attack = Relearning(steps=(1,), batch_size=8, learning_rate=0.1, optimizer="sgd")
    case = make_case(attack, forgetful)
    (point,) = attack.points(case)
    rows, model = case.context.corpora.forget, case.unlearned

    @jax.jit
    @jax.grad
    def gradient(params):
        out = forward(params, model.config, rows.tokens, mask=rows.segments, collect=("hidden",))
        nll = token_nll(params, model.config, out.hidden, jnp.roll(rows.tokens, -1, axis=1))
        return jnp.where(rows.valid, nll, 0).sum() / rows.valid.sum(dtype=np.float32)

    slope = gradient(model.params)
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(slope)))
    scale = 0.1 * jnp.minimum(1, 1 / norm)
    expected = model.replace(params=jax.tree.map(lambda p, g: p - scale * g, model.params, slope))
    nll = score_rows(expected, rows, batch_size=8)
    assert point.at == "1 steps"
    assert value(point.measurements, "forget_nll") == pytest.approx(nll.sum() / rows.valid.sum(), rel=1e-4)


def test_the_defaults_are_those_of_muse_books_and_the_settings_of_wmdp_are_there():
    """2502.05374: `transformers.Trainer` on the whole forget text, AdamW .9/.999, schedules that end with the run."""
    books, wmdp = Relearning(), Relearning(steps=(100,), schedule="linear", warmup_steps=10)
    assert (books.share, books.steps, books.batch_size) == (1.0, (50, 75, 100), 4)
    adam = books.optimization.optimizer
    assert (adam.name, adam.b1, adam.b2, books.weight_decay, books.clip_norm) == ("adamw", 0.9, 0.999, 0.0, 1.0)
    for steps in books.steps:
        rates = [float(learning_rate(books.optimization, steps)(step)) for step in range(steps)]
        cosine = (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
        np.testing.assert_allclose(rates, 1e-5 * cosine, rtol=1e-5, atol=1e-12)
    rates = [float(learning_rate(wmdp.optimization, 100)(step)) for step in range(100)]
    np.testing.assert_allclose(rates[10:], 1e-5 * (100 - np.arange(10, 100)) / 90, rtol=1e-5)
    assert rates[0] < rates[5] < rates[9] < 1e-5
    drawn = np.concatenate([epoch_sampler(555, 4, seed=0)(step) for step in range(100)])
    assert len(set(drawn.tolist())) == 400  # where there are that many, no row comes twice


def test_what_was_hidden_comes_back_with_training_and_the_worst_point_counts(forgetful, make_case):
    attack = Relearning(**TRAINING)
    case = make_case(attack, forgetful)
    result = case.attack()
    assert [point["at"] for point in result["points"]] == ["3 steps", "6 steps"]
    points = attack.points(case)
    ratios = [value(point.measurements, RATIO) for point in points]
    assert value(measured(case), RATIO) < min(ratios)
    assert (result["measure"], result["strongest"]) == (RATIO, int(np.argmax(ratios)))
    assert not list(case.directory.rglob("checkpoints"))
    # A finished attack is not trained again: it would fail. Another one is.
    assert attack.points(make_case(attack, None)) == points
    assert attack.points(make_case(attack, forgetful, identity="another")) == points
    assert not front_rows(case.directory / "6-steps", case.identity)  # what another attack left is gone


def test_share_takes_that_many_rows(original, make_case):
    taken = [make_case(Relearning(share=share), original.params).context for share in (0.01, 0.5, 1.0)]
    forget = taken[0].corpora.forget.tokens
    assert [len(context.prepared) for context in taken] == [1, 4, 8]
    assert np.array_equal(taken[2].prepared.tokens, forget)
    assert all((forget == row).all(axis=1).any() for row in taken[1].prepared.tokens)
    with pytest.raises(ConfigError, match="share is 0"):
        Relearning(share=0.0)


def test_benign_text_is_the_retain_corpus_without_neighbours(forgetful, make_case):
    attack = BenignRelearning(**TRAINING)
    case = make_case(attack, forgetful)
    retain = case.context.corpora.retain
    assert np.array_equal(case.context.prepared.tokens, retain.tokens[retain.domain == 0])
    assert value(attack.points(case)[-1].measurements, RATIO) > 0


def test_a_run_that_diverges_has_no_point_and_is_not_trained_again(forgetful, make_case):
    attack = Relearning(steps=(1, 4), batch_size=8, learning_rate=100.0, weight_decay=1e30, optimizer="sgd")
    result = attack.points(make_case(attack, forgetful))
    assert len(result) < 2
    assert attack.points(make_case(attack, None)) == result


def test_what_the_training_teaches_a_model_that_never_knew_stands_beside_it(original, forgetful, make_case, tmp_path):
    attack = Relearning(share=0.5, **TRAINING)
    weak = original.replace(params=forgetful)
    first = attack.points(make_case(attack, weak.params, load_retrained=lambda: weak))
    assert all(point.retrained == point.measurements for point in first)  # the same model, trained in the same way
    assert all(set(point.to_json()) == {"at", "measurements", "retrained"} for point in first)
    # A second method of the run takes the control from before: it would fail if it were trained.
    other = {"load_retrained": lambda: original.replace(params=None), "directory": tmp_path / "b", "identity": "b"}
    second = attack.points(make_case(attack, original.params, **other))
    assert [point.retrained for point in second] == [point.retrained for point in first]
    assert second[0].measurements != first[0].measurements
