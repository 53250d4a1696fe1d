"""Do forget-critical experts drift, and do they carry the damage? The runs that tuning chose, with experts put back.

Command:   trace-jax study --config configs/patching_study.py:quickstart --workdir runs/patching_quickstart
           trace-jax study --config configs/patching_study.py:fine --workdir runs/patching_fine
Variants:  quickstart: its model, 2 layers of 16 experts, 2 a token; fine: 3 layers of 64 experts, 4 a token
Hardware:  2 CPU cores, 4 GB of memory; nothing is downloaded.
Run time:  quickstart 20, fine 30 min on two cores, by what its parts take on one: a target 155 and 230 s, a run 15 and
           22 s, putting experts back 6 and 10 s; 36 runs for tuning, then 2 to 4 a seed.
Result:    docs/results.md.
"""

import ml_collections

from trace_jax.config import ConfigError

MODELS = {
    "quickstart": {},
    "fine": {"num_layers": 3, "num_experts": 64, "experts_per_token": 4, "expert_hidden_size": 32},
}


def get_config(variant: str) -> ml_collections.ConfigDict:
    """Corpus and steps of configs/quickstart.py, five seeds; the fronts are a part of the result."""
    if variant not in MODELS:
        raise ConfigError(f"configs/patching_study.py has the variants {', '.join(MODELS)}; got {variant!r}.")
    config = ml_collections.ConfigDict()
    config.name = f"patching_{variant}"
    config.data = {"benchmark": "handbook"}
    config.model = MODELS[variant]
    config.target = {"steps": 600}
    config.unlearning = {"objective": {"name": "gradient_difference", "nll_ceiling": 5.0}, "evaluate_every": 3}
    config.unlearning["keep"] = {"name": "best_utility", "forgetting": 0.5}  # experts are put back at equal forgetting
    config.evaluation = {"max_rows": 8, "batch_size": 32, "patching": True}
    config.study = {
        "methods": ("uniform", "trace"),
        "seeds": (10, 11, 12, 13, 14),
        "tuning_seeds": (100, 101, 102),
        "alphas": (8.0, 32.0, 128.0),
        "learning_rates": (1e-3, 2e-3),
    }
    return config
