"""Which attacks an unlearned model has to stand, and how hard they try."""

from __future__ import annotations

import dataclasses

from trace_jax.config import ConfigError, Section, option
from trace_jax.unlearning.config import OptimizerConfig

BITS = tuple(range(2, 9))


@dataclasses.dataclass(frozen=True)
class _TrainingOnConfig(Section):
    """Training of all parameters that goes on. Defaults: MUSE's relearning (100 steps of 4 rows at 1e-5)."""

    steps: int = option(100, help="optimizer steps", minimum=1)
    evaluate_every: int = option(25, help="steps between evaluations, of which the worst counts", minimum=1)
    batch_size: int = option(4, help="rows per step", minimum=1)
    learning_rate: float = option(1e-5, help="learning rate, constant", minimum=0.0)
    optimizer: str = option("adamw", help="how gradients become updates", choices=("adamw", "adafactor", "sgd"))

    @property
    def optimization(self) -> OptimizerConfig:
        """The optimizer's settings."""
        return OptimizerConfig(optimizer=self.optimizer, learning_rate=self.learning_rate)


@dataclasses.dataclass(frozen=True)
class RelearningConfig(_TrainingOnConfig):
    """Training goes on, on some of the forget rows."""

    share: float = option(0.1, help="share of the forget rows that is trained on; 1 = all", minimum=0.0, maximum=1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.share == 0:
            raise ConfigError("share is 0; the attack needs forget rows to train on. Give a share above 0, at most 1.")


@dataclasses.dataclass(frozen=True)
class BenignRelearningConfig(_TrainingOnConfig):
    """Training goes on, on text that has nothing to do with the forget set (2406.13356, 2409.18025)."""

    source: str | None = option(
        None, help="that text (`trace_jax.data.sources.read_source`); None: rows of the retain corpus, neighbours aside"
    )


@dataclasses.dataclass(frozen=True)
class QuantizationConfig(Section):
    """Weights rounded to few bits (2410.16454)."""

    bits: tuple[int, ...] = option((8, 4), help="bits of a weight, one attack each", choices=BITS)

    def __post_init__(self):
        super().__post_init__()
        if not self.bits:
            raise ConfigError("bits is an empty list; give at least one number of bits, such as (8, 4).")


@dataclasses.dataclass(frozen=True)
class RouterSwapConfig(Section):
    """The original routers put back under the unlearned experts. Nothing to set."""


@dataclasses.dataclass(frozen=True)
class ExpertForcingConfig(Section):
    """Tokens forced to the experts that the original model sends them to. Nothing to set."""


@dataclasses.dataclass(frozen=True)
class PromptingConfig(Section):
    """The same questions and texts, asked for in other ways."""

    examples: tuple[int, ...] = option((3,), help="solved examples before a query, one attack each", minimum=1)
    prefixes: tuple[float, ...] = option(
        (0.5, 0.75), help="share of a forget text that is given, the rest is to come; one attack each"
    )
    paraphrases: str | None = option(
        None, help="queries in other words (`trace_jax.attacks.queries.read_paraphrases`); the handbook has its own"
    )

    def __post_init__(self):
        super().__post_init__()
        if wrong := [share for share in self.prefixes if not 0 < share < 1]:
            raise ConfigError(f"prefixes has {wrong[0]}; expected shares above 0 and below 1, such as (0.5, 0.75).")


@dataclasses.dataclass(frozen=True)
class AttacksConfig(Section):
    """An attack is run if its section is given; `{}` takes its defaults."""

    relearning: RelearningConfig | None = None
    benign_relearning: BenignRelearningConfig | None = None
    quantization: QuantizationConfig | None = None
    router_swap: RouterSwapConfig | None = None
    expert_forcing: ExpertForcingConfig | None = None
    prompting: PromptingConfig | None = None

    @property
    def chosen(self) -> dict[str, Section]:
        """The attacks that are run, with their settings, in the order of the fields."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: settings for name, settings in given.items() if settings is not None}
