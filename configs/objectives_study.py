"""Objectives with the uniform retain loss and with TRACE, tuned, and six of them attacked, on the handbook.

Command:   python -m trace_jax.main study --config configs/objectives_study.py --workdir runs/objectives_study
           python -m trace_jax.main study --config configs/objectives_study.py:all --workdir runs/all_objectives
Variants:  none: the six that people use, three seeds, under attack; all: every objective, one seed, no attack
Hardware:  2 CPU cores, 4 GB of memory; nothing is downloaded.
Run time:  34 min on two cores: 72 runs for tuning, 36 that are attacked, 6 for the second reading. A run takes 15 s,
           its attacks 25 s, a target 130 s and a retrained model as long.
Result:    docs/results.md; of all: docs/methods.md.
"""

import ml_collections

from trace_jax.config import ConfigError

RATES = (1e-3, 2e-3, 4e-3)
WEAKER, WEAKEST = (1.0, 4.0, 16.0), (0.25, 1.0, 4.0)  # of objectives that push less
ALONE = (0.0, 1.0, 4.0)  # of those that their authors run without a retain term, which alpha 0 is
OBJECTIVES = {
    "gradient_difference": {"objective": {"name": "gradient_difference", "nll_ceiling": 5.0}},
    "npo": {"objective": {"name": "npo", "beta": 0.02}},
    "simnpo": {"objective": {"name": "simnpo", "gamma": 1.0, "delta": 5.0}},
    "rmu": {"objective": {"name": "rmu", "layer": 2, "steering": 20.0}, "alpha": WEAKEST},
    "dpo": {"objective": {"name": "dpo", "beta": 0.02}, "learning_rate": (5e-4, 1e-3), "alpha": WEAKER},
    "undial": {"objective": {"name": "undial", "beta": 30.0}, "learning_rate": (4e-3, 6e-3), "alpha": (0.0, 0.25, 1.0)},
}
OTHERS = {
    "gradient_ascent": {"objective": {"name": "gradient_ascent", "nll_ceiling": 5.0}, "learning_rate": RATES},
    "idk": {"objective": "idk", "alpha": WEAKER},
    "adaptive_rmu": {"objective": {"name": "adaptive_rmu", "layer": 2}, "alpha": WEAKEST},
    "wga": {"objective": "wga", "alpha": WEAKER},
    "tnpo": {"objective": "tnpo", "alpha": WEAKER},
    "satimp": {"objective": {"name": "satimp", "gamma": 1.0, "beta1": 1.0}, "alpha": WEAKER},
    "ceu": {"objective": "ceu", "alpha": ALONE},
    "pdu": {"objective": "pdu"},
    "flat": {"objective": "flat", "alpha": ALONE},
    "task_vector": {"objective": {"name": "task_vector", "task_scale": (1.0, 2.5, 5.0)}, "learning_rate": 1e-3},
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Corpus, model and steps of configs/quickstart.py. A run of the six keeps the state of its best evaluation at or
    below the level on validation: that is what is attacked, so that every model has forgotten as much. The retrained
    model is the control of relearning, of the search over routes and of membership: what they find in one that never
    knew.

    Tried with uniform on seed 100: dpo is at the level within nine steps at 2e-3, whatever alpha; undial at 4e-3 comes
    down to .51 with beta 30 and no retain term, to .60 on validation with beta 10 and alpha 1; at 1e-2 it is there
    after three steps, and has lost half of what is to be kept.
    """
    if variant not in ("", "all"):
        raise ConfigError(f"configs/objectives_study.py has the variant 'all'; got {variant!r}.")
    config = ml_collections.ConfigDict()
    config.name = "objectives_study" if not variant else "all_objectives"
    config.data = {"benchmark": "handbook"}
    config.target = {"steps": 600}
    config.unlearning = {"evaluate_every": 5, "learning_rate": 2e-3}
    config.evaluation = {"max_rows": 48}
    alphas, given = (4.0, 16.0, 64.0), OBJECTIVES | OTHERS if variant else OBJECTIVES
    config.study = {"methods": ("uniform", "trace_rows"), "seeds": (0,), "alphas": alphas}
    config.study.variants = {name: {"unlearning": settings} for name, settings in given.items()}
    if not variant:
        config.study.update({"seeds": (10, 11, 12), "tuning_seeds": (100,), "learning_rates": RATES[:2]})
        config.data.holdout_substances = 24
        config.target.retrained = True
        config.unlearning = {"evaluate_every": 3, "keep": {"name": "best_utility", "forgetting": 0.5}}
        config.evaluation = {"max_rows": 8, "batch_size": 32, "max_gradients": 0, "patching": False}
        config.attacks = {
            "relearning": {"steps": (50, 100), "learning_rate": 1e-3, "share": 0.02},
            "quantization": {"bits": (8, 4)},
            "router_swap": {},
            "expert_forcing": {},
            "route_search": {"questions": 24, "tries": 4},
        }
    return config
