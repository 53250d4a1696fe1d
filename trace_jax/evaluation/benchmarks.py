"""Which measured numbers say how much was forgotten, and which say at what price, on each benchmark."""

from __future__ import annotations

import dataclasses

from trace_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class UtilityScore:
    """A measurement that should stay high; `relative` ones are divided by the original model's value."""

    name: str
    relative: bool = False


@dataclasses.dataclass(frozen=True)
class Scoreboard:
    """Names of the measurements that methods are compared on.

    Attributes:
      forgetting: lower means more forgotten.
      utilities: higher is better; 1 is the original model once relative ones are divided.
      questions: name of the accuracy measured on each subject's questions.
      chance: value of `forgetting` for a model that knows nothing, for the report; None where there is none.
    """

    forgetting: str
    utilities: tuple[UtilityScore, ...]
    questions: dict[str, str]
    chance: float | None = None

    def accuracy(self, subject: str) -> str:
        """Name of the accuracy on a subject's questions."""
        return self.questions.get(subject, f"{subject}_accuracy")


# On running text there is no question to fail, and the verbatim score is too slow to take along the way. Forgetting
# is then the per-token probability of the forget text relative to the original model, exp(NLL_original - NLL): 1 for
# the original, towards 0 as the text becomes unlikely, and comparable between corpora of different difficulty.
_TEXT = Scoreboard(
    forgetting="forget_probability_ratio",
    utilities=(UtilityScore("neighbour_utility"), UtilityScore("general_utility")),
    questions={"forget": "cloze_accuracy"},
)

SCOREBOARDS = {
    "handbook": Scoreboard(
        forgetting="forget_accuracy",
        utilities=(UtilityScore("neighbour_accuracy", relative=True), UtilityScore("general_utility")),
        questions={"forget": "forget_accuracy", "neighbour": "neighbour_accuracy"},
        chance=0.25,
    ),
    "presidents": _TEXT,
    "text": _TEXT,  # neighbour text is optional there; without it the utility is general_utility alone
}


def scoreboard(benchmark: str) -> Scoreboard:
    """The scoreboard of a benchmark, or a ConfigError that names those there are."""
    if benchmark not in SCOREBOARDS:
        raise ConfigError(f"benchmark is {benchmark!r}; expected one of {', '.join(SCOREBOARDS)}.")
    return SCOREBOARDS[benchmark]
