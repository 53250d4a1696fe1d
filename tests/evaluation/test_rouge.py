"""ROUGE-L: golden values."""

import pytest

from trace_jax.evaluation.rouge import rouge_l


def test_golden_values():
    references = ["the people of the United States", "the people of the United States", "one two three"]
    predictions = ["the people of Texas", "the people of the United States", "four five"]
    # Longest common subsequence "the people of" (3 words), precision 3/4, recall 3/6: F = 0.6.
    assert rouge_l(predictions, references) == pytest.approx([0.6, 1.0, 0.0])


def test_words_are_stemmed_only_if_asked():
    assert rouge_l(["nations"], ["nation"]).tolist() == [0.0]
    assert rouge_l(["nations"], ["nation"], stem=True).tolist() == [1.0]


def test_a_text_without_words_scores_nothing():
    assert rouge_l(["", "...", "a"], ["a", "a", ""]).tolist() == [0.0, 0.0, 0.0]
