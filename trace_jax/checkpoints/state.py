"""Training state on disk (Orbax): saved every few steps, restored after any interruption."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

logger = logging.getLogger("trace_jax")


class StateStore:
    """Saved states of one run in one directory, named by their step; the two newest are kept.

    A state is written under a temporary name and renamed by Orbax, so that an interruption leaves the previous one.
    Use as a context manager; leaving it waits for the last write.
    """

    def __init__(self, directory: str | os.PathLike, *, identity: str):
        """`identity` is the hash of the settings that made the states; states of another one are not restored."""
        self._identity = identity
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Starts writing `state` (a pytree of arrays) from a copy on the host; its arrays may be donated at once."""
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(np.array, state)),
            about=ocp.args.JsonSave({"identity": self._identity, "step": step}),
        )
        self._manager.save(step, args=arguments)

    @property
    def empty(self) -> bool:
        """Whether no state has been saved, of whatever settings."""
        self._manager.wait_until_finished()
        return not self._manager.all_steps()

    def restore(self, like: Any) -> tuple[int, Any]:
        """(step, state) of the newest readable state of this identity, or (0, None) if there is none.

        `like` (arrays or `jax.ShapeDtypeStruct`) gives structure, shapes, types and shardings. A state that can't be
        read is skipped with a warning; it and states of other settings are removed, so that they can't be mistaken
        for this run's later.
        """
        self._manager.wait_until_finished()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
                if about == {"identity": self._identity, "step": step}:
                    found = self._manager.restore(
                        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                    )
                    return step, found["state"]
            except Exception as error:  # Orbax raises many types; any unreadable state means: use the one before.
                logger.warning("state of step %d can't be restored (%s: %s)", step, type(error).__name__, error)
            self._manager.delete(step)
        return 0, None

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
