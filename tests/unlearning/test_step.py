"""The compiled step against a plain gradient of the same formula; the same numbers on any number of devices.

What an objective makes of its inputs is proved in `test_objectives` and tests/models/test_loss.py. Here one
objective stands for all that look at the same things.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny
from tests.unlearning.conftest import ONE, in_bfloat16
from trace_jax.data.rows import with_refusals
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.models.decoder import forward
from trace_jax.models.sharding import placed_params
from trace_jax.parallel.mesh import BATCH_AXES, PLAIN, make_mesh, place, to_host
from trace_jax.unlearning import unlearn as unlearn_module
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.inputs import StepRows, pad_rows
from trace_jax.unlearning.losses import Constants, StepSettings, coefficients
from trace_jax.unlearning.objectives import ForgetInputs, Objective, Refusing
from trace_jax.unlearning.optimizer import TrainingConfig
from trace_jax.unlearning.step import initial_state, set_up, train, training_step, unlearning_step

CASES = [
    ({"name": "gradient_ascent"}, "none"),
    ({"name": "gradient_difference"}, "nll"),
    ({"name": "npo"}, "kl"),
    ({"name": "dpo"}, "hidden"),
    ({"name": "rmu", "form": "wmdp"}, "hidden"),
    ({"name": "flat", "form": "released"}, "none"),
    ({"name": "rmu", "form": "open_unlearning"}, "kl"),
    ({"name": "undial"}, "kl"),
    ({"name": "simnpo", "form": "muse_logits", "beta": 0.5}, "nll"),
]
TARGETS = np.random.default_rng(5).uniform(size=(2, 16)).astype(np.float32)


def setting(objective, retain_loss, **changes):
    alpha = {} if retain_loss == "none" else {"alpha": 3.0}
    return UnlearningConfig(
        objective={"gamma": 0.5, **objective}, retain_loss=retain_loss, learning_rate=0.01, clip_norm=0.0,
        trainable="all", **alpha, **changes,
    )  # fmt: skip


def whole_vocabulary(objective, logits, reference, targets, c):
    """Losses of more than the target's probability, from whole logits [B, S, V]."""
    if objective.name == "simnpo":
        return (2 / c["beta"] * jnp.log1p(jnp.exp(-c["beta"] * (-logits - c["delta"])))).mean(-1)
    scores = reference - c["beta"] * jax.nn.one_hot(targets, logits.shape[-1])
    return -(jax.nn.softmax(jax.lax.stop_gradient(scores)) * jax.nn.log_softmax(logits)).sum(-1)


def plain_outputs(flat, model_config, rows):
    """{part: (logits [B, S, V], outputs of all layers [L, B, S, D])} of whole forward passes, one for each part."""

    def outputs(batch):
        out = forward(unflatten(flat), model_config, batch.tokens, mask=batch.segments, collect=("logits", "layers"))
        return out.logits, out.layers

    return {name: outputs(getattr(rows, name)) for name in ("forget", "retain", "refusals")}


def plain_loss(current, original, config, rows):
    """method.md's formula written once more, from `plain_outputs` of the model and of the original one."""

    def parts(outputs, name):
        (logits, layers), tokens = outputs[name], getattr(rows, name).tokens
        targets = jnp.roll(jnp.asarray(tokens), -1, axis=1)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return nll, logits, layers[(config.layer or 1) - 1], targets

    c, objective, forget = coefficients(config), config.objective, rows.forget
    nll, logits, hidden, targets = parts(current, "forget")
    reference_nll, reference_logits, _, _ = parts(original, "forget")
    refused, refused_before = (parts(outputs, "refusals")[0] for outputs in (current, original))
    whole = "logits" in objective.needs
    special = whole_vocabulary(objective, logits, reference_logits, targets, c) if whole else None
    inputs = ForgetInputs(
        jnp.asarray(forget.valid), jnp.asarray(forget.segments), nll, reference_nll, hidden, TARGETS[rows.topic],
        special, jnp.asarray(rows.refusals.valid), jnp.asarray(rows.refusals.segments), refused, refused_before,
    )  # fmt: skip
    counts = objective.counts(inputs).astype(jnp.float32)
    means = jnp.where(counts > 0, objective.loss(inputs), 0.0).sum((-2, -1)) / counts.sum()
    loss = c["gamma"] * objective.of_means(means, 1)
    if not config.retains:
        return loss
    nll_r, logits_r, hidden_r, _ = parts(current, "retain")
    _, reference_r, hidden_ref, _ = parts(original, "retain")
    log_p, log_ref = jax.nn.log_softmax(logits_r), jax.nn.log_softmax(reference_r)
    per_token = {
        "nll": nll_r,
        "kl": (jnp.exp(log_ref) * (log_ref - log_p)).sum(-1),
        "hidden": ((hidden_r - hidden_ref) ** 2).mean(-1),
    }[config.retain_loss.name]
    valid, weights = rows.retain.valid, rows.weights
    if getattr(objective, "form", "") == "wmdp":  # all positions, those without a weight at 1
        valid, weights = np.ones_like(valid), np.where(valid, weights, np.float32(1))
    return loss + c["alpha"] * jnp.where(valid, weights * per_token, 0.0).sum() / valid.sum().astype(np.float32)


def moved(flat, away=0.05):
    """Parameters a little away from the reference, so that no retain term vanishes."""
    keys = jax.random.split(jax.random.key(7), len(flat))
    pairs = zip(keys, flat.items(), strict=True)
    return {path: leaf + np.float32(away) * jax.random.normal(key, leaf.shape) for key, (path, leaf) in pairs}


def gradient_of_step(config, model, rows, mesh=ONE, *, parallel=PLAIN, online=None, away=0.05):
    """(metrics, gradient) of the compiled step, read off the first moments of Adam."""
    training = flatten(placed_params(model.params, model.config, mesh))
    settings, constants, _ = set_up(training, config, model.config, selected=None, parallel=parallel, mesh=mesh)
    constants = constants._replace(target=TARGETS if "hidden" in config.objective.needs else None, online=online)
    constants = Constants(training, *place(constants[1:], mesh))
    if not config.retains:
        rows = dataclasses.replace(rows, retain=None, weights=None)
    rows = place(pad_rows(rows, mesh.size), mesh, P(BATCH_AXES))
    state = initial_state(moved(training, away), settings, mesh)
    state, metrics = unlearning_step(state, constants, rows, settings=settings, mesh=mesh)
    first_moment = next(s for s in state.optimizer if hasattr(s, "mu")).mu
    metrics, first_moment = to_host((metrics, first_moment))
    return jax.tree.map(float, metrics), {path: moment / np.float32(0.1) for path, moment in first_moment.items()}


@pytest.fixture(scope="module")
def rows(forget, retain):
    """Forget rows paired with refusals, of two topics; retain rows with uneven weights."""
    paired, refused = with_refusals(forget, [np.array([5, 7, 2], np.int32), np.array([9, 2], np.int32)])
    weights = np.random.default_rng(3).exponential(size=retain.tokens.shape).astype(np.float32)
    forget, refused, retain = (r.batch(np.arange(len(r))) for r in (paired, refused, retain))
    topic = np.arange(len(forget.tokens), dtype=np.int32) % 2
    return StepRows(forget, retain, weights, topic, refused)


@pytest.fixture(scope="module")
def plain(model, rows):
    """(outputs of the model, of the original one, from a gradient by the first to one by parameters)."""
    start = flatten(model.params)
    outputs = jax.jit(lambda flat: plain_outputs(flat, model.config, rows))
    pull_back = jax.jit(lambda flat, cotangent: jax.vjp(outputs, flat)[1](cotangent)[0])
    return outputs(moved(start)), outputs(start), lambda cotangent: pull_back(moved(start), cotangent)


@pytest.fixture(scope="module")
def steps(model, rows):
    """Metrics and gradient of each case's step, by objective and retain loss."""
    settings = {(*objective.values(), retain): setting(objective, retain) for objective, retain in CASES}
    return {case: gradient_of_step(config, model, rows) for case, config in settings.items()}


@pytest.mark.parametrize(("objective", "retain_loss"), CASES, ids=str)
def test_gradient_equals_plain_formula(steps, rows, plain, objective, retain_loss):
    metrics, gradient = steps[*objective.values(), retain_loss]
    current, original, pull_back = plain
    config = setting(objective, retain_loss)
    value, by_outputs = jax.value_and_grad(lambda c: plain_loss(c, original, config, rows))(current)
    assert metrics["loss"] == pytest.approx(float(value), rel=2e-5)
    for path, wanted in pull_back(by_outputs).items():
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(gradient[path], wanted, atol=5e-5 * scale, err_msg=path)


def test_normalize_batch_divides_by_the_weights_and_empty_rows_change_nothing(model, rows, steps):
    count = steps["npo", "kl"][0]
    padded = pad_rows(rows, 5)
    added = len(padded.retain.tokens) - len(rows.retain.tokens)
    assert added and not padded.retain.valid[-added:].any() and not padded.weights[-added:].any()
    batch = gradient_of_step(setting({"name": "npo"}, "kl", normalize="batch"), model, padded)[0]
    valid = rows.retain.valid
    assert batch["retain_loss"] == pytest.approx(count["retain_loss"] * valid.sum() / rows.weights[valid].sum())
    assert batch["forget_loss"] == pytest.approx(count["forget_loss"], rel=1e-5)


def test_same_gradient_on_four_devices(model, rows, steps):
    """Rows and vocabulary are split; `tests/parallel/test_mesh.py` has other meshes."""
    one = steps["undial", "kl"]
    many = gradient_of_step(setting({"name": "undial"}, "kl"), model, rows, make_mesh(jax.devices()[:4], tensor=2))
    assert many[0] == pytest.approx(one[0], rel=1e-5)
    for path in one[1]:
        scale = max(1.0, float(np.abs(one[1][path]).max()))
        np.testing.assert_allclose(many[1][path], one[1][path], atol=5e-5 * scale, err_msg=path)


class Traced(Exception):
    """Stands for the end of a run whose step is traced and not compiled."""


@pytest.mark.parametrize("name", [name for name in Objective.kinds if name != "repselect"])  # its steps are others
def test_every_objective_gets_what_it_looks_at_also_in_bfloat16(model, forget, retain, monkeypatch, name):
    """Types and ranks are strict, so that a step that can be traced mixes none."""
    half = dataclasses.replace(in_bfloat16(model), tokenizer=tiny.make_tokenizer())

    def step(state, constants, rows, **settings):
        state, metrics = jax.eval_shape(lambda *a: unlearning_step(*a, **settings), state, constants, rows)
        assert {leaf.dtype for leaf in state.trainable.values()} == {jnp.dtype("float32")}
        assert {"loss", "forget_loss", "gradient_norm"} <= set(metrics)
        raise Traced

    monkeypatch.setattr(unlearn_module, "unlearning_step", step)
    refusals = {"refusals": ("w7",)} if issubclass(Objective.kinds[name], Refusing) else {}
    unlearning = UnlearningConfig(objective={"name": name, **refusals})
    with pytest.raises(Traced):
        unlearn_module.unlearn(half, forget, retain, mesh=ONE, config=unlearning)


def test_training_learns_and_is_the_same_on_four_devices(model, retain):
    config = TrainingConfig(steps=20, learning_rate=0.01, warmup_steps=0, schedule="constant")
    settings, losses = StepSettings(model.config, config.optimization, config.steps), {}
    for devices in (1, 4):
        mesh = make_mesh(jax.devices()[:devices])
        state = initial_state(flatten(model.params), settings, mesh)
        batch, losses[devices] = retain.batch(np.arange(16)), []
        for _ in range(10):
            state, metrics = training_step(state, batch, settings=settings, load_balance=0.01, mesh=mesh)
            losses[devices].append(float(metrics["loss"]))
    assert losses[1][-1] < losses[1][0] - 0.3
    # Later steps may differ more: a rounding difference that flips one routing decision is amplified by training.
    assert losses[4][:4] == pytest.approx(losses[1][:4], rel=1e-4)


def test_a_model_trained_on_rows_knows_them_and_is_the_same_again():
    """Rows without structure are learnt by heart, to far below the loss of a guess, log V."""
    rows, training = tiny.make_rows(8), TrainingConfig(steps=60, batch_size=8, warmup_steps=5, load_balance=0.0)
    one, again = (train(tiny.CONFIG, rows, config=training, mesh=ONE, verbose=False) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one.params, again.params)
    logits = forward(one.params, one.config, rows.tokens, mask=rows.segments).logits
    nll = -jax.nn.log_softmax(logits)[:, :-1]
    nll = np.take_along_axis(np.asarray(nll), rows.tokens[:, 1:, None], axis=-1)[..., 0]
    assert nll[rows.valid[:, :-1]].mean() < np.log(tiny.CONFIG.vocab_size) / 4
    with pytest.raises(ValueError, match="the rows hold the id 64, and the model knows 0 to 63"):
        train(tiny.CONFIG, dataclasses.replace(rows, tokens=np.full_like(rows.tokens, 64)))
