"""Unlearning as a user calls it: what it changes, what it leaves alone, and what it refuses.

What is particular to some objectives in a run: task vectors, cached references, steering, refusals, PDU's dual.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.unlearning.conftest import CONFIG, ONE, assert_same, flat_of, in_bfloat16, make_rows, run
from tests.unlearning.test_step import Traced
from trace_jax.config import ConfigError
from trace_jax.data.rows import encode_refusals, with_refusals
from trace_jax.io.files import read_lines
from trace_jax.models.architecture import flatten
from trace_jax.models.decoder import forward
from trace_jax.models.loss import token_nll
from trace_jax.models.sharding import placed_params
from trace_jax.routing.weights import RetainWeights
from trace_jax.unlearning import inputs as inputs_module
from trace_jax.unlearning import unlearn as unlearn_module
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import steering_directions, steering_target
from trace_jax.unlearning.loop import Evaluated

KEEP = {"name": "best_utility", "forgetting": 0.5}


def test_forget_text_becomes_less_likely_and_the_target_model_is_not_changed(model, forget, retain):
    def nll(params):
        out = forward(params, model.config, forget.tokens, mask=forget.segments, collect=("hidden",))
        losses = token_nll(params, model.config, out.hidden, np.roll(forget.tokens, -1, 1))
        return float(np.asarray(losses)[forget.valid].mean())

    before = jax.tree.map(np.array, model.params)
    after = run(model, forget, retain).model.params
    assert_same(model.params, before)
    assert nll(after) > nll(model.params) + 0.5


def test_a_silent_run_says_nothing_and_tells_the_same_to_its_callback(model, forget, retain, capsys):
    seen = []
    quiet = run(
        model, forget, retain, verbose=False, callback=lambda step, of_step: seen.append({"step": step, **of_step})
    )
    assert capsys.readouterr().err == ""
    loud = run(model, forget, retain)
    assert "6 steps of 4 forget rows" in capsys.readouterr().err, "silence ends with the run it was asked for"
    assert seen == quiet.history and len(seen) == CONFIG.steps
    assert tiny.timeless(seen) == tiny.timeless(loud.history)


def test_same_seed_same_result_and_another_seed_another(model, forget, retain):
    first, again, other = (run(model, forget, retain, seed=s).model.params for s in (1, 1, 2))
    assert_same(first, again)
    assert not np.array_equal(first["head"], other["head"])


def test_a_finished_run_of_other_rows_or_weights_is_not_taken_for_this_one(model, forget, retain, tmp_path):
    weights = RetainWeights(np.linspace(0.5, 1.5, retain.valid.sum()), retain.valid)
    texts = (forget, retain, None), (retain, retain, None), (retain, retain, weights)
    ends = [run(model, f, r, weights=w, directory=tmp_path).history[-1]["loss"] for f, r, w in texts]
    assert ends == [run(model, f, r, weights=w).history[-1]["loss"] for f, r, w in texts] and len(set(ends)) == 3


def test_rmu_trains_down_projections_up_to_its_layer_and_shares_what_is_frozen(model, forget, retain):
    placed = model.replace(params=placed_params(model.params, model.config, ONE))
    config = UnlearningConfig(objective={"name": "rmu", "layer": 1}, steps=3, forget_batch_size=4, retain_batch_size=4)
    result = run(placed, forget, retain, config)
    assert {row["path"] for row in result.trained if row["trained"]} == {"layers/experts/down"}
    before, after = flatten(placed.params), flatten(result.model.params)
    change = np.asarray(after["layers/experts/down"] - before["layers/experts/down"])
    assert change[0].any() and not change[1].any()
    shared = {path for path in before if after[path].unsafe_buffer_pointer() == before[path].unsafe_buffer_pointer()}
    assert shared == set(before) - {"layers/experts/down"}


def test_steps_too_small_for_bfloat16_still_add_up(model, forget, retain):
    """A weight of 0.25 or more can't take a step of 1e-4 in bfloat16; forty of them in one direction count."""
    half = in_bfloat16(model)
    rate = dataclasses.replace(CONFIG, steps=40, learning_rate=1e-4, trainable="down_projections", checkpoint_every=40)
    after = run(half, forget, retain, rate).model.params["layers"]["experts"]["down"]
    before = half.params["layers"]["experts"]["down"]
    assert after.dtype == jnp.bfloat16
    large = np.abs(np.asarray(before, np.float32)) >= 0.25
    assert large.sum() > 50 and (np.asarray(after) != np.asarray(before))[large].mean() > 0.3


def test_a_run_that_reaches_its_target_is_a_success_and_its_best_state_is_a_model(model, forget, retain, tmp_path):
    """Interrupted, it keeps the same state: `test_rules`."""
    numbers = {0: (1.0, 1.0), 2: (0.4, 0.9), 4: (0.3, 0.6), 6: (0.05, 0.7)}

    def rules(directory, **more):
        seen = []

        def evaluate(params):
            step = 2 * len(seen)
            seen.append(np.asarray(params["head"]))
            return Evaluated({"step": step}, *numbers[step])

        more |= {"steps": 8, "evaluate_every": 2, "checkpoint_every": 3, "stop_forgetting": 0.1}
        config = dataclasses.replace(CONFIG, **more)
        return run(model, forget, retain, config, directory=tmp_path / directory, evaluate=evaluate), seen

    last, seen = rules("last")
    assert (last.step, last.failed) == (6, False) and "reached stop_forgetting 0.1 at step 6" in last.stopped
    np.testing.assert_array_equal(last.model.params["head"], seen[3])
    best, seen = rules("best", keep=KEEP)
    assert (best.step, best.failed) == (2, False)
    np.testing.assert_array_equal(best.model.params["head"], seen[1])


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retain_loss": {"name": "hidden", "layer": 9}}, "layer is 9, but the model has 2 layers"),
        ({"stop_forgetting": 0.1}, "read evaluations; give"),
        ({"stop_utility": 0.9}, "read evaluations; give"),
        ({"keep": KEEP}, "read evaluations; give"),
        ({"objective": "idk"}, "need a tokenizer"),
        ({"grip": "project", "trainable": "experts"}, "leaves the routers as they are"),
        ({"grip": {"name": "realign", "tokens": 5}}, "5 retain tokens for routers of 16 inputs"),
    ],
)
def test_runs_that_can_not_be_are_refused(model, forget, retain, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(model, forget, retain, dataclasses.replace(CONFIG, **changes))


def test_missing_or_empty_data_is_refused(model, forget, retain):
    with pytest.raises(ConfigError, match="has a retain term"):
        run(model, forget, None)
    with pytest.raises(ConfigError, match="give retain rows"):
        run(model, forget, None, UnlearningConfig(objective="gradient_ascent", grip="project"))
    empty = dataclasses.replace(forget, valid=np.zeros_like(forget.valid))
    with pytest.raises(ValueError, match="forget rows hold no token"):
        run(model, empty, retain)
    foreign = dataclasses.replace(retain, tokens=retain.tokens - 1)  # padding becomes -1
    with pytest.raises(ValueError, match="the retain rows hold the id -1, and the model knows 0 to 63"):
        run(model, forget, foreign)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "best_utility"}, r"keep\.forgetting is missing"),
        ({"keep": "best"}, "keep is 'best'; expected one of last, best_utility"),
        ({"objective": {"name": "npo", "form": "wmdp"}}, "form is 'wmdp'; expected one of paper, token_mean"),
        ({"objective": "pdu", "retain_loss": "none"}, "needs one"),
        ({"objective": "pdu", "retain_loss": "nll"}, "retain_bound is needed"),
        ({"objective": {"name": "wga", "delta": 0.1}}, "delta would have no effect: it belongs to simnpo"),
        ({"objective": {"name": "idk", "refusals": ()}}, "refusals holds no text"),
        ({"objective": {"name": "rmu", "layer": 2}, "retain_loss": {"name": "hidden", "layer": 1}}, "steers layer 2"),
        ({"objective": "gradient_ascent", "retain_loss": "kl"}, "retain_loss 'kl' would have no effect"),
        ({"objective": "task_vector", "alpha": 3.0}, "alpha = 3.0 would have no effect: there is no retain term"),
        ({"retain_loss": "none", "normalize": "batch"}, "normalize = 'batch' would have no effect"),
        ({"retain_loss": "none", "retain_batch_size": 4}, "retain_batch_size = 4 would have no effect"),
        ({"epochs": -1}, "epochs is -1.0; expected a value at least"),
        ({"epochs": 2, "steps": 60}, "steps is 60 and epochs is 2; a run has one length"),
        ({"epoch_anchor": "retain"}, "epoch_anchor = 'retain' would have no effect"),
        ({"steps": 0}, "steps is 0 and epochs is 0"),
        ({"epochs": 1, "epoch_anchor": "both"}, "epoch_anchor is 'both'; expected one of forget, retain"),
        ({"epochs": 1, "epoch_anchor": "retain", "retain_loss": "none"}, "there is no retain term"),
        ({"grip": {"null": 0.1}}, "null would have no effect: it belongs to project"),
        ({"grip": {"name": "project", "ridge": 0.1}}, "ridge would have no effect"),
        ({"trainable": {"name": "lora", "anchor": 1.0}}, "anchor would have no effect"),
        ({"trainable": {"name": "seuf", "experts": {"name": "calibration", "top": 2}}}, "top would have no effect"),
        ({"trainable": {"name": "seuf", "experts": "afinity"}}, "did you mean 'affinity'"),
        ({"trainable": {"name": "seuf", "anchor_form": "max"}}, "expected one of sum, mean"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"optimizer": {"name": "sgd", "b1": 0.9}}, "b1 would have no effect"),
        ({"optimizer": {"momentum": 0.9}}, "momentum would have no effect: it belongs to sgd and muon, not to adamw"),
        ({"optimizer": {"name": "muon", "momentum": 1.5}}, "momentum is 1.5; expected a value from 0.0 to 1.0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        UnlearningConfig(**settings)


# --- what is particular to some objectives


def setting(name, own=None, **changes):
    """own: settings of the objective."""
    refusals = {"refusals": ("w7",)} if name in ("dpo", "idk") else {}
    base = {"steps": 3, "forget_batch_size": 4, "learning_rate": 0.01}
    return UnlearningConfig(objective={"name": name, **refusals, **(own or {})}, **base | changes)


def test_a_task_vector_is_what_was_learnt_times_minus_the_scale(model, forget):
    """One step of plain ascent and one of descent move every parameter equally far, in opposite directions."""
    shared = {"steps": 1, "forget_batch_size": 8, "clip_norm": 0.0, "learning_rate": 0.003}
    settings = setting("task_vector", {"task_scale": 3.0}, **shared), setting("gradient_ascent", **shared)
    subtracted, ascent = (flat_of(run(model, forget, None, config).model) for config in settings)
    for path, before in flat_of(model).items():
        wanted = 3.0 * (ascent[path] - before)
        np.testing.assert_allclose(subtracted[path] - before, wanted, atol=2e-6, err_msg=path)


def test_cached_log_probabilities_give_the_same_run_and_are_read_again(model, forget, retain, tmp_path, monkeypatch):
    """Those of forget rows and of refusals."""
    model = dataclasses.replace(model, tokenizer=tiny.make_tokenizer())
    run(model, forget, retain, setting("dpo"), directory=tmp_path / "plain")
    cached = setting("dpo", {"cache_reference": True})
    first = run(model, forget, retain, cached, directory=tmp_path / "a", identity="a")
    one, other = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("plain", "a"))
    for name in ("loss", "forget_loss", "retain_loss", "gradient_norm"):
        assert one[name] == pytest.approx(other[name], rel=2e-5, abs=1e-6), name
    monkeypatch.setattr(inputs_module, "losses", lambda *_, **__: pytest.fail("computed again"))
    again = run(model, forget, retain, cached, directory=tmp_path / "a", identity="a")
    assert_same(again.model.params, first.model.params)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        run(model, forget, retain, cached, directory=tmp_path / "a", identity="another run")


def test_adaptive_rmu_steers_by_the_first_batch_of_each_topic(model, retain, monkeypatch):
    forget = dataclasses.replace(make_rows(12, seed=4), domain=np.arange(12, dtype=np.int32) % 2)
    config = setting("adaptive_rmu", {"steering_scale": 5.0, "layer": 2}, topics="alternating")
    original, seen = unlearn_module.unlearning_step, []

    def step(state, constants, rows, **settings):
        seen.append((np.asarray(constants.target), rows))
        return original(state, constants, rows, **settings)

    monkeypatch.setattr(unlearn_module, "unlearning_step", step)
    run(model, forget, retain, config, seed=7)
    directions = steering_directions(jax.random.key(7), 2, 16)
    for topic, (target, rows) in enumerate(seen[:2]):
        batch = rows.forget
        filled = np.asarray(batch.valid).any(1)  # not only added for the devices
        assert filled.sum() == 4 and set(np.asarray(rows.topic)[filled].tolist()) == {topic}
        out = forward(model.params, model.config, batch.tokens, mask=batch.segments, collect=("layers",)).layers[1]
        length = np.linalg.norm(np.asarray(out), axis=-1)[np.asarray(batch.valid)].mean()
        np.testing.assert_allclose(target[topic], 5.0 * length * directions[topic], rtol=1e-4)
        of_code = dataclasses.replace(config, objective=dataclasses.replace(config.objective, form="wmdp"))
        all_positions = np.linalg.norm(np.asarray(out), axis=-1)[filled].mean()  # start marks and padding too
        measured = steering_target(model, forget, of_code, seed=7, mesh=ONE)
        np.testing.assert_allclose(measured[topic], 5.0 * all_positions * directions[topic], rtol=1e-4)


def test_pdu_raises_its_coefficient_while_the_retain_loss_is_above_the_bound(model, forget, retain, tmp_path):
    own = {"retain_bound": 0.01, "dual_rate": 10.0, "dual_warmup": 2}
    config = setting("pdu", own, alpha=1.0, steps=5)
    run(model, forget, retain, config, directory=tmp_path)
    rows = [row for row in read_lines(tmp_path / "metrics.jsonl") if "loss" in row]
    alphas, losses = ([row[name] for row in rows] for name in ("alpha", "retain_loss"))
    assert alphas[:3] == [1.0, 1.0, 1.0]
    for now, loss, following in zip(alphas[2:], losses[2:], alphas[3:], strict=False):
        assert following == pytest.approx(max(0.0, now + 10.0 * (loss - 0.01)), rel=1e-5)
    assert alphas[-1] > 1.0


def test_an_epoch_is_of_the_rows_that_the_objective_reads(model, retain, capsys, monkeypatch):
    """Documents paired with refusals need room for the longer side, so there may be more rows than before."""
    forget = make_rows(9, seed=5)
    model = dataclasses.replace(model, tokenizer=tiny.make_tokenizer())
    longer = ("w7 w7 w7 w7 w7",)  # six tokens with the end mark, half a row
    paired, _ = with_refusals(forget, encode_refusals(longer, model.tokenizer, model.special))
    assert len(paired) > len(forget)
    config = setting("idk", {"refusals": longer}, steps=None, epochs=1.0, retain_loss="none")

    def step(*_, **__):
        raise Traced

    monkeypatch.setattr(unlearn_module, "unlearning_step", step)
    with pytest.raises(Traced):
        run(model, forget, retain, config)
    said = f"{-(-len(paired) // 4)} steps of 4 forget rows x 12 + 4 refusal rows x 12 = 96 tokens each, in one batch on"
    assert said in capsys.readouterr().err
