"""Runs of experiments. The room is also the public function `trace_jax.run`, which has its name.

Example:
  >>> data = {"benchmark": "text", "forget": "forget.jsonl", "retain": "retain.jsonl", "row_length": 32}
  >>> short = {"target.steps": 8, "unlearning.steps": 6, "unlearning.evaluate_every": 3, "evaluation.patching": False}
  >>> run = tj.run(tj.load_config({"name": "mine", "methods": ["uniform", "trace_rows"], "data": data}, short))
  >>> print(run.table())
  At equal forgetting (forget probability ratio <= 0.5), test split
  ...
"""

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
