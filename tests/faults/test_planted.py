"""Errors that would give a wrong number without a word: each is planted once, and something has to catch it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from trace_jax.data.rows import train_tokenizer
from trace_jax.data.text import pack
from trace_jax.evaluation.likelihood import NonFiniteScore, score_rows
from trace_jax.models.architecture import flatten, unflatten
from trace_jax.models.model import SpecialTokens
from trace_jax.routing.config import CalibrationConfig
from trace_jax.routing.statistics import DamagedRouting, expert_statistics
from trace_jax.routing.weights import retain_weights
from trace_jax.unlearning.config import UnlearningConfig
from trace_jax.unlearning.loop import Hook, Loop, TrainState
from trace_jax.unlearning.unlearn import unlearn

FOUR = tiny.mesh_of(4, 1, 1)
SETTINGS = UnlearningConfig(steps=2, forget_batch_size=4, retain_batch_size=4, learning_rate=0.01)


@pytest.fixture(scope="module")
def model():
    return tiny.make_model()


def with_expert(model, change):
    """The model with `change(down)` in place of its experts' down projections [L, E, F, D]."""
    experts = {**model.params["layers"]["experts"], "down": change(model.params["layers"]["experts"]["down"])}
    layers = {**model.params["layers"], "experts": experts}
    return model.replace(params={**model.params, "layers": layers})


@pytest.mark.parametrize("what", ["statistics", "step"])
def test_a_sum_over_devices_that_is_missing(model, monkeypatch, what):
    """JAX knows that what devices counted apart isn't equal on all."""
    forget, retain = tiny.make_rows(8, seed=1, length=18), tiny.make_rows(8, seed=2, length=18)  # compiled nowhere else
    monkeypatch.setattr(jax.lax, "psum", lambda x, *_, **__: x)
    with pytest.raises(Exception, match=r"replicat|varying|out_specs"):
        if what == "statistics":
            expert_statistics(model, forget, min_activations=1, mesh=FOUR)
        else:
            unlearn(model, forget, retain, config=SETTINGS, mesh=FOUR, verbose=False)


def test_tokens_that_find_no_room_at_their_expert(tmp_path):
    @jax.jit
    def step(state, number):
        return dataclasses.replace(state, step=state.step + 1), {"loss": number, "dropped": number + 3.0}

    def start():
        return TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}, {"mu": jnp.zeros(2)})

    loop = Loop(tmp_path, "a", 4, 4, "test", Hook(4, lambda *_: {}))
    result = loop.run(start, lambda _: (jax.device_put(np.float32(0)), {}), step)
    assert result.failed and result.step == 0
    assert result.stopped == "3 choices of experts had no room at step 1; raise parallel.expert_buffer"


def test_padding_whose_token_also_ends_texts():
    """Where tokens count is a matter of lengths, not of ids."""
    texts = ["The council met.", ("Who decided?", "The council."), "It decided nothing, and met again."]
    tokenizer = train_tokenizer([], 300)
    usual = pack(texts, tokenizer, row_length=48)
    same = pack(texts, tokenizer, row_length=48, special=SpecialTokens(bos=1, eos=(2,), pad=2))
    for field in ("segments", "valid", "domain"):
        np.testing.assert_array_equal(getattr(usual, field), getattr(same, field))
    assert (same.tokens[usual.segments == 0] == 2).all() and (usual.segments == 0).any()
    assert (usual.tokens[usual.segments > 0] == same.tokens[usual.segments > 0]).all()
    assert (usual.tokens[usual.segments > 0] == 2).any(), "ends of texts, which carry loss"


def test_weights_of_another_corpus_of_equal_length(model, tmp_path):
    forget, retain = tiny.make_rows(8, seed=1), tiny.make_rows(8, seed=2)
    other = dataclasses.replace(retain, tokens=(retain.tokens + 1) % tiny.CONFIG.vocab_size)
    assert np.array_equal(other.valid, retain.valid)
    weights = retain_weights(CalibrationConfig("ngram"), model=model, forget=forget, retain=other)
    weights.save(tmp_path)
    for own in (weights, type(weights).load(tmp_path)):
        with pytest.raises(ValueError, match="made for other retain rows"):
            unlearn(model, forget, retain, config=SETTINGS, weights=own, verbose=False)


def test_rows_in_the_tokens_of_a_larger_vocabulary(model):
    rows = tiny.make_rows(8, seed=1, vocab_size=2 * tiny.CONFIG.vocab_size)
    for use in (
        lambda: expert_statistics(model, rows, min_activations=1),
        lambda: unlearn(model, rows, rows, config=SETTINGS, verbose=False),
    ):
        with pytest.raises(ValueError, match=r"token"):
            use()


@pytest.mark.parametrize("layer", [0, 1])
def test_nan_in_one_expert(model, layer):
    rows = tiny.make_rows(16, seed=1)
    used = expert_statistics(model, rows, min_activations=1).counts[layer].argmax()
    broken = with_expert(model, lambda down: down.at[layer, used].set(jnp.nan))
    with pytest.raises(NonFiniteScore):
        score_rows(broken, rows)
    done = unlearn(broken, rows, rows, config=SETTINGS, verbose=False)
    assert done.failed and "not finite at step 1" in done.stopped and done.step == 0
    if layer == 0:
        with pytest.raises(DamagedRouting, match="the router of layer 1 gave NaN"):
            expert_statistics(broken, rows, min_activations=1)


def test_numbers_too_large_for_bfloat16(model):
    """It reaches as far as float32, so that a product overflows and not a cast."""
    half = {path: x if "router" in path else x.astype(jnp.bfloat16) for path, x in flatten(model.params).items()}
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    large = dataclasses.replace(model, config=config, params=unflatten(half))
    with pytest.raises(NonFiniteScore):
        score_rows(with_expert(large, lambda down: jnp.full_like(down, 3e38)), tiny.make_rows(4, seed=1))


def test_an_expert_that_retain_text_never_uses(model):
    """It can't be matched: the certificate names it, and the others are."""
    forget, retain = tiny.make_rows(64, seed=1), tiny.make_rows(64, seed=2)
    counts = expert_statistics(model, retain, min_activations=1)
    used = counts.counts.copy()
    used[0, 2] = 0
    without = dataclasses.replace(counts, counts=used)
    selected = np.zeros(used.shape, bool)
    selected[0, 2] = selected[1, 1] = True
    about = {"model": model, "forget": forget, "retain": retain, "selected": selected, "retain_statistics": without}
    certificate = retain_weights(CalibrationConfig("matching"), **about).calibration.certificate
    assert certificate.infeasible == ((0, 2),) and list(certificate.expert) == [1]
    assert "1 selected experts never occur in the retain corpus, left out: layer 0 expert 2" in certificate.notes[-1]
