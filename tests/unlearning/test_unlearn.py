"""Unlearning as a user calls it: what it changes, what it leaves alone, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.config import ConfigError
from trace_jax.data.batches import sequential_batches
from trace_jax.models.arrays import abstract_params, flatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.model import Model
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import make_mesh
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.statistics import expert_statistics
from trace_jax.routing.weights import retain_weights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.rules import Evaluated
from trace_jax.unlearning.unlearn import unlearn

CONFIG = UnlearningConfig(
    steps=6, forget_batch_size=4, retain_batch_size=4, learning_rate=0.01, alpha=1.0, checkpoint_every=6
)

KEEP = {"name": "best_utility", "forgetting": 0.2}


def weights_of(model, forget, retain, **settings):
    statistics = [expert_statistics(model, sequential_batches(rows, 8), min_activations=1) for rows in (forget, retain)]
    config = CalibrationConfig({"name": "entropy", **settings})
    return retain_weights(
        config, model=model, forget=forget, retain=retain,
        forget_statistics=statistics[0], retain_statistics=statistics[1],
    )  # fmt: skip


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("unit", ["token", "row"])
@pytest.mark.parametrize("apply", ["weights", "both"])
def test_equal_routing_trains_bit_identically_to_graddiff(model, retain, unit, apply):
    """Where forget and retain use the experts alike, every weight is exactly one and TRACE is plain GradDiff."""
    weights = weights_of(model, retain, retain, rule="all", unit=unit, apply=apply)
    assert (weights.weights == retain.valid).all()
    plain = unlearn(model, retain, retain, config=CONFIG)
    assert_same(unlearn(model, retain, retain, config=CONFIG, weights=weights).model.params, plain.model.params)


def test_the_target_model_is_not_changed(model, forget, retain):
    before = jax.tree.map(np.array, model.params)
    changed = unlearn(model, forget, retain, config=CONFIG)
    assert_same(model.params, before)
    assert not np.array_equal(changed.model.params["head"], before["head"])


def test_forget_text_becomes_less_likely(model, forget, retain):
    def nll(params):
        out = forward(params, model.config, forget.tokens, mask=forget.segments, collect=("hidden",))
        return float(
            np.asarray(token_nll(params, model.config, out.hidden, np.roll(forget.tokens, -1, 1)))[forget.valid].mean()
        )

    config = dataclasses.replace(CONFIG, steps=20)
    assert nll(unlearn(model, forget, retain, config=config).model.params) > nll(model.params) + 0.5


def test_only_selected_experts_train(model, forget, retain):
    weights = weights_of(model, forget, retain, rule={"name": "difference", "top": 1})
    assert weights.selected.sum() == 2
    config = dataclasses.replace(CONFIG, trainable="selected_experts", weight_decay=0.1)
    params = unlearn(model, forget, retain, config=config, weights=weights).model.params
    for path in ("gate_up", "down"):
        before, after = (np.asarray(p["layers"]["experts"][path]) for p in (model.params, params))
        np.testing.assert_array_equal(after[~weights.selected], before[~weights.selected])
        assert (after[weights.selected] != before[weights.selected]).any()
    np.testing.assert_array_equal(params["head"], model.params["head"])


def test_what_is_frozen_is_shared_with_the_target_and_not_copied(model, forget, retain):
    mesh = make_mesh(jax.devices()[:1])
    placed = model.replace(params=placed_params(model.params, model.config, mesh))
    config = dataclasses.replace(CONFIG, steps=2, trainable="experts")
    result = unlearn(placed, forget, retain, config=config, mesh=mesh).model.params
    before, after = flatten(placed.params), flatten(result)
    shared = {path for path in before if after[path].unsafe_buffer_pointer() == before[path].unsafe_buffer_pointer()}
    assert shared == set(before) - {"layers/experts/gate_up", "layers/experts/down"}


def test_steps_too_small_for_bfloat16_still_add_up(model, forget, retain):
    """A weight of 0.25 or more can't take a step of 1e-4 in bfloat16; forty of them in one direction count."""
    config = dataclasses.replace(model.config, dtype="bfloat16")
    specs = abstract_params(config)
    half = Model(config, jax.tree.map(lambda x, like: x.astype(like.dtype), model.params, specs))
    rate = dataclasses.replace(CONFIG, steps=40, learning_rate=1e-4, trainable="down_projections", checkpoint_every=40)
    after = unlearn(half, forget, retain, config=rate).model.params["layers"]["experts"]["down"]
    before = half.params["layers"]["experts"]["down"]
    assert after.dtype == jnp.bfloat16
    large = np.abs(np.asarray(before, np.float32)) >= 0.25
    assert large.sum() > 50 and (np.asarray(after) != np.asarray(before))[large].mean() > 0.3


def test_same_seed_same_result_and_another_seed_another(model, forget, retain):
    first, again, other = (unlearn(model, forget, retain, config=CONFIG, seed=s).model.params for s in (1, 1, 2))
    assert_same(first, again)
    assert not np.array_equal(first["head"], other["head"])


def test_rmu_trains_down_projections_up_to_its_layer(model, forget, retain):
    config = UnlearningConfig(objective={"name": "rmu", "layer": 1}, steps=3, forget_batch_size=4, retain_batch_size=4)
    result = unlearn(model, forget, retain, config=config)
    trained = {row["path"]: row["trained"] for row in result.trained if row["trained"]}
    assert trained == {"layers/experts/down": model.params["layers"]["experts"]["down"].size // 2}
    change = np.asarray(result.model.params["layers"]["experts"]["down"] - model.params["layers"]["experts"]["down"])
    assert change[0].any() and not change[1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "selected_experts"}, "no expert is selected"),
        ({"retain_loss": {"name": "hidden", "layer": 9}}, "layer is 9, but the model has 2 layers"),
        ({"trainable": "experst"}, "neither a preset"),
    ],
)
def test_impossible_settings_are_refused(model, forget, retain, changes, message):
    with pytest.raises(ConfigError, match=message):
        unlearn(model, forget, retain, config=dataclasses.replace(CONFIG, **changes))


def test_missing_or_empty_data_is_refused(model, forget, retain):
    with pytest.raises(ConfigError, match="has a retain term"):
        unlearn(model, forget, None, config=CONFIG)
    empty = dataclasses.replace(forget, valid=np.zeros_like(forget.valid))
    with pytest.raises(ValueError, match="forget rows hold no token"):
        unlearn(model, empty, retain, config=CONFIG)


# --- rules about evaluations


@pytest.mark.parametrize(
    "rule",
    [{"stop_forgetting": 0.1}, {"stop_utility": 0.9}, {"keep": KEEP}],
)
def test_a_rule_without_an_evaluation_is_refused(model, forget, retain, rule):
    with pytest.raises(ConfigError, match="are about evaluations, and there are none"):
        unlearn(model, forget, retain, config=dataclasses.replace(CONFIG, **rule))


def test_keeping_the_best_needs_to_know_how_much_is_forgotten():
    with pytest.raises(ConfigError, match=r"keep\.forgetting is missing"):
        UnlearningConfig(keep="best_utility")
    with pytest.raises(ConfigError, match="keep is 'best'; expected one of last, best_utility"):
        UnlearningConfig(keep="best")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "muon"])
def test_a_run_that_reaches_its_target_is_a_success_and_its_best_state_is_a_model(
    model, forget, retain, tmp_path, optimizer
):
    """Interrupted between two saves, with the state of every optimizer."""
    numbers = {0: (1.0, 1.0), 2: (0.4, 0.9), 4: (0.3, 0.6), 6: (0.05, 0.7)}

    def run(directory, stop_at=None, **more):
        seen = []

        def evaluate(params):
            step = 2 * len(seen) if directory not in resumed else resumed[directory] + 2 * len(seen)
            seen.append(np.asarray(params["head"]))
            if step == stop_at:
                raise KeyboardInterrupt
            return Evaluated({"step": step}, *numbers[step])

        config = dataclasses.replace(
            CONFIG, steps=8, evaluate_every=2, checkpoint_every=3, stop_forgetting=0.1, optimizer=optimizer, **more,
        )  # fmt: skip
        return unlearn(model, forget, retain, config=config, directory=directory, evaluate=evaluate), seen

    resumed = {}
    keep = {"keep": KEEP | {"forgetting": 0.5}}
    last, seen = run(tmp_path / "last")
    assert (last.step, last.failed) == (6, False) and "reached stop_forgetting 0.1 at step 6" in last.stopped
    np.testing.assert_array_equal(last.model.params["head"], seen[3])
    best, seen = run(tmp_path / "best", **keep)
    assert (best.step, best.failed) == (2, False)
    np.testing.assert_array_equal(best.model.params["head"], seen[1])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=6, **keep)
    resumed[tmp_path / "cut"] = 4
    again, _ = run(tmp_path / "cut", **keep)
    assert (again.step, again.stopped) == (best.step, best.stopped)
    assert_same(again.model.params, best.model.params)
