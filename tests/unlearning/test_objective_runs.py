"""What is particular to some objectives in a run: task vectors, cached references, steering, refusals, PDU's dual."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny
from tests.unlearning.conftest import ONE, assert_same, flat_of, make_rows
from tests.unlearning.test_step import Traced
from trace_jax.data.rows import encode_refusals, with_refusals
from trace_jax.io.files import read_lines
from trace_jax.models.decoder import forward
from trace_jax.unlearning import inputs as inputs_module
from trace_jax.unlearning import unlearn as unlearn_module
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import steering_directions
from trace_jax.unlearning.unlearn import unlearn


def setting(name, own=None, **changes):
    """own: settings of the objective."""
    refusals = {"refusals": ("w7",)} if name in ("dpo", "idk") else {}
    base = {"steps": 3, "forget_batch_size": 4, "learning_rate": 0.01}
    return UnlearningConfig(objective={"name": name, **refusals, **(own or {})}, **base | changes)


def test_a_task_vector_is_what_was_learnt_times_minus_the_scale(model, forget):
    """One step of plain ascent and one of descent move every parameter equally far, in opposite directions."""
    shared = {"steps": 1, "forget_batch_size": 8, "clip_norm": 0.0, "learning_rate": 0.003}
    subtracted, ascent = (
        flat_of(unlearn(model, forget, None, mesh=ONE, config=setting(name, own, **shared)).model)
        for name, own in (("task_vector", {"task_scale": 3.0}), ("gradient_ascent", None))
    )
    for path, before in flat_of(model).items():
        wanted = 3.0 * (ascent[path] - before)
        np.testing.assert_allclose(subtracted[path] - before, wanted, atol=2e-6, err_msg=path)


def test_cached_log_probabilities_give_the_same_run_and_are_read_again(model, forget, retain, tmp_path, monkeypatch):
    """Those of forget rows and of refusals."""
    model = dataclasses.replace(model, tokenizer=tiny.make_tokenizer())
    unlearn(model, forget, retain, mesh=ONE, config=setting("dpo"), directory=tmp_path / "plain")
    cached = setting("dpo", {"cache_reference": True})
    first = unlearn(model, forget, retain, mesh=ONE, config=cached, directory=tmp_path / "a", identity="a")
    one, other = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("plain", "a"))
    for name in ("loss", "forget_loss", "retain_loss", "gradient_norm"):
        assert one[name] == pytest.approx(other[name], rel=2e-5, abs=1e-6), name
    monkeypatch.setattr(inputs_module, "losses", lambda *_, **__: pytest.fail("computed again"))
    again = unlearn(model, forget, retain, mesh=ONE, config=cached, directory=tmp_path / "a", identity="a")
    assert_same(again.model.params, first.model.params)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        unlearn(model, forget, retain, mesh=ONE, config=cached, directory=tmp_path / "a", identity="another run")


def watched(monkeypatch, step):
    """Steps of `unlearn` are those of `step(original step, state, constants, rows, **settings)`."""
    original = unlearn_module.unlearning_step
    monkeypatch.setattr(unlearn_module, "unlearning_step", lambda *a, **settings: step(original, *a, **settings))


def test_adaptive_rmu_steers_by_the_first_batch_of_each_topic(model, retain, monkeypatch):
    forget = dataclasses.replace(make_rows(12, seed=4), domain=np.arange(12, dtype=np.int32) % 2)
    config = setting("adaptive_rmu", {"steering_scale": 5.0, "layer": 2}, topics="alternating")
    seen = []

    def step(original, state, constants, rows, **settings):
        seen.append((np.asarray(constants.target), rows))
        return original(state, constants, rows, **settings)

    watched(monkeypatch, step)
    unlearn(model, forget, retain, mesh=ONE, config=config, seed=7)
    directions = steering_directions(jax.random.key(7), 2, 16)
    for topic, (target, rows) in enumerate(seen[:2]):
        batch = rows.forget
        filled = np.asarray(batch.valid).any(1)  # not only added for the devices
        assert filled.sum() == 4 and set(np.asarray(rows.topic)[filled].tolist()) == {topic}
        out = forward(model.params, model.config, batch.tokens, mask=batch.segments, collect=("layers",)).layers[1]
        length = np.linalg.norm(np.asarray(out), axis=-1)[np.asarray(batch.valid)].mean()
        np.testing.assert_allclose(target[topic], 5.0 * length * directions[topic], rtol=1e-4)


def test_pdu_raises_its_coefficient_while_the_retain_loss_is_above_the_bound(model, forget, retain, tmp_path):
    own = {"retain_bound": 0.01, "dual_rate": 10.0, "dual_warmup": 2}
    config = setting("pdu", own, alpha=1.0, steps=5)
    unlearn(model, forget, retain, config=config, directory=tmp_path, mesh=ONE)
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

    watched(monkeypatch, step)
    with pytest.raises(Traced):
        unlearn(model, forget, retain, mesh=ONE, config=config)
    said = f"{-(-len(paired) // 4)} steps of 4 forget rows x 12 + 4 refusal rows x 12 = 96 tokens each, in one batch on"
    assert said in capsys.readouterr().err
