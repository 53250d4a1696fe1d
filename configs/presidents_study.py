"""The full comparison on real text alone: forget Polk's addresses of 1845-1847.

Command:   python -m trace_jax.main study --config configs/presidents_study.py --workdir runs/presidents_study
Hardware:  2 CPU cores, 4 GB of memory.
Run time:  68 min on two cores, partly beside other work: eleven targets with the weights of all methods 20 min, 144
           runs that tune 34 min, 64 that are reported 14 min.
Result:    docs/results.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The settings of configs/presidents.py, slower and without the retrained model, which the fronts do not need.

    On seed 100, at a rate of 1e-3, uniform came down to .5 at step 40 with alpha 4, and not at all with 16.
    """
    config = ml_collections.ConfigDict()
    config.name = "presidents_study"
    config.data = {"benchmark": "presidents"}
    config.target = {"steps": 600}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 6.0},
        "learning_rate": 2e-3,
        "evaluate_every": 4,
    }
    config.evaluation = {"max_rows": 16, "batch_size": 32, "patching": False}
    config.study = {
        "methods": ("uniform", "uniform_2x", "trace", "trace_rows", "random_experts", "ngram", "gradient", "oracle"),
        "seeds": tuple(range(10, 18)),
        "tuning_seeds": (100, 101, 102),
        "alphas": (2.0, 4.0, 8.0),
        "learning_rates": (1e-3, 2e-3),
    }
    return config
