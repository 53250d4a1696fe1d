"""trace_jax: unlearning in Mixture-of-Experts language models by routing-aware calibration of the retain loss.

Text to forget, text to keep, and a model, as small as they can be; the examples of all public names go on from here:

    >>> import jax, numpy as np
    >>> import trace_jax as tj
    >>> secret = [f"The vault of house {n} opens with {7 * n}." for n in range(20)]
    >>> common = [f"House {n} has {n % 5} rooms and a garden." for n in range(60)]
    >>> tokenizer = tj.train_tokenizer(secret + common, vocab_size=320)
    >>> shape = tj.ModelConfig(vocab_size=320, hidden_size=16, head_size=8, num_experts=8, expert_hidden_size=8)
    >>> model = tj.Model(shape, tj.init_params(shape, jax.random.key(0)), tokenizer)
    >>> forget, retain = tj.pack(secret, model, row_length=32), tj.pack(common, model, row_length=32)
    >>> model
    Model(18,768 parameters, 2 layers x 8 experts, top 2, float32)

`tj.load_pretrained` reads a published model, `tj.read_rows` your own text.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names by module. Imported on first use, so that `import trace_jax` costs nothing.
_NAMES = {
    "models.model": ["Model", "SpecialTokens"],
    "models.architecture": ["ModelConfig", "init_params"],
    "models.decoder": ["forward"],
    "checkpoints.pretrained": ["load_pretrained"],
    "checkpoints.export": ["save_pretrained"],
    "models.generate": ["generate", "generate_text"],
    "data.rows": ["Batch", "Rows", "sequential_batches", "train_tokenizer"],
    "data.text": ["pack", "read_rows"],
    "data.corpora": ["build_corpora"],
    "routing.statistics": ["expert_statistics", "expert_assignments", "expert_sensitivity"],
    "routing.config": ["select_experts", "CalibrationConfig"],
    "routing.captures": ["read_capture"],
    "routing.diagnosis": ["diagnose"],
    "routing.calibration": ["calibrate", "token_weights", "trade_off"],
    "routing.weights": ["retain_weights", "Recalibration"],
    "unlearning.unlearn": ["unlearn"],
    "unlearning.config": ["UnlearningConfig"],
    "unlearning.optimizer": ["TrainingConfig"],
    "unlearning.step": ["train"],
    "parallel.mesh": ["make_mesh", "ParallelConfig"],
    "config": ["ConfigError"],
    "tasks.benchmarks": ["DataConfig"],
    "tasks.lm_eval": ["TraceLM"],
    "run.experiment": ["load_config"],
    "run.methods": ["run", "attack"],
    "run.result": ["Run", "open_run"],
    "run.directory": ["write_report"],
    "run.export": ["export"],
    "run.evaluate": ["evaluate"],
    "interop.flax": ["as_nnx", "from_nnx"],
}
_PUBLIC = {name: f"trace_jax.{module}" for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"trace_jax has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    if not isinstance(value, type):
        value = importlib.import_module("trace_jax.config").checked(value)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted(__all__)
