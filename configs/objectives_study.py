"""Every objective with the uniform retain loss and with TRACE, each tuned over three settings, on the handbook.

Command:   python -m trace_jax.main study --config configs/objectives_study.py --workdir runs/objectives_study
Hardware:  2 CPU cores, 4 GB of memory; nothing is downloaded.
Run time and result: docs/methods.md.
"""

import ml_collections

RATES = (1e-3, 2e-3, 4e-3)
WEAKER, WEAKEST = (1.0, 4.0, 16.0), (0.25, 1.0, 4.0)  # of objectives that push less
ALONE = (0.0, 1.0, 4.0)  # of those that their authors run without a retain term, which alpha 0 is


def get_config() -> ml_collections.ConfigDict:
    """Corpus, model and budget of configs/quickstart.py; one seed."""
    config = ml_collections.ConfigDict()
    config.name = "objectives_study"
    config.data = {"benchmark": "handbook"}
    config.target = {"steps": 600}
    config.unlearning = {"evaluate_every": 5, "learning_rate": 2e-3}
    config.evaluation = {"max_rows": 48}
    config.study = {
        "methods": ("uniform", "trace_rows"),
        "seeds": (0,),
        "alphas": (4.0, 16.0, 64.0),
        "objectives": {
            "gradient_ascent": {"learning_rate": RATES, "nll_ceiling": 5.0},
            "gradient_difference": {"nll_ceiling": 5.0},
            "npo": {"beta": 0.02},
            "simnpo": {"gamma": 1.0, "delta": 5.0},
            "dpo": {"beta": 0.02, "alpha": WEAKER},
            "idk": {"alpha": WEAKER},
            "rmu": {"alpha": WEAKEST, "layer": 2, "steering": 20.0},
            "adaptive_rmu": {"alpha": WEAKEST, "layer": 2},
            "undial": {"learning_rate": 4e-3, "alpha": ALONE},
            "wga": {"alpha": WEAKER},
            "tnpo": {"alpha": WEAKER},
            "satimp": {"alpha": WEAKER, "gamma": 1.0, "beta1": 1.0},
            "ceu": {"alpha": ALONE},
            "pdu": {},
            "flat": {"alpha": ALONE},
            "task_vector": {"task_scale": (1.0, 2.5, 5.0), "learning_rate": 1e-3},
        },
    }
    return config
