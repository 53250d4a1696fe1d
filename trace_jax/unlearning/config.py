"""Settings of optimisation: training a target model, and unlearning from it."""

from __future__ import annotations

import dataclasses

from trace_jax.config import ConfigError, Section, option

OBJECTIVES = ("gradient_ascent", "gradient_difference", "npo", "simnpo", "rmu")
RETAIN_LOSSES = ("nll", "kl", "hidden")
TRAINABLE = ("all", "experts", "selected_experts", "routers_frozen", "down_projections")
SCHEDULES = ("constant", "cosine", "linear")
_RETAINING = ("gradient_difference", "npo", "simnpo", "rmu")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW, its schedule and clipping (optax)."""

    learning_rate: float = option(1e-3, help="peak learning rate", minimum=0.0)
    b1: float = option(0.9, help="decay of the first moment", minimum=0.0, maximum=1.0)
    b2: float = option(0.98, help="decay of the second moment", minimum=0.0, maximum=1.0)
    weight_decay: float = option(0.0, help="decoupled weight decay", minimum=0.0)
    clip_norm: float = option(1.0, help="largest global gradient norm; 0 = no clipping", minimum=0.0)
    warmup_steps: int = option(0, help="steps of linear warm-up", minimum=0)
    schedule: str = option("constant", help="learning rate after warm-up", choices=SCHEDULES)

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer's settings alone."""
        return OptimizerConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(OptimizerConfig)}
        )


@dataclasses.dataclass(frozen=True)
class TrainingConfig(OptimizerConfig):
    """Training the target model (and the retrained one) from scratch."""

    steps: int = option(900, help="optimizer steps", minimum=1)
    batch_size: int = option(32, help="rows per step over all devices", minimum=1)
    load_balance: float = option(0.01, help="coefficient of the load-balancing loss", minimum=0.0)
    learning_rate: float = option(5e-3, help="peak learning rate", minimum=0.0)
    warmup_steps: int = option(40, help="steps of linear warm-up", minimum=0)
    schedule: str = option("cosine", help="learning rate after warm-up", choices=SCHEDULES)
    checkpoint_every: int = option(100, help="steps between saved training states", minimum=1)
    retrained: bool = option(False, help="also train a model on retain data alone, as reference for membership")


@dataclasses.dataclass(frozen=True)
class UnlearningConfig(OptimizerConfig):
    """One unlearning run: gamma * L_forget + alpha * L_retain (docs/method.md)."""

    objective: str = option("gradient_difference", help="forget loss", choices=OBJECTIVES)
    gamma: float = option(1.0, help="coefficient of the forget loss", minimum=0.0)
    alpha: float | None = option(
        16.0, help="coefficient of the retain loss", minimum=0.0, when={"objective": _RETAINING}
    )
    retain_loss: str | None = option(
        {"gradient_difference": "kl", "npo": "kl", "simnpo": "kl", "rmu": "hidden"},
        help="loss of a retain token",
        choices=RETAIN_LOSSES,
        when={"objective": _RETAINING},
    )
    nll_ceiling: float | None = option(
        0.0,
        help="a forget row whose mean NLL passes this (nats) is no longer pushed; 0 = no ceiling",
        minimum=0.0,
        when={"objective": ("gradient_ascent", "gradient_difference")},
    )
    beta: float | None = option(
        {"npo": 0.1, "simnpo": 4.5},
        help="inverse temperature of the preference loss",
        minimum=1e-6,
        when={"objective": ("npo", "simnpo")},
    )
    delta: float | None = option(0.0, help="margin of SimNPO (nats per token)", when={"objective": ("simnpo",)})
    steering: float | None = option(
        20.0, help="length of RMU's target direction, c", minimum=0.0, when={"objective": ("rmu",)}
    )
    layer: int | None = option(
        None, help="layer (from 1) whose output RMU steers and `hidden` compares; 1 when one of them is used", minimum=1
    )
    trainable: str | tuple[str, ...] | None = option(
        None,
        help="preset, or path patterns of what trains (first match wins; a leading ! freezes); "
        "down_projections for RMU, else all",
    )
    steps: int = option(60, help="optimizer steps", minimum=1)
    forget_batch_size: int = option(8, help="forget rows per step", minimum=1)
    retain_batch_size: int | None = option(16, help="retain rows per step", minimum=1, when={"objective": _RETAINING})
    evaluate_every: int = option(4, help="steps between evaluations", minimum=1)
    checkpoint_every: int = option(20, help="steps between saved training states", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        looks_inside = self.objective == "rmu" or self.retain_loss == "hidden"
        if self.layer is not None and not looks_inside:
            raise ConfigError(
                f"layer = {self.layer} would have no effect: only objective 'rmu' and retain_loss 'hidden' read it. "
                "Remove it, or change one of them."
            )
        if self.layer is None and looks_inside:
            object.__setattr__(self, "layer", 1)
        if self.trainable is None:
            object.__setattr__(self, "trainable", "down_projections" if self.objective == "rmu" else "all")
