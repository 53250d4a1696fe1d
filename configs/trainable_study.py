"""What TRACE gains where all weights train, selected experts alone, low-rank factors, or all but the routers.

Command:   python -m trace_jax.main study --config configs/trainable_study.py --workdir runs/trainable_study
Hardware:  2 CPU cores, 4 GB of memory; nothing is downloaded.
Run time:  22 min 37 s on two cores (Intel Xeon with AVX-512), six targets of 95 s in it.
Result:    docs/results.md.
"""

import ml_collections

# What trains, and the learning rates that are tried.
TRAINABLE = {
    "all": {"trainable": "all", "learning_rate": (1e-3, 2e-3)},
    "selected experts": {
        "trainable": {"name": "selected_experts", "experts": {"name": "difference", "top": 4}},
        "learning_rate": (2e-3, 5e-3),
    },
    "lora": {"trainable": {"name": "lora", "rank": 8, "alpha": 16.0}, "learning_rate": (2e-3, 5e-3)},
    "routers frozen": {"trainable": "routers_frozen", "learning_rate": (1e-3, 2e-3)},
}


def get_config() -> ml_collections.ConfigDict:
    """Corpus, model and steps of configs/quickstart.py."""
    config = ml_collections.ConfigDict()
    config.name = "trainable_study"
    config.data = {"benchmark": "handbook"}
    config.target = {"steps": 600}
    config.unlearning = {"objective": {"name": "gradient_difference", "nll_ceiling": 5.0}, "evaluate_every": 3}
    config.evaluation = {"max_rows": 8, "batch_size": 32, "patching": False}
    config.study = {
        "methods": ("uniform", "trace_rows"),
        "seeds": (10, 11, 12, 13, 14),
        "tuning_seeds": (100,),
        "alphas": (8.0, 32.0, 128.0),
        "variants": {name: {"unlearning": given} for name, given in TRAINABLE.items()},
    }
    return config
