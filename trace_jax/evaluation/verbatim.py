"""Verbatim memorisation: greedy continuation of a document's beginning against how it really goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from trace_jax.data.probes import Prompts
from trace_jax.evaluation.rouge import rouge_l
from trace_jax.models.config import ModelConfig
from trace_jax.models.generate import generate


@dataclasses.dataclass(frozen=True)
class VerbatimScores:
    """ROUGE-L F of each prompt's continuation against the truth, `score` f64 [N] in 0..1, and what was `generated`,
    token ids i32 [N, C]; of a shorter continuation the first ones count."""

    score: np.ndarray
    generated: np.ndarray


def verbatim_scores(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> VerbatimScores:
    """Continues prompts greedily and compares with how they go on (MUSE's VerbMem, 2407.06460).

    As many new tokens are generated as the true continuation has; there are no stop strings and no stemmer.
    """
    (count, length), several = prompts.continuation.shape, []
    if not count:
        return VerbatimScores(np.zeros(0), np.zeros((0, length), np.int32))
    for start in range(0, count, batch_size):
        rows = np.arange(start, min(start + batch_size, count))
        batch = prompts.take(np.resize(rows, min(batch_size, count)))  # one shape for all
        lengths = None if batch.lengths is None else batch.lengths[:, 0]
        several.append(generate(params, config, batch.prompt, lengths=lengths, max_new_tokens=length, mesh=mesh))
    generated = np.concatenate(several)[:count]
    written, truth = (tokenizer.decode_batch(prompts.unpadded(x)) for x in (generated, prompts.continuation))
    return VerbatimScores(rouge_l(written, truth), generated)
