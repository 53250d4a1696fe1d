"""Verbatim memorisation: greedy continuation of a document's beginning against how it really goes on."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from rouge_score import rouge_scorer
from tokenizers import Tokenizer

from trace_jax.data.probes import Prompts
from trace_jax.models.config import ModelConfig
from trace_jax.models.generate import generate


def verbatim_scores(
    params: Any, config: ModelConfig, tokenizer: Tokenizer, prompts: Prompts, *, batch_size: int = 64
) -> np.ndarray:
    """ROUGE-L F of the greedy continuation against the truth, f64 [N] in 0..1 (MUSE's VerbMem, 2407.06460).

    As many new tokens are generated as the true continuation has; there are no stop strings and no stemmer.
    """
    length, count, pending = prompts.continuation.shape[1], len(prompts), []
    batch_size = min(batch_size, count)
    for start in range(0, count, batch_size or 1):
        batch = np.arange(start, start + batch_size)
        batch[batch >= count] = 0  # one shape for every batch; copies of the first prompt are dropped
        pending.append(generate(params, config, jnp.asarray(prompts.prompt[batch], jnp.int32), max_new_tokens=length))
    if not pending:
        return np.zeros(0)
    generated = np.concatenate([np.asarray(x) for x in pending])[:count]
    return rouge_l(_decode(tokenizer, generated), _decode(tokenizer, prompts.continuation))


def rouge_l(predictions: list[str], references: list[str]) -> np.ndarray:
    """ROUGE-L F-measure of each prediction against its reference, f64 [N] in 0..1, without stemming."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    return np.array([scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)])


def _decode(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    return tokenizer.decode_batch(ids.tolist())
