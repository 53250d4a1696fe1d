"""Settings of optimisation: training a target model, and unlearning from it."""

from __future__ import annotations

import dataclasses

from trace_jax.config import ConfigError, Section, option
from trace_jax.routing.config import RULES
from trace_jax.unlearning.objectives import OBJECTIVES, PAPER, Objective
from trace_jax.unlearning.rules import KEEP, Rules
from trace_jax.unlearning.seuf import FORMS

RETAIN_LOSSES = ("none", "nll", "kl", "hidden")
NORMALIZE = ("count", "batch")
TOPICS = ("mixed", "alternating")
OPTIMIZERS = ("adamw", "adafactor", "sgd", "muon")
ANCHORS = ("forget", "retain")
TRAINABLE = ("all", "experts", "selected_experts", "seuf", "routers_frozen", "down_projections", "lora")
CHOOSING = ("selected_experts", "seuf")  # presets that train some experts of each layer
_RANKING = ("difference", "affinity", "random")  # rules that take a number of experts
SCHEDULES = ("constant", "cosine", "linear")
GRIP = ("none", "project", "realign")
STEERING = tuple(name for name, row in OBJECTIVES.items() if "hidden" in row.needs)
REFUSALS = ("I do not know.", "I can't help with that.", "That is something I have no knowledge of.")
_RETAINING = tuple(name for name, row in OBJECTIVES.items() if row.retains)
_REFUSING = tuple(name for name, row in OBJECTIVES.items() if "refusals" in row.needs)
_REFERRING = tuple(name for name, row in OBJECTIVES.items() if "reference_nll" in row.needs)
_FORMS = (PAPER, *sorted({form for row in OBJECTIVES.values() for form in row.forms}))
_ADAM = {"optimizer": ("adamw", "muon")}  # Muon leaves to Adam what is no matrix


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer, its schedule and clipping (optax)."""

    optimizer: str = option("adamw", help="how gradients become updates", choices=OPTIMIZERS)
    learning_rate: float = option(1e-3, help="peak learning rate", minimum=0.0)
    b1: float | None = option(0.9, help="decay of Adam's first moment", minimum=0.0, maximum=1.0, when=_ADAM)
    b2: float | None = option(0.98, help="decay of Adam's second moment", minimum=0.0, maximum=1.0, when=_ADAM)
    eps: float | None = option(1e-8, help="added to the root of Adam's second moment", minimum=0.0, when=_ADAM)
    momentum: float | None = option(
        {"sgd": 0.9, "muon": 0.95},
        help="decay of the momentum; 0 = none",
        minimum=0.0,
        maximum=1.0,
        when={"optimizer": ("sgd", "muon")},
    )
    weight_decay: float = option(0.0, help="decoupled weight decay", minimum=0.0)
    clip_norm: float = option(1.0, help="largest global gradient norm; 0 = no clipping", minimum=0.0)
    warmup_steps: int = option(0, help="steps of linear warm-up", minimum=0)
    schedule: str = option("constant", help="learning rate after warm-up", choices=SCHEDULES)

    @property
    def optimization(self) -> OptimizerConfig:
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


def _reads(number: str) -> dict[str, float]:
    """The objectives that have a number, with its usual value."""
    return {name: row.numbers[number] for name, row in OBJECTIVES.items() if number in row.numbers}


def _number(number: str, help: str, minimum: float | None = 0.0):
    usual = _reads(number)
    return option(usual, help=help, minimum=minimum, when={"objective": tuple(usual)})


@dataclasses.dataclass(frozen=True)
class UnlearningConfig(OptimizerConfig):
    """One unlearning run: gamma * L_forget + alpha * L_retain (docs/methods.md)."""

    objective: str = option("gradient_difference", help="forget loss", choices=tuple(OBJECTIVES))
    form: str = option(PAPER, help="the paper's forget loss, or that of a released code by name", choices=_FORMS)
    gamma: float | None = option(
        {name: row.gamma for name, row in OBJECTIVES.items()},
        help="coefficient of the forget loss",
        minimum=0.0,
        when={"objective": tuple(OBJECTIVES)},
    )
    retain_loss: str | None = option(
        {name: "hidden" if name in STEERING else "kl" for name in _RETAINING},
        help="loss of a retain token; none leaves the retain set out",
        choices=RETAIN_LOSSES,
        when={"objective": _RETAINING},
    )
    alpha: float | None = option(
        16.0,
        help="coefficient of the retain loss (pdu: before the first step)",
        minimum=0.0,
        when={"retain_loss": RETAIN_LOSSES[1:]},
    )
    normalize: str | None = option(
        "count",
        help="what weighted retain losses are divided by: the valid positions of a batch, or (batch) their weights",
        choices=NORMALIZE,
        when={"retain_loss": RETAIN_LOSSES[1:]},
    )
    nll_ceiling: float | None = _number(
        "nll_ceiling", "a forget row whose mean NLL passes this (nats) is no longer pushed; 0 = no ceiling"
    )
    beta: float | None = _number("beta", "inverse temperature or exponent of the objective (docs/methods.md)", 1e-6)
    beta1: float | None = _number("beta1", "exponent of a token's probability, saturation")
    beta2: float | None = _number("beta2", "exponent of one minus a token's probability, importance")
    delta: float | None = _number("delta", "margin of SimNPO (nats per token)", None)
    steering: float | None = _number("steering", "length of RMU's target, c")
    steering_scale: float | None = _number(
        "steering_scale", "length of the target in mean lengths of the layer's output on the first forget batch"
    )
    task_scale: float | None = _number("task_scale", "how often what was learnt is subtracted")
    dual_rate: float | None = _number("dual_rate", "step size of the coefficient that holds the retain loss down")
    retain_bound: float | None = option(
        {"pdu": None},
        help="largest retain loss that is accepted; 0.05 for kl",
        minimum=0.0,
        when={"objective": ("pdu",)},
    )
    dual_warmup: int | None = option(
        0, help="steps before that coefficient moves", minimum=0, when={"objective": ("pdu",)}
    )
    layer: int | None = option(
        None, help="layer (from 1) whose output RMU steers and `hidden` compares; 1 when one of them is used", minimum=1
    )
    refusals: tuple[str, ...] | None = option(
        REFUSALS, help="answers that the forget set is to get instead; taken in turn", when={"objective": _REFUSING}
    )
    cache_reference: bool | None = option(
        False,
        help="compute the original model's log-probabilities of the forget rows once, and keep them on disk",
        when={"objective": _REFERRING},
    )
    topics: str = option("mixed", help="how several forget topics share the steps", choices=TOPICS)
    trainable: str | tuple[str, ...] | None = option(
        None,
        help="preset, or path patterns of what trains (first match wins; a leading ! freezes); "
        "down_projections for RMU, else all",
    )
    grip: str = option(
        "none",
        help="GRIP holds routers to retain routing: a projection after every step, or a realignment at the end",
        choices=GRIP,
    )
    grip_tokens: int | None = option(
        {"project": 1024, "realign": 16_384},
        help="retain tokens whose routing is protected",
        minimum=1,
        when={"grip": GRIP[1:]},
    )
    grip_null: float | None = option(
        1e-2,
        help="directions of protected inputs with a smaller squared singular value are not protected",
        minimum=0.0,
        when={"grip": ("project",)},
    )
    grip_margin: float | None = option(
        1e-2,
        help="by how much the score of an expert that was not chosen stays below those that were",
        minimum=0.0,
        when={"grip": ("project",)},
    )
    grip_sweeps: int | None = option(
        100, help="most sweeps over protected inputs after a step", minimum=0, when={"grip": ("project",)}
    )
    grip_ridge: float | None = option(
        1e-6,
        help="ridge of the realignment, relative to the mean square of a router's inputs",
        minimum=0.0,
        when={"grip": ("realign",)},
    )
    experts: str | None = option(
        {"selected_experts": "calibration", "seuf": "affinity"},
        help="which experts train: the calibration's, or those of a rule with its usual numbers",
        choices=("calibration", *RULES),
        when={"trainable": CHOOSING},
    )
    experts_top: int | None = option(
        {"selected_experts": 4, "seuf": 1},
        help="how many experts the rule takes",
        minimum=1,
        when={"trainable": CHOOSING, "experts": _RANKING},
    )
    experts_scope: str | None = option(
        {"selected_experts": "layer", "seuf": "model"},
        help="whether that is of each layer or of the model",
        choices=("layer", "model"),
        when={"trainable": CHOOSING, "experts": _RANKING},
    )
    experts_mass: float | None = option(
        0.15,
        help="share p of the forget activations to cover; 0.15 is SEUF's ESFT baseline",
        minimum=0.0,
        maximum=1.0,
        when={"experts": ("cumulative",)},
    )
    lora_rank: int | None = option(
        8, help="columns of a low-rank adapter's first factor", minimum=1, when={"trainable": ("lora",)}
    )
    lora_alpha: float | None = option(
        16.0, help="adapters are multiplied by lora_alpha / lora_rank", minimum=0.0, when={"trainable": ("lora",)}
    )
    anchor: float | None = option(
        {"selected_experts": 0.0, "seuf": 1.0},
        help="coefficient of SEUF's loss that keeps forget tokens on the experts that train; 0 = off",
        minimum=0.0,
        when={"trainable": CHOOSING},
    )
    anchor_form: str | None = option(
        "sum",
        help="over experts: the sum of the paper's equation, or the mean of its code",
        choices=FORMS,
        when={"trainable": CHOOSING},
    )
    steps: int | None = option(None, help="optimizer steps; 60 unless epochs is given", minimum=1)
    epochs: float | None = option(
        None, help="instead of steps: how often the rows of epoch_anchor are gone through", minimum=1e-6
    )
    epoch_anchor: str | None = option(None, help="whose rows epochs counts; forget if unset", choices=ANCHORS)
    forget_batch_size: int = option(8, help="forget rows per step", minimum=1)
    retain_batch_size: int | None = option(
        16, help="retain rows per step", minimum=1, when={"retain_loss": RETAIN_LOSSES[1:]}
    )
    evaluate_every: int = option(4, help="steps between evaluations", minimum=1)
    stop_forgetting: float | None = option(
        None, help="end the run once forgetting, measured on validation, is at or below this"
    )
    stop_utility: float | None = option(None, help="end the run once mean utility on validation is below this")
    keep: str = option(
        "last", help="the state that is the result: the last, or the evaluated one of highest utility", choices=KEEP
    )
    keep_forgetting: float | None = option(
        help="forgetting on validation that a state must be at or below to be kept for its utility",
        when={"keep": ("best_utility",)},
    )
    checkpoint_every: int = option(20, help="steps between saved training states", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        forms = (PAPER, *OBJECTIVES[self.objective].forms)
        if self.form not in forms:
            raise ConfigError(f"form is {self.form!r}; objective {self.objective!r} has {', '.join(forms)}.")
        looks_inside = self.objective in STEERING or self.retain_loss == "hidden"
        if self.layer is not None and not looks_inside:
            raise ConfigError(
                f"layer = {self.layer} would have no effect: only objectives {' and '.join(STEERING)} and retain_loss "
                "'hidden' read it. Remove it, or change one of them."
            )
        if self.layer is None and looks_inside:
            object.__setattr__(self, "layer", 1)
        if self.trainable is None:
            object.__setattr__(self, "trainable", "down_projections" if self.objective in STEERING else "all")
        if self.refusals is not None and not all(text.strip() for text in self.refusals or ("",)):
            raise ConfigError("refusals holds no text, or an empty one; give at least one sentence.")
        self._check_dual()
        self._check_length()

    def _check_dual(self) -> None:
        if self.objective != "pdu":
            return
        if self.retain_loss == "none":
            raise ConfigError(
                "retain_loss is 'none'; objective 'pdu' holds the retain loss below a bound and needs one."
            )
        if self.retain_bound is None and self.retain_loss != "kl":
            raise ConfigError(
                f"retain_bound is needed when retain_loss is {self.retain_loss!r}: the largest mean retain loss that "
                "is accepted, for example the original model's plus 0.05."
            )
        if self.retain_bound is None:
            object.__setattr__(self, "retain_bound", 0.05)

    def _check_length(self) -> None:
        if self.epochs is None:
            if self.epoch_anchor is not None:
                raise ConfigError(f"epoch_anchor = {self.epoch_anchor!r} would have no effect: epochs is not set.")
            object.__setattr__(self, "steps", self.steps or 60)
            return
        if self.steps is not None:
            raise ConfigError(
                f"steps is {self.steps} and epochs is {self.epochs:g}; a run has one length. Set one of them to None."
            )
        object.__setattr__(self, "epoch_anchor", self.epoch_anchor or "forget")
        if self.epoch_anchor == "retain" and not self.retains:
            raise ConfigError("epoch_anchor is 'retain', but there is no retain term; set it to 'forget'.")

    @property
    def rules(self) -> Rules:
        """When the run ends early, and which state it keeps."""
        return Rules(self.stop_forgetting, self.stop_utility, self.keep, self.keep_forgetting)

    def check_online(self) -> None:
        """Raises ConfigError where retain tokens can't be weighed by their present routing."""
        if self.normalize == "batch":
            raise ConfigError(
                "normalize is 'batch', and routing 'online': what a batch would be divided by is known only once all "
                "of it has been routed. Set normalize to 'count', or routing to 'offline' or 'recalibrated'."
            )

    @property
    def row(self) -> Objective:
        """The objective in the form that is asked for."""
        return OBJECTIVES[self.objective].form(self.form)

    @property
    def retains(self) -> bool:
        """Whether there is a retain term."""
        return self.retain_loss not in (None, "none")
