"""The full comparison on real text alone: forget Polk's addresses of 1845-1847.

Command:   python -m trace_jax.main study --config configs/presidents_study.py --workdir runs/presidents_study
Hardware:  2 CPU cores, 4 GB of memory.
Run time and result: docs/results.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Model and budget of the handbook; membership is measured against a model retrained without the forget set."""
    config = ml_collections.ConfigDict()
    config.name = "presidents_study"
    config.data = {"benchmark": "presidents"}
    config.target = {"retrained": True}
    config.unlearning = {"nll_ceiling": 6.0}
    config.study = {
        "methods": (
            "uniform",
            "uniform_2x",
            "trace",
            "trace_rows",
            "token_weights",
            "permuted",
            "random_experts",
            "ngram",
            "hidden",
            "loss",
            "oracle",
        ),
        "seeds": (0, 1, 2),
        "alphas": (4.0, 16.0, 48.0, 150.0),
    }
    return config
