"""Shapes of published models, for `plan`: what unlearning from them takes on which machine. No weights are needed.

Command:   python -m trace_jax.main plan --config configs/plan.py:mixtral-8x7b --topology v5p:2x2x4
Variants:  the models of trace_jax/models/families/published.json: olmoe-1b-7b, qwen1.5-moe-a2.7b, deepseek-v2-lite,
           mixtral-8x7b, phi-3.5-moe, qwen3-30b-a3b, gpt-oss-20b
Hardware:  none: a laptop compiles for the machine that is named. Minutes per program and GBs of memory.
Result:    docs/scaling.md, "Planning".
"""

import ml_collections

from trace_jax.config import ConfigError, as_dict
from trace_jax.models.families import PUBLISHED, model_config


def get_config(variant: str = "olmoe-1b-7b") -> ml_collections.ConfigDict:
    """Trains what configs/huggingface.py trains: the down projections of all experts."""
    if variant not in PUBLISHED:
        raise ConfigError(f"configs/plan.py has the variants {', '.join(PUBLISHED)}; got {variant!r}.")
    config = ml_collections.ConfigDict()
    config.name = variant
    config.model = as_dict(model_config(PUBLISHED[variant], dtype="bfloat16"))
    config.data = {"row_length": 512}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 6.0},
        "trainable": "down_projections",
        "forget_batch_size": 16,
        "retain_batch_size": 16,
    }
    config.evaluation = {"batch_size": 32}
    config.parallel = {"remat": "layer", "expert_buffer": 2.0, "microbatches": 1}
    return config
