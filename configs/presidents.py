"""A small MUSE on real text: unlearn Polk's addresses of 1845-1847, with membership against a retrained model.

Command:   python -m trace_jax.main --config configs/presidents.py --workdir runs/presidents
Hardware:  2 CPU cores, 4 GB of memory; nothing is downloaded.
Run time:  3 min 30 s on two cores.
Result:    its report; with alpha and rate tuned, over seeds: configs/presidents_study.py, docs/results.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Verbatim memorisation, cloze knowledge, PrivLeak and utility, before and after."""
    config = ml_collections.ConfigDict()
    config.name = "presidents"
    config.methods = ("uniform", "trace", "trace_rows")
    config.data = {"benchmark": "presidents"}
    config.target = {"steps": 600, "retrained": True}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 6.0},
        "learning_rate": 3e-3,
        "alpha": 4.0,
        "evaluate_every": 5,
    }
    config.evaluation = {"max_rows": 48}
    return config
