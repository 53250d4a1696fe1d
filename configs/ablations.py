"""The quickstart with one thing changed: weights, trainable parameters, optimizer, length, or how routers are held.

Command:   python -m trace_jax.main --config configs/ablations.py:lora --workdir runs/lora
Variants:  a line each of VARIANTS below; docs/methods.md says what the settings do.
Hardware:  as configs/quickstart.py, and about its time.
Result:    none is recorded; compare a variant's report with the quickstart's.
"""

from typing import Any

import ml_collections
from quickstart import get_config as quickstart

from trace_jax.config import ConfigError, nearest

# What takes the place of the quickstart's settings.
VARIANTS: dict[str, dict[str, Any]] = {
    # Weights: fewer or other experts count as forget-critical; the bounds of weights, of ratios.
    "stricter_rule": {"calibration": {"rule": {"name": "ratio", "tau": 1.5, "kappa": 1.0}}},
    "sensitive_experts": {"calibration": {"rule": {"name": "sensitivity", "top": 4}}},
    "smaller_weights": {"calibration": {"max_weight": 10.0}},
    "by_document": {"calibration": {"unit": "document", "apply": "both"}},
    "entropy": {"calibration": {"divergence": "kl"}},
    "smaller_ratios": {"methods": ("ratio_weights",), "calibration": {"max_ratio": 10.0}},
    "weighted_mean": {"unlearning": {"normalize": "batch"}},
    # Trainable parameters, and how routers are held to retain routing (GRIP).
    "lora": {"unlearning": {"trainable": {"name": "lora", "rank": 8, "alpha": 16.0}}},
    "grip_project": {"unlearning": {"grip": {"name": "project", "margin": 0.01, "sweeps": 100}}},
    "grip_realign": {"unlearning": {"trainable": "routers_frozen", "grip": "realign"}},
    # How it trains.
    "adamw": {"unlearning": {"optimizer": {"name": "adamw", "b1": 0.8, "b2": 0.95, "eps": 1e-6}}},
    "sgd": {"unlearning": {"optimizer": {"name": "sgd", "momentum": 0.9}, "learning_rate": 0.05}},
    "muon": {"unlearning": {"optimizer": {"name": "muon", "momentum": 0.95}}},
    "balanced_target": {"target": {"load_balance": 0.05}},
    # How long, and which state is the result.
    "two_epochs": {"unlearning": {"epochs": 2.0, "epoch_anchor": "forget"}},
    "stopped": {"unlearning": {"stop_forgetting": 0.3, "stop_utility": 0.8}},
    "best": {"unlearning": {"keep": {"name": "best_utility", "forgetting": 0.5}}},
    # Objectives with settings that few change.
    "pdu": {"unlearning": {"objective": {"name": "pdu", "dual_rate": 1.0, "retain_bound": 0.05, "dual_warmup": 5}}},
    "satimp": {"unlearning": {"objective": {"name": "satimp", "beta1": 1.0, "beta2": 1.0}}},
    "npo_with_cache": {"unlearning": {"objective": {"name": "npo", "cache_reference": True}}},
    "idk": {"unlearning": {"objective": {"name": "idk", "refusals": ("That is not known to me.",)}}},
}


def get_config(variant: str) -> ml_collections.ConfigDict:
    """One variant."""
    if variant not in VARIANTS:
        raise ConfigError(f"configs/ablations.py has no variant {variant!r}{nearest(variant, VARIANTS)}")
    config = quickstart()
    for section, settings in {"name": variant, **VARIANTS[variant]}.items():
        config[section] = {**config.get(section, {}), **settings} if isinstance(settings, dict) else settings
    return config
