"""The full comparison on the handbook: methods, controls and rivals, tuned over alpha, three seeds.

Command:   python -m trace_jax.main study --config configs/handbook_study.py --workdir runs/handbook_study
Hardware:  2 CPU cores, 4 GB of memory.
Run time and result: docs/results.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Same corpus, model and budget as configs/quickstart.py."""
    config = ml_collections.ConfigDict()
    config.name = "handbook_study"
    config.data = {
        "benchmark": "handbook",
        "forget_substances": 60,
        "neighbour_substances": 150,
        "retain_rows": 2000,
        "neighbour_share": 0.02,
    }
    config.target = {"steps": 600}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 5.0},
        "evaluate_every": 5,
        "learning_rate": 2e-3,
    }
    config.evaluation = {"max_rows": 48}
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
            "ngram_dsir",
            "hidden",
            "similarity",
            "loss",
            "oracle",
        ),
        "seeds": (0, 1, 2),
        "alphas": (4.0, 16.0, 48.0, 150.0, 500.0),
    }
    return config
