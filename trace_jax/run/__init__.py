"""Runs of experiments. The room is also the public function `trace_jax.run`, which has its name."""

import os
import sys
import types
from typing import Any

from trace_jax.config import checked


class _Room(types.ModuleType):
    def __call__(self, config: Any, workdir: str | os.PathLike | None = None, *, overwrite: bool = False) -> Any:
        """As `trace_jax.run.methods.run`."""
        from trace_jax.run.methods import run

        return checked(run)(config, workdir, overwrite=overwrite)


sys.modules[__name__].__class__ = _Room
