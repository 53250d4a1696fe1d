"""What a run keeps on disk: parameters of a finished stage (one safetensors file, readable by anybody), and training
state (Orbax), saved every few steps, restored after any interruption, on any mesh.
"""

import contextlib
import functools
import gc
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import PreservationPolicy
from orbax.checkpoint.options import MultiprocessingOptions
from safetensors import SafetensorError, safe_open

from trace_jax.checkpoints.checkpoint import check_arrays, create_file
from trace_jax.io.files import is_remote, local_copy, replacing
from trace_jax.parallel.mesh import to_host
from trace_jax.parallel.processes import all_processes, broadcast_from_process_0, is_main

logger = logging.getLogger("trace_jax")


def save_params(path: str | os.PathLike, params: Any, metadata: dict) -> None:
    """Writes nested parameters to `path`, one at a time, with `metadata` (JSON). All processes call it, 0 writes."""
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="."))  # the spelling of the file
    specs = {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in flat.items()}
    about = {"trace_jax": json.dumps(metadata)}
    with replacing(path) if is_main() else contextlib.nullcontext() as temporary:
        file = create_file(temporary, specs, about) if temporary else None
        for name, leaf in flat.items():
            numbers = to_host(leaf)
            if file:
                file.tensors[name].write(numbers)


def load_params(path: str | os.PathLike, abstract: Any) -> Any:
    """Nested parameters of a file whose names, shapes and types must be those of `abstract`, else a ValueError."""
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(abstract, sep="."))
    try:
        with local_copy(path) as local, safe_open(local, framework="flax") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: can't be read as safetensors ({error}). Remove it to make it anew.") from error
    check_arrays(path, tensors, flat)
    return traverse_util.unflatten_dict(tensors, sep=".")


@functools.cache
def _quieten_threads() -> None:
    """Errors in the threads of Orbax are raised where their work is waited for; prints of it in between say nothing."""

    def of_main(show: Callable) -> Callable:
        return lambda *error: show(*error) if threading.current_thread() is threading.main_thread() else None

    sys.excepthook, sys.unraisablehook = of_main(sys.excepthook), of_main(sys.unraisablehook)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager reports its own steps to the preemption service, also from its threads; the loop counts there."""

    def reached_preemption(self, step: int) -> bool:
        return False


class StateStore(PreservationPolicy):
    """Saved states of one run in one directory, named by their step; the two newest are kept, and a protected one.

    A state is written under a temporary name and renamed by Orbax, so that an interruption leaves the previous one.
    Of several processes each writes and reads its own shards in a directory that all of them see; all make the same
    calls, and agree on what is restored. Use as a context manager; leaving it waits for the last write.
    """

    protected = -1  # the step whose state stays whatever is saved after it; -1: none

    def __init__(self, directory: str | os.PathLike, about: dict[str, Any]):
        _quieten_threads()
        self._about = about  # JSON: what made the states (hash of the settings, seed); others are not restored
        # With its processes named Orbax waits for them without the devices, which may be in the middle of a step.
        everyone = MultiprocessingOptions(active_processes=set(range(jax.process_count())))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, cleanup_tmp_directories=True, multiprocessing_options=everyone, create=False
        )
        # One copy of every shard. Orbax would cut copies into parts: programs to compile, and memory on devices.
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        writer = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=everyone)
        path = epath.Path(directory if is_remote(directory) else os.path.abspath(directory))
        path.mkdir(parents=True, exist_ok=True)
        handlers = {"state": writer, "about": ocp.JsonCheckpointHandler()}
        self._manager = _Manager(path, options=options, item_handlers=handlers)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Which states stay: what Orbax asks."""
        newest = len(checkpoints) - 2
        return [index >= newest or one.step == self.protected for index, one in enumerate(checkpoints)]

    def save(self, step: int, state: Any) -> None:
        """Starts writing `state` (a pytree of arrays of any sharding). Its arrays may be donated at once: Orbax waits
        until they are on the host, or on a CPU writes from the arrays, which JAX doesn't donate while they are read.
        """
        if step in self._manager.all_steps():
            return
        about = {**self._described(step), "sums": jax.device_get(_sums(state)).tolist()}
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), about=ocp.args.JsonSave(about))
        with self._told():
            self._manager.save(step, args=arguments)

    def wait(self) -> None:
        """Returns once everything is written; raises what went wrong with writing."""
        with self._told():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What Orbax raises where a state can't be written becomes an OSError for people."""
        try:
            yield
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            why = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error)[:300]
            raise OSError(f"{self._manager.directory}: a state can't be written: {why}.") from error

    def remove(self, step: int) -> None:
        """Removes the state of a step."""
        self._manager.delete(step)

    @property
    def empty(self) -> bool:
        """Whether no state has been saved, of whatever settings."""
        self.wait()
        return broadcast_from_process_0(max(self._manager.all_steps(), default=-1)) < 0

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any]:
        """(step, state) of that `step` or, where it is None or can't be read, of the newest readable state of this run;
        (0, None) if there is none. `like` (arrays or `jax.ShapeDtypeStruct`) gives shapes, types and shardings, which
        need not be those that were saved. What any process can't read is skipped with a warning; it and states of other
        settings are removed, so that they can't be mistaken for this run's later.
        """
        self.wait()
        if step is not None and (state := self._checked(step, like)[0]) is not None:
            return step, state
        unreadable = False
        while (step := broadcast_from_process_0(max(self._manager.all_steps(), default=-1))) >= 0:
            state, problem = self._checked(step, like)
            if state is not None:
                return step, state
            unreadable |= not all_processes(not problem)
            self.remove(step)
        if unreadable:
            logger.warning("no saved state can be restored; starting from the beginning")
        return 0, None

    def _checked(self, step: int, like: Any) -> tuple[Any | None, str]:
        """(state, "") as every process has read it, or (None, what is wrong; nothing if it is of other settings)."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        folder, me = self._manager.directory / str(step), jax.process_index()
        state, sums, problem = None, [], ""
        try:  # without any waiting for other processes, which may fail where this one does not
            about = json.loads((folder / "about" / "metadata").read_text())
            sums = about.pop("sums", [])
            if about == self._described(step):
                alone = MultiprocessingOptions(primary_host=me, active_processes={me})
                reader = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
                state = reader.restore(folder / "state", args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises many types; any unreadable state means: use the one before.
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # the state is good, and would be removed
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        if all_processes(state is not None):
            if all_processes(jax.device_get(_sums(state)).tolist() == sums):
                return state, ""
            problem = "its values are not those that were saved"
        del state
        gc.collect()  # what was read of it hangs in cycles of Orbax's, and memory is for one state
        if problem:
            logger.warning("the state of step %d can't be restored and is skipped: %s", step, problem)
        return None, problem

    def _described(self, step: int) -> dict[str, Any]:
        """Batches and all that is random depend on the seed and the step alone; there is no other position to keep."""
        return {**self._about, "step": step, "data_position": step}

    def __enter__(self) -> "StateStore":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()  # waits as well, where a signal ended the first waiting


@jax.jit
def _sums(state: Any) -> jax.Array:
    """Sum u32 [arrays] of the bits of every array, the same on every mesh: the files hold no checksum of the values."""

    def total(x):
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).sum(dtype=jnp.uint32)

    return jnp.stack([total(x) for x in jax.tree.leaves(state)])
