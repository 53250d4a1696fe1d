"""Settings of unlearning. Those of an objective and of an optimizer stand beside what reads them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from trace_jax.config import ConfigError, Section, Variant, option
from trace_jax.routing import config as routing
from trace_jax.unlearning.objectives import Objective, RepSelect, Steering
from trace_jax.unlearning.optimizer import SGD, AdamW, OptimizerConfig

EXPERT_MATRICES = _, EXPERTS_DOWN = "layers/experts/gate_up", "layers/experts/down"
_ANCHOR = "coefficient of SEUF's loss that keeps forget tokens on the experts that train; 0 = off"


class Experts(routing.SelectionRule):
    """Which experts train: those of a selection rule that reads statistics alone, or those that the calibration of the
    retain weights selected.
    """

    kinds: ClassVar = {name: rule for name, rule in routing.SelectionRule.kinds.items() if name != "sensitivity"}


class Calibrated(Experts, name="calibration"): ...


class Covering(Experts, routing.Cumulative, name="cumulative"):
    """ESFT's own choice: the fewest experts of a layer that cover `mass`, whatever the retain set uses."""

    critical: ClassVar = False
    mass: float = option(0.15, help="share of forget activations; 0.15: SEUF's ESFT baseline", minimum=0.0, maximum=1.0)


class Trainable(Variant):
    """Trainable parameters: a preset, or `patterns` of paths; the first that matches decides, a leading ! freezes."""

    patterns: ClassVar[tuple[str, ...]]
    experts: ClassVar[Any] = None  # which train, where only some do
    anchor: ClassVar[float] = 0.0
    anchor_form: ClassVar[str] = "sum"
    rank: ClassVar[Any] = None  # of low-rank factors, where they train

    @classmethod
    def spelled_out(cls, value):
        """A list of patterns, or one, stands for `patterns`."""
        listed = [value] if isinstance(value, str) and value not in cls.kinds else value
        return {"name": "patterns", "patterns": listed} if isinstance(listed, (list, tuple)) else value


class All(Trainable, name="all"):
    patterns = ("*",)


class ExpertsOnly(Trainable, name="experts"):
    patterns = ("layers/experts/*",)


class RoutersFrozen(Trainable, name="routers_frozen"):
    patterns = ("!layers/router*", "*")


class DownProjections(Trainable, name="down_projections"):
    patterns = (EXPERTS_DOWN, "dense/mlp/down")


class Patterns(Trainable, name="patterns"):
    patterns: tuple[str, ...] = option(help="of paths")


class SomeExperts(Section):
    """Presets that train some experts of each layer; seuf trains the routers of their layers, too."""

    experts: Experts = option("calibration", help="which experts train")
    anchor: float = option(0.0, help=_ANCHOR, minimum=0.0)
    anchor_form: str = option(
        "sum", help="over experts: the sum of the paper's equation, or the mean of its code", choices=("sum", "mean")
    )


class SelectedExperts(SomeExperts, Trainable, name="selected_experts"):
    patterns = ("layers/experts/*",)


class SEUF(SomeExperts, Trainable, name="seuf"):
    experts: Experts = option(routing.Affinity(top=1, scope="model"), help="which experts train")
    anchor: float = option(1.0, help=_ANCHOR, minimum=0.0)
    patterns = ("layers/experts/*", "layers/router*")


class Lora(Trainable, name="lora"):
    """Low-rank factors of every projection of attention and of the matrices of the experts."""

    rank: int = option(8, help="columns of a low-rank adapter's first factor", minimum=1)
    alpha: float = option(16.0, help="adapters are multiplied by alpha / rank", minimum=0.0)
    patterns = ("*/[qkvo]", "*/q_down", "*/q_up", "*/kv_down", "*/kv_up", *EXPERT_MATRICES)


class RetainLoss(Variant):
    """The loss of a retain token, which its weight multiplies: nll -log p(x_{t+1}); kl KL(p_ref || p) over the
    vocabulary; none leaves the retain set out.
    """


class NoRetain(RetainLoss, name="none"): ...


class RetainNLL(RetainLoss, name="nll"): ...


class RetainKL(RetainLoss, name="kl"): ...


class RetainHidden(RetainLoss, name="hidden"):
    """|h - h_ref|^2 / D at the output of a layer (RMU's retain term, 2403.03218)."""

    layer: int = option(0, help="layer (from 1) whose output is compared; 0 = the steered one, or 1", minimum=0)


class Grip(Variant):
    """GRIP holds routers to retain routing (`trace_jax.unlearning.grip`): by a projection after every step, or a
    realignment at the end.
    """


class NoGrip(Grip, name="none"): ...


class GripProject(Grip, name="project"):
    tokens: int = option(1024, help="retain tokens whose routing is protected", minimum=1)
    null: float = option(1e-2, help="smallest squared singular value of inputs that is protected", minimum=0.0)
    margin: float = option(1e-2, help="by how much scores of other experts stay below the chosen ones'", minimum=0.0)
    sweeps: int = option(100, help="most sweeps over protected inputs after a step", minimum=0)


class GripRealign(Grip, name="realign"):
    tokens: int = option(16_384, help="retain tokens whose routing is protected", minimum=1)
    ridge: float = option(1e-6, help="of the realignment, relative to the inputs' mean square", minimum=0.0)


class Keep(Variant):
    """Which state is the result: that which the run ends with, or that of the evaluation with the highest utility among
    those that forgot enough; where there is none, that with the lowest forgetting.
    """


class KeepLast(Keep, name="last"): ...


class KeepBest(Keep, name="best_utility"):
    forgetting: float = option(help="forgetting on validation that a state must be at or below")


class Rules(Section):
    """What is asked of the evaluations of a run."""

    stop_forgetting: float | None = option(None, help="end the run once forgetting on validation is at or below this")
    stop_utility: float | None = option(None, help="end the run once mean utility on validation is below this")
    keep: Keep = option("last", help="the state that is the result: the last, or the evaluated one of highest utility")

    @property
    def keeps_best(self) -> bool:
        return isinstance(self.keep, KeepBest)

    @property
    def needs_evaluation(self) -> bool:
        return self.keeps_best or self.stop_forgetting is not None or self.stop_utility is not None

    def check(self, step: int, evaluated: Any) -> None:
        """Raises ValueError where a rule needs a number that an evaluation does not give."""
        for name, rule in (("forgetting", self.stop_forgetting), ("utility", self.stop_utility)):
            if (self.keeps_best or rule is not None) and getattr(evaluated, name) is None:
                raise ValueError(
                    f"the evaluation at step {step} gives no {name}, which stop_forgetting, stop_utility or keep "
                    "reads; let `evaluate` return an `Evaluated` with it, or remove the rule."
                )

    def stops(self, step: int, evaluated: Any) -> str:
        """Why the run ends at an `Evaluated` state, or nothing."""
        if self.stop_forgetting is not None and evaluated.forgetting <= self.stop_forgetting:
            reached = f"reached stop_forgetting {self.stop_forgetting:g}"
            return f"forgetting {evaluated.forgetting:.4g} {reached} at step {step}"
        if self.stop_utility is not None and evaluated.utility < self.stop_utility:
            return f"utility {evaluated.utility:.4g} fell below stop_utility {self.stop_utility:g} at step {step}"
        return ""

    def best(self, evaluations: Mapping[int, Any]) -> int:
        """The step whose state is the result, of those with an `Evaluated` each; of equals the first."""
        bound = self.keep.forgetting if isinstance(self.keep, KeepBest) else -math.inf
        reached = [step for step, evaluated in evaluations.items() if evaluated.forgetting <= bound]
        if reached:
            return max(reached, key=lambda step: evaluations[step].utility)
        return min(evaluations, key=lambda step: evaluations[step].forgetting)


class UnlearningConfig(Rules, OptimizerConfig):
    """One unlearning run: gamma * L_forget + alpha * L_retain (docs/methods.md).

    Example:
      >>> config = tj.UnlearningConfig(objective={"name": "npo", "beta": 0.2}, alpha=4, steps=100)
      >>> config.objective.beta, config.retain_loss.name, config.alpha
      (0.2, 'kl', 4.0)
    """

    OF_RETAIN: ClassVar = ("retain_loss", "alpha", "normalize", "retain_batch_size")  # read with a retain term

    objective: Objective = option("gradient_difference", help="forget loss")
    retain_loss: RetainLoss = option(
        lambda config: config.objective.usual_retain_loss,
        help="loss of a retain token; none leaves the retain set out; kl unless the objective says otherwise",
    )
    alpha: float = option(16.0, help="coefficient of the retain loss (pdu: before the first step)", minimum=0.0)
    normalize: str = option(
        "count",
        help="what weighted retain losses are divided by: the valid positions of a batch, or (batch) their weights",
        choices=("count", "batch"),
    )
    topics: str = option("mixed", help="how several forget topics share the steps", choices=("mixed", "alternating"))
    trainable: Trainable = option(
        lambda config: config.objective.usual_trainable,
        help="preset, or path patterns of trainable parameters; down_projections for RMU, else all",
    )
    grip: Grip = option("none", help="whether and how routers are held to retain routing")
    epochs: float = option(0.0, help="instead of steps: passes over the rows of epoch_anchor; 0 = steps", minimum=0.0)
    epoch_anchor: str = option("forget", help="whose rows epochs counts", choices=("forget", "retain"))
    steps: int = option(lambda config: 0 if config.epochs else 60, help="optimizer steps; 60 without epochs", minimum=0)
    forget_batch_size: int = option(8, help="forget rows per step", minimum=1)
    retain_batch_size: int = option(16, help="retain rows per step", minimum=1)
    evaluate_every: int = option(4, help="steps between evaluations", minimum=1)
    checkpoint_every: int = option(20, help="steps between saved training states", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if self.retains and not self.objective.retains:
            raise ConfigError(
                f"retain_loss {self.retain_loss.name!r} would have no effect: objective {self.objective.name!r} has no "
                "retain term. Leave it out, or choose another objective."
            )
        for name in () if self.retains else self.OF_RETAIN[1:]:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ConfigError(f"{name} = {value!r} would have no effect: there is no retain term. Leave it out.")
        object.__setattr__(self, "objective", self.objective.completed(self.retain_loss.name))
        if isinstance(self.retain_loss, RetainHidden):
            steered = self.layer or 1
            if self.retain_loss.layer not in (0, steered):
                own = f"retain_loss.layer is {self.retain_loss.layer}, and the objective steers layer {steered}"
                raise ConfigError(f"{own}; one layer is looked at. Leave out retain_loss.layer.")
            object.__setattr__(self, "retain_loss", RetainHidden(steered))
        if bool(self.epochs) == bool(self.steps):
            raise ConfigError(
                f"steps is {self.steps} and epochs is {self.epochs:g}; a run has one length. Set one to 0."
            )
        if self.epoch_anchor == "retain" and not (self.epochs and self.retains):
            missing = "epochs is not set" if not self.epochs else "there is no retain term"
            raise ConfigError(f"epoch_anchor = 'retain' would have no effect: {missing}. Leave it out.")
        if isinstance(self.objective, RepSelect) and (self.weight_decay or self.optimizer not in (AdamW(), SGD(0.0))):
            raise ConfigError("optimizer and weight_decay would have no effect: 'repselect' takes plain steps.")

    @property
    def optimization(self) -> OptimizerConfig:
        """The optimizer's settings alone."""
        plain = {"optimizer": SGD(0.0)} if isinstance(self.objective, RepSelect) else {}
        return dataclasses.replace(super().optimization, **plain)

    def check_online(self) -> None:
        """Raises ConfigError where retain tokens can't be weighed by their present routing."""
        if self.normalize == "batch":
            raise ConfigError(
                "normalize is 'batch', and routing 'online': what a batch would be divided by is known only once all "
                "of it has been routed. Set normalize to 'count', or routing to 'offline' or 'recalibrated'."
            )

    def check_layer(self, num_layers: int) -> None:
        """Raises ConfigError where the model lacks the layer that a loss looks at, or is deep and none is named."""
        if self.layer > num_layers:
            raise ConfigError(f"layer is {self.layer}, but the model has {num_layers} layers.")
        if isinstance(self.objective, Steering) and not self.objective.layer and num_layers > 4:
            raise ConfigError(
                f"objective {self.objective.name!r} steers the output of one layer, and the model has {num_layers}: "
                "set unlearning.objective.layer, counted from 1 (RMU's authors take 8 of 32)."
            )

    @property
    def retains(self) -> bool:
        """Whether there is a retain term."""
        return self.retain_loss.name != "none"

    @property
    def batches(self) -> tuple[int, ...]:
        """Rows of each batch of a step."""
        return (self.forget_batch_size, *[self.retain_batch_size] * self.retains)

    @property
    def layer(self) -> int:
        """The layer (from 1) whose output a loss looks at; 0: none does."""
        if isinstance(self.objective, Steering):
            return self.objective.layer or 1
        return getattr(self.retain_loss, "layer", 0)

    @property
    def layers(self) -> tuple[int, int] | None:
        """(first, last) of the layers that train, from 1: RMU's authors train the steered one and the two below."""
        steers = isinstance(self.objective, Steering) and isinstance(self.trainable, DownProjections)
        return (max(1, self.layer - 2), self.layer) if steers else None
