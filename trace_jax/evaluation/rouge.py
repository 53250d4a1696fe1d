"""ROUGE between texts, by the package `rouge-score` (Google's, which MUSE, TOFU and open-unlearning use)."""

from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer


def rouge_l(predictions: Sequence[str], references: Sequence[str], *, stem: bool = False) -> np.ndarray:
    """ROUGE-L F-measure of each prediction against its reference, f64 [N] in 0..1; 0 where one of them has no word.

    Words are runs of a-z and 0-9 in lower case, so that white space and punctuation don't count.

    Args:
      stem: whether Porter's stemmer shortens words of more than three letters first.
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stem)
    return np.array([scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)])


def rouge_recalls(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-1 and ROUGE-L recall with stemmer of each prediction, f64 [N, 2] in 0..1; 0 where nothing is predicted."""
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return np.array([[one["rouge1"].recall, one["rougeL"].recall] for one in scores]).reshape(-1, 2)
