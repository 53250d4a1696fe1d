"""Unlearn one topic of a handbook: the uniform retain loss against TRACE, side by side, in minutes.

Command:   python -m trace_jax.main --config configs/quickstart.py --workdir runs/quickstart
           python -m trace_jax.main --config configs/quickstart.py:attacks --workdir runs/quickstart
           (the same, then attacks on what each method made; continues the first)
Hardware:  2 CPU cores, 4 GB of memory; nothing is downloaded.
Run time and result: README.md.
"""

import ml_collections

from trace_jax.config import ConfigError


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """A tiny MoE is trained on presidential addresses and a generated handbook, then unlearns one of its two topics."""
    config = ml_collections.ConfigDict()
    config.name = "quickstart"
    config.methods = ("uniform", "trace", "trace_rows")
    config.data = {"benchmark": "handbook"}
    config.target = {"steps": 600}
    config.unlearning = {
        "objective": {"name": "gradient_difference", "nll_ceiling": 5.0},
        "evaluate_every": 5,
        "learning_rate": 2e-3,
    }
    config.evaluation = {"max_rows": 48}
    if variant == "attacks":
        training = {"steps": (50, 100), "learning_rate": 1e-3}  # 1e-5 would not move a model so small
        config.target.retrained = True  # what relearning teaches a model that never knew
        config.attacks = {
            "relearning": {**training, "share": 0.02},  # ten rows, with a third of the facts that are asked for
            "benign_relearning": training,
            "quantization": {"bits": (8, 4)},
            "router_swap": {},
            "expert_forcing": {},
            "prompting": {"examples": (3,), "prefixes": (0.5, 0.75)},
        }
    elif variant:
        raise ConfigError(f"configs/quickstart.py has the variant 'attacks'; got {variant!r}.")
    return config
