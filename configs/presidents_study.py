"""The full comparison on real text alone: forget Polk's addresses of 1845-1847.

Command:   python -m trace_jax.main study --config configs/presidents_study.py --workdir runs/presidents_study
Hardware:  2 CPU cores, 4 GB of memory.
Run time and result: docs/results.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The settings of configs/presidents.py without the retrained model, which the fronts do not need."""
    config = ml_collections.ConfigDict()
    config.name = "presidents_study"
    config.data = {"benchmark": "presidents"}
    config.target = {"steps": 600}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 6.0},
        "learning_rate": 3e-3,
        "evaluate_every": 5,
    }
    config.evaluation = {"max_rows": 48}
    config.study = {
        "methods": (
            "uniform", "uniform_2x", "trace", "trace_rows", "token_weights", "permuted", "random_experts",
            "ngram", "oracle",
        ),
        "seeds": (0, 1, 2),
        "alphas": (4.0, 8.0, 16.0),
    }  # fmt: skip
    return config
