"""How many experts to select, and whether it matters which: selected against random ones, by their number.

Command:   python -m trace_jax.main study --config configs/dose_study.py --workdir runs/dose_study
Hardware:  2 CPU cores, 4 GB of memory; nothing is downloaded.
Run time:  about an hour on two cores, by what its parts take on one: a target 230 s, a run 22 s; 132 runs for tuning,
           then 11 to 22 a seed.
Result:    docs/results.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Corpus and steps of configs/quickstart.py, and a model of 3 layers with 64 experts, of which a token uses 4.

    Of every layer 1 to 16 experts are selected by the difference of their frequencies; `random_experts` has as many,
    none of them selected, `least_experts` those with the lowest difference. All weights keep an effective sample of a
    fifth of the retain tokens.
    """
    config = ml_collections.ConfigDict()
    config.name = "dose_study"
    config.data = {"benchmark": "handbook"}
    config.model = {"num_layers": 3, "num_experts": 64, "experts_per_token": 4, "expert_hidden_size": 32}
    config.target = {"steps": 600}
    config.unlearning = {"objective": {"name": "gradient_difference", "nll_ceiling": 5.0}, "evaluate_every": 3}
    config.evaluation = {"max_rows": 8, "batch_size": 32, "patching": False}
    config.study = {
        "methods": ("uniform", "trace_rows", "random_experts", "least_experts"),
        "seeds": (10, 11, 12, 13, 14),
        "tuning_seeds": (100, 101),
        "alphas": (8.0, 32.0, 128.0),
        "learning_rates": (1e-3, 2e-3),
        "variants": {
            f"top {top}": {"calibration": {"rule": {"name": "difference", "top": top}}} for top in (1, 2, 4, 8, 16)
        },
    }
    return config
