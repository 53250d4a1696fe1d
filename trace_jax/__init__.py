"""trace_jax: unlearning in Mixture-of-Experts language models by routing-aware calibration of the retain loss."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module. Imported on first use, so that `import trace_jax` costs nothing.
_PUBLIC = {
    "Model": "trace_jax.models.model",
    "ModelConfig": "trace_jax.models.architecture",
    "forward": "trace_jax.models.decoder",
    "init_params": "trace_jax.models.architecture",
    "load_pretrained": "trace_jax.checkpoints.pretrained",
    "save_pretrained": "trace_jax.checkpoints.export",
    "generate": "trace_jax.models.generate",
    "generate_text": "trace_jax.models.generate",
    "Batch": "trace_jax.data.rows",
    "Rows": "trace_jax.data.rows",
    "build_corpora": "trace_jax.data.corpora",
    "sequential_batches": "trace_jax.data.rows",
    "expert_statistics": "trace_jax.routing.statistics",
    "expert_assignments": "trace_jax.routing.statistics",
    "select_experts": "trace_jax.routing.config",
    "calibrate": "trace_jax.routing.calibration",
    "token_weights": "trace_jax.routing.calibration",
    "retain_weights": "trace_jax.routing.weights",
    "Recalibration": "trace_jax.routing.weights",
    "unlearn": "trace_jax.unlearning.unlearn",
    "UnlearningConfig": "trace_jax.unlearning.config",
    "CalibrationConfig": "trace_jax.routing.config",
    "make_mesh": "trace_jax.parallel.mesh",
    "ParallelConfig": "trace_jax.parallel.mesh",
    "ConfigError": "trace_jax.config",
    "TraceLM": "trace_jax.tasks.lm_eval",
    "load_config": "trace_jax.run.experiment",
    "run": "trace_jax.run.methods",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'trace_jax' has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}"
        )
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    if not isinstance(value, type):
        value = importlib.import_module("trace_jax.config").checked(value)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted(__all__)
