"""MUSE's four scores (2407.06460) from what a model wrote and how likely it found texts.

Two programs compute them and differ in every score. Each is followed to the letter, as a profile of its own:

  "muse"             github.com/swj0419/muse_bench at fcd6651 (metrics/{verbmem,knowmem,privleak,logger}.py, eval.py)
  "open_unlearning"  github.com/locuslab/open-unlearning at d3d7cf9 (src/evals/metrics/{utils,privacy,mia/*}.py,
                     src/data/{utils,qa,pretraining}.py, configs/eval/muse_metrics, configs/model/Llama-2-7b-hf.yaml)

Numbers of the two can't be compared with each other. Everything here is on outputs; `muse_task` makes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from trace_jax.evaluation import intervals
from trace_jax.evaluation.intervals import Interval
from trace_jax.evaluation.rouge import rouge_l

VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32  # new tokens at most
STOPS = ("\n\n", "\nQuestion", "Question:")  # what ends an answer
MIN_K = 0.4
AUC_UNTRAINED = 0.5  # of a model that can't tell forget from holdout texts

# What transformers makes of decoded text with clean_up_tokenization_spaces=True, in this order.
_CLEANED = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't"}
_CLEANED |= {" 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the two evaluators differ.

    Attributes:
      prefix: of its measurements' names.
      scale: of VerbMem and KnowMem, as it prints them.
      stem: whether ROUGE stems words.
      member_is_high: direction of the AUC: near 1 for a model that remembers the forget texts, or near 0.
    """

    name: str
    prefix: str
    scale: float
    stem: bool
    member_is_high: bool


PROFILES = {
    "muse": Profile("muse", "muse_", scale=100.0, stem=False, member_is_high=False),
    "open_unlearning": Profile("open_unlearning", "muse_ou_", scale=1.0, stem=True, member_is_high=True),
}


# --- texts


def knowmem_prompt(question: str, examples: Sequence[tuple[str, str]]) -> str:
    """All (question, answer) `examples`, then the question; it ends in "Answer: ", with the space. In both profiles."""
    before = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples)
    return f"{before}Question: {question}\nAnswer: "


def clean_up(decoded: str) -> str:
    """Decoded tokens as both evaluators read them: without the spaces that English doesn't have, such as " n't"."""
    for old, new in _CLEANED.items():
        decoded = decoded.replace(old, new)
    return decoded


def prediction(decoded: str, profile: Profile, *, stops: Sequence[str] = (), end: str = "") -> str:
    """What is scored of the new tokens, decoded without special tokens.

    Args:
      stops: the text is cut at the first of them; `STOPS` in KnowMem, none in VerbMem.
      end: the end token as text; open-unlearning cuts there too, should it be written out.
    """
    text = clean_up(decoded)
    if profile.name == "muse":
        return _cut(text, stops)
    return _cut(text, (end, *stops) if end else stops).strip()


def truth_after(prompt: str, whole: str) -> str:
    """open-unlearning's ground truth: the decoded labels without the decoded prompt, wherever it stands in them.

    Where decoding makes other text of the prompt alone than of both together, nothing is taken away.
    """
    return clean_up(whole).replace(clean_up(prompt), "").strip()


def rouge_scores(predictions: Sequence[str], truths: Sequence[str], profile: Profile) -> np.ndarray:
    """What VerbMem and KnowMem are the mean of, f64 [N]: ROUGE-L F-measure on the profile's scale."""
    return profile.scale * rouge_l(predictions, truths, stem=profile.stem)


def _cut(text: str, words: Sequence[str]) -> str:
    for word in words:
        text = text.split(word)[0]
    return text


# --- PrivLeak


def min_k_score(log_prob: np.ndarray, profile: Profile) -> float:
    """Min-40 % Prob (2310.16789) of one text: minus the mean of the lowest int(0.4 n) of n log-probabilities.

    At least one counts. For texts of one or two tokens that is open-unlearning's rule, and MUSE's code has no value;
    for texts without a scored token 0 is open-unlearning's value, and MUSE's code has none.

    Args:
      log_prob: [n] of every token but the first, nats. open-unlearning leaves out the last one, and computes in
        float32, where more texts tie.
    """
    if profile.name == "muse":
        values = np.asarray(log_prob, np.float64)
    else:
        values = np.asarray(log_prob, np.float32)[:-1]
    lowest = np.sort(values)[: max(1, int(len(values) * MIN_K))]
    return float(-np.mean(lowest)) if len(lowest) else 0.0


def privleak_auc(
    forget: np.ndarray, holdout: np.ndarray, profile: Profile, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """AUC between `min_k_score`s f64 [F] of forget and [H] of holdout texts, with the profile's direction; ties count
    one half. MUSE labels holdout texts 1 and feeds in the negative score; open-unlearning feeds in the score."""
    positive, negative = _oriented(forget, holdout, profile)
    return intervals.bootstrap_auc(positive, negative, resamples=resamples, seed=seed)


def privleak(
    scores: tuple[np.ndarray, np.ndarray],
    retrained: tuple[np.ndarray, np.ndarray] | None,
    profile: Profile,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """Relative distance of the AUC (in MUSE's direction) from the retrained model's, percent.

    Args:
      scores, retrained: `min_k_score`s of (forget, holdout) texts, of the model and of the one that was retrained
        without the forget set, on the same texts; the bootstrap draws the same texts for both. Without a retrained
        model open-unlearning takes 1/2; MUSE has constants for its own models, which say nothing of others.

    Returns:
      The interval, or None where MUSE's definition has no value: no retrained model, or one whose AUC is zero.
    """
    if retrained is not None and [len(x) for x in scores] != [len(x) for x in retrained]:
        raise ValueError("PrivLeak compares two models on the same texts; the numbers of texts differ.")
    if retrained is None and profile.name == "muse":
        return None
    models = [_oriented(*scores, profile)] + ([_oriented(*retrained, profile)] if retrained is not None else [])
    values = [intervals.auc(*sides) for sides in models] + [AUC_UNTRAINED]
    value = float(_relative(np.array(values[0]), np.array(values[1]), profile))
    if not math.isfinite(value):
        return None
    n = sum(len(x) for x in scores)
    if min(len(x) for x in scores) < 2:
        return Interval(value, math.nan, math.nan, n)
    drawn = [intervals.auc_resamples(*sides, resamples=resamples, seed=seed) for sides in models]
    reference = drawn[1] if len(drawn) > 1 else np.full(len(drawn[0]), AUC_UNTRAINED)
    resampled = _relative(drawn[0], reference, profile)
    return intervals.quantile_interval(value, resampled[np.isfinite(resampled)], n)


def _oriented(forget: np.ndarray, holdout: np.ndarray, profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    """(positives, negatives) whose AUC is the profile's: holdout texts are the positive class in both."""
    sign = 1.0 if profile.member_is_high else -1.0
    return sign * np.asarray(holdout, np.float64), sign * np.asarray(forget, np.float64)


def _relative(auc: np.ndarray, reference: np.ndarray, profile: Profile) -> np.ndarray:
    """PrivLeak of AUCs in the profile's direction; not finite where it has no value."""
    if profile.member_is_high:
        auc, reference = 1 - auc, 1 - reference
        return (auc - reference) / (reference + 1e-10) * 100
    with np.errstate(divide="ignore", invalid="ignore"):
        return (auc - reference) / reference * 100
