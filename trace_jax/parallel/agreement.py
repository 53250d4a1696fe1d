"""What several processes must decide alike, although each sees only its own files and errors."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def main_says(number: int) -> int:
    """The number (below 2^31) that process 0 gives; all processes must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def everywhere(fact: bool) -> bool:
    """Whether it is true in every process; all processes must call it."""
    return fact if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(fact))))
