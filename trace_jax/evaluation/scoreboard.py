"""What methods are compared on, and how the items of a benchmark that has one split are divided for it."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

SPLITS = ("validation", "test")  # settings are chosen on the first, and the second is reported
HALF = "every other question"


@dataclasses.dataclass(frozen=True)
class Scoreboard:
    """Names of the measurements that methods are compared on, on one benchmark."""

    forgetting: str  # lower means more forgotten
    utilities: Mapping[str, bool]  # higher is better; whether the original model's value is to be divided by
    questions: Mapping[str, str]  # by subject of `Task.outcomes`, what is measured; several of one: its harmonic mean
    chance: float | None = None  # `forgetting` of a model that knows nothing, for the report; None: there is none


def halves(count: int) -> dict[str, np.ndarray]:
    """Places of the items of each of our splits, of a benchmark that has one: every other item is of validation."""
    return {split: np.arange(first, count, 2) for first, split in enumerate(SPLITS) if first < count}


def half_outcomes(subject: str, names: Sequence[str], **columns: np.ndarray) -> dict[str, np.ndarray]:
    """`Task.outcomes` of both halves of a subject's items: `question`, a hash of the name, and columns [N]."""
    columns = {"question": np.array([zlib.crc32(name.encode()) for name in names], np.uint32), **columns}
    parts = halves(len(names)).items()
    return {f"{split}/{subject}/{name}": x[half] for split, half in parts for name, x in columns.items()}
