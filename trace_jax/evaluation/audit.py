"""What every item of the built-in probes gave, as lines of JSON for whoever wants to check a number.

Items are numbered as they are scored. Where a model wrote something, a line has that and the truth as well: only so can
one see that a score is right. It is text of the forget set, and left out where it may not be copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from trace_jax.data.probes import Prompts
from trace_jax.evaluation.task import TaskScores

if TYPE_CHECKING:
    from trace_jax.evaluation.suite import Scores

TEXTS = ("generation", "ground_truth", "question")  # fields that hold text, in the lines of tasks too
Lines = list[dict[str, Any]]


def audit_items(scores: Scores, prompts: Mapping[str, Prompts], tokenizer: Tokenizer | None) -> dict[str, Lines]:
    """Lines per part: "questions", "rows", "verbatim", "memorization" and "members"; parts without items are left out.

    Args:
      prompts: that the verbatim scores are of, per split.
      tokenizer: reads what was generated; without one, the lines of the verbatim score have no text.
    """
    parts = {
        "questions": _questions(scores),
        "rows": _rows(scores),
        "verbatim": _verbatim(scores, prompts, tokenizer),
        "memorization": _memorization(scores),
        "members": _members(scores),
    }
    return {part: lines for part, lines in parts.items() if lines}


def without_texts(scores: TaskScores) -> TaskScores:
    """The same with audit lines that hold no text."""
    items = {
        part: [{name: value for name, value in line.items() if name not in TEXTS} for line in lines]
        for part, lines in scores.items.items()
    }
    return TaskScores(scores.arrays, items)


def hazardous(sources: Sequence[str]) -> bool:
    """Whether text of these sources must not be copied anywhere: the corpora of WMDP (2403.03218)."""
    return any("wmdp" in source.lower() for source in sources)


def _questions(scores: Scores) -> Lines:
    return [
        {
            "split": split,
            "subject": subject,
            "item": i,
            "group": int(questions.group[i]),
            "log_likelihood": questions.log_likelihood[i].tolist(),
            "answer": int(questions.answer[i]),
            "correct": bool(correct),
        }
        for (split, subject), questions in scores.questions.items()
        for i, correct in enumerate(questions.correct)
    ]


def _rows(scores: Scores) -> Lines:
    return [
        {"split": split, "subject": subject, "item": i, "nll": float(nll), "tokens": int(tokens)}
        for (split, subject), rows in scores.text.items()
        for i, (nll, tokens) in enumerate(zip(rows.nll, rows.tokens, strict=True))
    ]


def _verbatim(scores: Scores, prompts: Mapping[str, Prompts], tokenizer: Tokenizer | None) -> Lines:
    lines = []
    for split, found in scores.verbatim.items():
        texts: list[dict[str, str]] = [{}] * len(found.score)
        if tokenizer is not None:
            asked = prompts[split]
            both = (tokenizer.decode_batch(asked.unpadded(x)) for x in (found.generated, asked.continuation))
            texts = [{"generation": a, "ground_truth": b} for a, b in zip(*both, strict=True)]
        for i, (score, text) in enumerate(zip(found.score, texts, strict=True)):
            lines.append({"split": split, "item": i, "score": float(score), **text})
    return lines


def _memorization(scores: Scores) -> Lines:
    return [
        {"split": split, "item": i, **line}
        for split, found in scores.memorization.items()
        for i, line in enumerate(_by_item(found))
    ]


def _members(scores: Scores) -> Lines:
    return [
        {"split": split, "side": side, "item": i, **line}
        for split, members in scores.members.items()
        for side, texts in (("forget", members.forget), ("holdout", members.holdout))
        for i, line in enumerate(_by_item(texts))
    ]


def _by_item(scores: Any) -> Lines:
    """The numbers of each item from a dataclass of arrays [N]; those that weren't taken (NaN) are left out."""
    columns = {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}
    return [
        {name: float(value) for name, value in zip(columns, values, strict=True) if not math.isnan(value)}
        for values in zip(*columns.values(), strict=True)
    ]
