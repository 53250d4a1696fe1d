"""Runs of experiments. The room is also the public function `trace_jax.run`, which has its name."""

import sys
import types

from trace_jax.config import checked


class _Room(types.ModuleType):
    def __call__(self, config, workdir, *, overwrite: bool = False) -> str:
        """As `trace_jax.run.methods.run`."""
        from trace_jax.run.methods import run

        return checked(run)(config, workdir, overwrite=overwrite)


sys.modules[__name__].__class__ = _Room
