"""Verbatim memorisation: greedy continuation of a document's beginning against how it really goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trace_jax.data.probes import Prompts
from trace_jax.evaluation.rouge import rouge_l
from trace_jax.models.config import ModelConfig
from trace_jax.models.generate import generate


def verbatim_scores(
    params: Any, config: ModelConfig, tokenizer: Tokenizer, prompts: Prompts, *, batch_size: int = 64
) -> np.ndarray:
    """ROUGE-L F of the greedy continuation against the truth, f64 [N] in 0..1 (MUSE's VerbMem, 2407.06460).

    As many new tokens are generated as the true continuation has; there are no stop strings and no stemmer.
    """
    length, count = prompts.continuation.shape[1], len(prompts)
    if not count:
        return np.zeros(0)
    several = [prompts.prompt[start : start + batch_size] for start in range(0, count, batch_size)]
    several[-1] = np.resize(several[-1], (min(batch_size, count), prompts.prompt.shape[1]))  # one shape for all
    generated = np.concatenate([generate(params, config, batch, max_new_tokens=length) for batch in several])[:count]
    return rouge_l(_decode(tokenizer, generated), _decode(tokenizer, prompts.continuation))


def _decode(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    return tokenizer.decode_batch(ids.tolist())
