"""Every objective through `unlearn`, in bfloat16: finite, and weights of one are no weights, bit for bit."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unlearning.conftest import make_rows
from trace_jax.config import ConfigError
from trace_jax.data.rows import encode_refusals, with_refusals
from trace_jax.io.files import read_lines
from trace_jax.models.arrays import flatten, unflatten
from trace_jax.models.decoder import forward
from trace_jax.parallel.mesh import make_mesh
from trace_jax.routing.weights import RetainWeights
from trace_jax.unlearning import reference
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.objectives import Objective, Refusing, steering_directions
from trace_jax.unlearning.unlearn import unlearn

ONE = make_mesh(jax.devices()[:1])


class Words:
    """A tokenizer that knows two words."""

    def encode_batch(self, texts, add_special_tokens=True):
        assert not add_special_tokens
        return [SimpleNamespace(ids=[5 + len(word) for word in text.split()]) for text in texts]


@pytest.fixture(scope="module")
def half(model):
    """The model with weights in bfloat16 (the router stays in float32)."""
    params = unflatten({k: v if "router" in k else v.astype(jnp.bfloat16) for k, v in flatten(model.params).items()})
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, dtype="bfloat16"), params=params, tokenizer=Words()
    )


def setting(name, own=None, **changes):
    """own: settings of the objective."""
    refusals = {"refusals": ("No.",)} if issubclass(Objective.kinds[name], Refusing) else {}
    base = {"steps": 3, "forget_batch_size": 4, "retain_batch_size": 8, "learning_rate": 0.01}
    return UnlearningConfig(objective={"name": name, **refusals, **(own or {})}, **base | changes)


def flat_of(unlearned):
    return {path: np.asarray(leaf, np.float32) for path, leaf in flatten(unlearned.model.params).items()}


@pytest.mark.parametrize("objective", Objective.kinds)
def test_finite_and_weights_of_one_are_no_weights(half, forget, retain, objective, tmp_path):
    config = setting(objective)
    weights = RetainWeights(np.ones(retain.valid.sum()), retain.valid)
    plain = unlearn(half, forget, retain, mesh=ONE, config=config, directory=tmp_path)
    weighted = unlearn(half, forget, retain, mesh=ONE, config=config, weights=weights)
    assert not plain.stopped and plain.step == 3
    for row in read_lines(tmp_path / "metrics.jsonl"):
        assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
    before = flatten(half.params)
    one, other = flat_of(plain), flat_of(weighted)
    assert any((one[path] != np.asarray(before[path], np.float32)).any() for path in one)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def test_a_task_vector_is_what_was_learnt_times_minus_the_scale(model, forget):
    """One step of plain ascent and one of descent move every parameter equally far, in opposite directions."""
    shared = {"steps": 1, "forget_batch_size": 8, "clip_norm": 0.0, "learning_rate": 0.003}
    subtracted = unlearn(model, forget, None, config=setting("task_vector", {"task_scale": 3.0}, **shared))
    ascent = unlearn(model, forget, None, mesh=ONE, config=setting("gradient_ascent", **shared))
    before = {path: np.asarray(leaf) for path, leaf in flatten(model.params).items()}
    for path, leaf in flat_of(ascent).items():
        np.testing.assert_allclose(
            flat_of(subtracted)[path] - before[path], 3.0 * (leaf - before[path]), atol=2e-6, err_msg=path
        )


@pytest.mark.parametrize("objective", ["npo", "dpo"])
def test_cached_log_probabilities_give_the_same_run_and_are_read_again(
    model, forget, retain, objective, tmp_path, monkeypatch
):
    model = dataclasses.replace(model, tokenizer=Words())
    unlearn(model, forget, retain, mesh=ONE, config=setting(objective), directory=tmp_path / "plain")
    cached = setting(objective, {"cache_reference": True})
    first = unlearn(model, forget, retain, mesh=ONE, config=cached, directory=tmp_path / "a", identity="a")
    one, other = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("plain", "a"))
    for name in ("loss", "forget_loss", "retain_loss", "gradient_norm"):
        assert one[name] == pytest.approx(other[name], rel=2e-5, abs=1e-6), name
    with np.load(tmp_path / "a" / "reference.npz") as arrays:
        assert ("refusal_nll" in arrays.files) == (objective == "dpo")
    monkeypatch.setattr(reference, "losses", lambda *_, **__: pytest.fail("computed again"))
    again = unlearn(model, forget, retain, mesh=ONE, config=cached, directory=tmp_path / "a", identity="a")
    for path, leaf in flat_of(first).items():
        np.testing.assert_array_equal(flat_of(again)[path], leaf)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        unlearn(model, forget, retain, mesh=ONE, config=cached, directory=tmp_path / "a", identity="another run")


def test_adaptive_rmu_steers_by_the_first_batch_of_each_topic(model, retain, monkeypatch):
    forget = dataclasses.replace(make_rows(12, seed=4), domain=np.arange(12, dtype=np.int32) % 2)
    config = setting("adaptive_rmu", {"steering_scale": 5.0, "layer": 2}, topics="alternating")
    seen = []
    from trace_jax.unlearning import unlearn as module

    step = module.unlearning_step

    def watched(state, constants, rows, **settings):
        seen.append((constants.target, rows))
        return step(state, constants, rows, **settings)

    monkeypatch.setattr(module, "unlearning_step", watched)
    unlearn(model, forget, retain, mesh=ONE, config=config, seed=7)
    target = np.asarray(seen[0][0])
    directions = steering_directions(jax.random.key(7), 2, 16)
    for topic, (_, rows) in enumerate(seen[:2]):
        batch = rows.forget
        filled = np.asarray(batch.valid).any(1)  # not only added for the devices
        assert filled.sum() == 4 and set(np.asarray(rows.topic)[filled].tolist()) == {topic}
        out = forward(model.params, model.config, batch.tokens, mask=batch.segments, collect=("layers",)).layers[1]
        length = np.linalg.norm(np.asarray(out), axis=-1)[np.asarray(batch.valid)].mean()
        np.testing.assert_allclose(target[topic], 5.0 * length * directions[topic], rtol=1e-4)


def test_pdu_raises_its_coefficient_while_the_retain_loss_is_above_the_bound(model, forget, retain, tmp_path):
    own = {"retain_bound": 0.01, "dual_rate": 10.0, "dual_warmup": 2}
    config = setting("pdu", own, alpha=1.0, steps=5, retain_batch_size=16)
    unlearn(model, forget, retain, config=config, directory=tmp_path, mesh=ONE)
    rows = [row for row in read_lines(tmp_path / "metrics.jsonl") if "loss" in row]
    alphas, losses = ([row[name] for row in rows] for name in ("alpha", "retain_loss"))
    assert alphas[:3] == [1.0, 1.0, 1.0]
    for now, loss, following in zip(alphas[2:], losses[2:], alphas[3:], strict=False):
        assert following == pytest.approx(max(0.0, now + 10.0 * (loss - 0.01)), rel=1e-5)
    assert alphas[-1] > 1.0


def test_settings_that_contradict_each_other_are_refused(model, forget, retain):
    for settings, message in (
        ({"objective": {"name": "npo", "form": "wmdp"}}, "form is 'wmdp'; expected one of paper, gemma, muse_logits"),
        ({"objective": "pdu", "retain_loss": "none"}, "needs one"),
        ({"objective": "pdu", "retain_loss": "nll"}, "retain_bound is needed"),
        ({"objective": {"name": "wga", "delta": 0.1}}, "delta would have no effect: it belongs to simnpo"),
        ({"objective": {"name": "idk", "refusals": ()}}, "refusals holds no text"),
        ({"objective": {"name": "rmu", "layer": 2}, "retain_loss": {"name": "hidden", "layer": 1}}, "steers layer 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            UnlearningConfig(**settings)
    with pytest.raises(ConfigError, match="need a tokenizer"):
        unlearn(model, forget, retain, config=setting("idk"))
    with pytest.raises(ConfigError, match="has a retain term"):
        unlearn(model, forget, None, config=setting("npo"))


def test_an_epoch_is_of_the_rows_that_the_objective_reads(model, retain, capsys):
    """Documents paired with refusals need room for the longer side, so there may be more rows than before."""
    forget = make_rows(9, seed=5)
    model = dataclasses.replace(model, tokenizer=Words())
    longer = ("No no no no no.",)  # six tokens with the end mark, half a row
    paired, _ = with_refusals(forget, encode_refusals(longer, model.tokenizer, model.special))
    assert len(paired) > len(forget)
    config = setting("idk", {"refusals": longer}, steps=None, epochs=1.0, retain_loss="none")
    unlearned = unlearn(model, forget, retain, mesh=ONE, config=config)
    assert unlearned.step == unlearned.steps == -(-len(paired) // 4)
    assert "4 forget rows x 12 + 4 refusal rows x 12 = 96 tokens each" in capsys.readouterr().err
