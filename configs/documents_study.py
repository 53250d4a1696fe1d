"""Documents as a user has them: one manual is to be forgotten, others like it and public-domain prose are kept.

Command:   python benchmarks/studies/documents.py      (writes the three files, from installed packages)
           python -m trace_jax.main study --config configs/documents_study.py --workdir runs/documents_study
Hardware:  2 CPU cores, 4 GB of memory; nothing is downloaded.
Run time:  51 min; 208 runs. A target takes 2 min, its statistics and weights 35 s, a run 20 s, two at a time.
Result:    docs/results.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The quickstart's model; neighbours are a twelfth of the retain text.

    On seed 0, at a rate of 2e-3 and alpha 16, uniform came down to half of the forget text's probability at step 6 and
    to 0.04 after 60, `trace_rows` to 0.61.
    """
    config = ml_collections.ConfigDict()
    config.name = "documents_study"
    files = {name: f"runs/documents/{name}.jsonl" for name in ("forget", "neighbour", "retain")}
    config.data = {"benchmark": "text", **files}
    config.target = {"steps": 600}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 5.0},
        "learning_rate": 2e-3,
        "evaluate_every": 2,
    }
    config.evaluation = {"max_rows": 16, "batch_size": 32, "patching": False}
    config.study = {
        "methods": ("uniform", "uniform_2x", "trace", "trace_rows", "random_experts", "ngram", "gradient", "oracle"),
        "seeds": tuple(range(10, 18)),
        "tuning_seeds": (100, 101, 102),
        "alphas": (2.0, 8.0, 32.0),
        "learning_rates": (1e-3, 2e-3),
    }
    return config
