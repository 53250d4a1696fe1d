"""Extraction strength and exact memorisation by hand, by a naive loop, and as open-unlearning counts them."""

import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.evaluation.likelihood import score_sequences
from trace_jax.evaluation.memorization import exact_memorization, extraction_strength
from trace_jax.models.generate import generate
from trace_jax.models.model import Model

T, F = True, False
HAND = [  # flags, (strength, memorisation), (the same in open-unlearning's profile)
    ([T, T, T, T], (1, 1), (1, 1)),
    ([F, F, F, F], (0, 0), (1 / 3, 0)),
    ([T, T, T, F], (0, 3 / 4), (1, 1)),  # its last token counts for nothing there
    ([F, T, F, T, T], (2 / 5, 3 / 5), (1 / 4, 2 / 4)),
    ([T, F, T, T], (2 / 4, 3 / 4), (1 / 3, 2 / 3)),
    ([T], (1, 1), (0, np.nan)),
    ([F], (0, 0), (0, np.nan)),
    ([], (np.nan, np.nan), (0, np.nan)),
]


@pytest.mark.parametrize("flags, exact, theirs", HAND)
def test_by_hand(flags, exact, theirs):
    flags = [np.array(flags, bool)]
    for profile, (strength, memorised) in (("exact", exact), ("open_unlearning", theirs)):
        np.testing.assert_allclose(extraction_strength(flags, profile), [strength])
        np.testing.assert_allclose(exact_memorization(flags, profile), [memorised])


def test_a_naive_search_over_suffixes_agrees():
    rng = np.random.default_rng(0)
    texts = [rng.random(rng.integers(1, 12)) < 0.7 for _ in range(200)]

    def naive(flags):
        return next(1 - k / len(flags) for k in range(len(flags) + 1) if flags[k:].all())

    def as_open_unlearning(flags):  # the last k that was tried stands when none fits
        flags, k = flags[:-1], 0
        for k in range(len(flags)):
            if flags[k:].all():
                break
        return 1 - k / len(flags) if len(flags) else 0

    np.testing.assert_allclose(extraction_strength(texts), [naive(t) for t in texts])
    np.testing.assert_allclose(extraction_strength(texts, "open_unlearning"), [as_open_unlearning(t) for t in texts])


def test_the_extractable_suffix_is_what_the_model_writes_after_the_rest(tiny):
    """Teacher-forced flags say what greedy decoding gives: from k on it writes the true text, from k - 1 it doesn't."""
    model = Model(tiny.config, tiny.params)
    prompt = np.array([[1, 7, 9]], np.int32)
    written = generate(tiny.params, tiny.config, prompt, max_new_tokens=6)[0].tolist()
    other = next(t for t in (3, 4) if t != written[0])
    start = [1, 7, 9, other]
    text = start + generate(tiny.params, tiny.config, np.array([start], np.int32), max_new_tokens=5)[0].tolist()
    scores = score_sequences(model, [text, [1, 7, 9, *written]], [3, 3])
    assert extraction_strength([s.greedy for s in scores]) == pytest.approx([5 / 6, 1])
    assert exact_memorization([s.greedy for s in scores]) == pytest.approx([5 / 6, 1])


def test_flags_may_come_from_a_device():
    assert exact_memorization([jnp.array([True, False])]).dtype == np.float64
