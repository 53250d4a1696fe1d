"""TOFU on a small mixture that is trained here: a tenth of the authors, every weighting, the objectives in use.

Command:   python benchmarks/studies/tofu_small.py --workdir runs/studies/tofu_small
           runs both variants on the same models and writes one file of numbers. One variant alone:
           python -m trace_jax.main study --config configs/tofu_small.py:weightings --workdir runs/tofu_small
Variants:  weightings (every weighting under gradient difference), objectives (uniform and TRACE weights under NPO,
           SimNPO, RMU, DPO and UNDIAL).
Data:      locuslab/TOFU, of the hub or as JSON files in TOFU/TOFU_data of github.com/OPTML-Group/Unlearn-Simple, built
           once (`pip install 'trace-jax[data]'`); DIR holds those files, and without --source the hub is read:
             for name in forget10 retain90 real_authors world_facts forget10_perturbed retain_perturbed \\
                 real_authors_perturbed world_facts_perturbed; do
               python -m trace_jax.main data --name tofu/$name --source DIR; done
Target:    trained on forget10, on the retain90 pairs that aren't held out, and on the real authors and world facts,
           which published models know from pretraining; the retrained model on all but forget10 (docs/evaluation.md).
Hardware:  2 CPU cores, 4 GB of memory.
"""

import ml_collections

from trace_jax.config import ConfigError

BENCHMARK = "tfds:tofu"
WEIGHTINGS = (
    "uniform",
    "trace",
    "trace_rows",
    "permuted",
    "random_experts",
    "ngram",
    "hidden",
    "similarity",
    "loss",
)  # fmt: skip
OBJECTIVES = {  # settings of configs/objectives_study.py
    "npo": {"beta": 0.02},
    "simnpo": {"gamma": 1.0, "delta": 5.0},
    "rmu": {"layer": 2, "steering": 20.0},
    "dpo": {"beta": 0.02},
    "undial": {"learning_rate": 4e-3},
}
STUDIES = {
    "weightings": {"methods": WEIGHTINGS},
    "objectives": {"methods": ("uniform", "trace_rows"), "objectives": OBJECTIVES},
}


def get_config(variant: str = "weightings") -> ml_collections.ConfigDict:
    """Models, data and budget are those of both variants."""
    if variant not in STUDIES:
        raise ConfigError(f"configs/tofu_small.py has no variant {variant!r}; there are {', '.join(STUDIES)}.")
    config = ml_collections.ConfigDict()
    config.name = "tofu_small"
    config.data = {"benchmark": "tofu", "data": BENCHMARK}
    config.model = {"num_experts": 32, "expert_hidden_size": 128}
    config.target = {"steps": 1000, "optimizer": "muon", "learning_rate": 1e-2, "retrained": True}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 5.0},
        "learning_rate": 2e-3,
        "forget_batch_size": 16,  # 60 steps are 3.4 epochs of the forget set
        "steps": 60,
        "evaluate_every": 15,
    }
    config.evaluation = {
        "max_rows": 24,
        "patching": False,
        "levels": (0.3,),  # between two times 50 questions p is .05 at .27
        "tofu": {"data": BENCHMARK, "forget": "forget10", "max_questions": 100, "max_new_tokens": 64},
    }
    config.study = {"seeds": (0, 1, 2), "tuning_seeds": (100,), "alphas": (1.0, 4.0), **STUDIES[variant]}
    return config
