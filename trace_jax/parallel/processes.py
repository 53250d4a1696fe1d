"""Several processes, one computation: how they find each other, wait for each other and decide alike; their memory."""

import argparse
import contextlib
import ctypes
import glob
import importlib.util
import multiprocessing
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from trace_jax.config import ConfigError

# What --coordinator, --num-processes and --process-id say, for launchers that set variables.
VARIABLES = ("TRACE_JAX_COORDINATOR", "TRACE_JAX_NUM_PROCESSES", "TRACE_JAX_PROCESS_ID")
_SILENT = 45  # seconds without a sign of life after which JAX takes a process for dead; its default is 100


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The options `coordinator`, `num_processes` and `process_id` of a command that runs on several hosts."""
    group = parser.add_argument_group("several processes", "found by itself on Cloud TPU, GKE, Slurm and Open MPI")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")


def start_processes(
    coordinator: str | None = None,
    num_processes: int | str | None = None,
    process_id: int | str | None = None,
    *,
    timeout: float = 300.0,
) -> int:
    """Joins the other processes of a run, if there are any. Returns their number. Call before any device is used.

    Without arguments the environment decides: `VARIABLES`, Slurm (srun), Open MPI (mpirun), a TPU slice on Google
    Kubernetes Engine or on Cloud TPU. A single process does nothing. After `timeout` seconds without the others the
    process ends with exit code 2 and says whom it waited for; when one has ended without a word, JAX ends the others
    within a minute. The three arguments go together: `coordinator` is the HOST:PORT of process 0, reachable from all.
    ConfigError where one is missing or they contradict each other.
    """
    values: tuple[Any, ...] = (coordinator, num_processes, process_id)
    address: tuple[Any, ...] = ()
    if values == (None,) * 3:
        values = tuple(map(os.environ.get, VARIABLES))
    if values == (None,) * 3:
        said_by, count = expected_processes()
        failure = f"{said_by} says that there are {count} processes, but they have not all come. "
        failure += "Start one on every host (srun, mpirun, or the launcher of scripts/); see docs/scaling.md."
    else:
        address = where, count, index = _checked(*values)
        if index:
            failure = f"process {index} of {count} got no answer from the coordinator {where}. "
            failure += "Process 0 must be running there with the same --coordinator, and the port must be open."
        else:
            failure = f"process 0 waited at {where}, and not all of the other {count - 1} came. "
            failure += "Start each with the same --coordinator and --num-processes and its own --process-id."
    if count == 1:
        return 1

    def end() -> None:  # JAX ends the process without a word for people when the others don't come
        print(f"trace_jax: {failure} (waited {timeout:g} s)", file=sys.stderr, flush=True)
        os._exit(2)

    alarm = threading.Timer(timeout, end)
    alarm.daemon = True
    alarm.start()
    try:
        limits = {"initialization_timeout": round(timeout) + 60, "heartbeat_timeout_seconds": _SILENT}
        jax.distributed.initialize(*address, **limits)
    finally:
        alarm.cancel()
    return count


def _checked(coordinator, num_processes, process_id) -> tuple[str, int, int]:
    values = {"coordinator HOST:PORT": coordinator, "num-processes N": num_processes, "process-id I": process_id}
    if missing := [f"--{name}" for name, value in values.items() if value is None]:
        raise ConfigError(f"{', '.join(missing)}: missing; the three are given together ({', '.join(VARIABLES)}).")
    try:
        count, index = int(num_processes), int(process_id)
    except ValueError:
        said = f"--num-processes is {num_processes!r} and --process-id {process_id!r}"
        raise ConfigError(f"{said}; expected whole numbers.") from None
    if count < 1 or not 0 <= index < count:
        raise ConfigError(f"--process-id is {index} of {count} processes; expected a number from 0 to {count - 1}.")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ConfigError(f"--coordinator is {coordinator!r}; expected HOST:PORT of process 0, such as 10.0.0.1:8476.")
    return coordinator, count, index


def expected_processes() -> tuple[str, int]:
    """(who says so, how many processes) as the environment has it that started this one.

    `jax.distributed.initialize` detects clusters too, but fails where there is none.
    """
    variables = os.environ
    if "SLURM_STEP_NODELIST" in variables and "SLURM_PROCID" in variables:
        return "Slurm", int(variables.get("SLURM_NTASKS", "1"))
    if "OMPI_COMM_WORLD_SIZE" in variables:
        return "Open MPI", int(variables["OMPI_COMM_WORLD_SIZE"])
    if hosts := variables.get("TPU_WORKER_HOSTNAMES"):
        return "TPU_WORKER_HOSTNAMES", len(hosts.split(","))
    said_by = "the metadata of the Cloud TPU"
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    skip = "TPU_SKIP_MDS_QUERY" in variables or variables.get("JAX_PLATFORMS", "tpu") == "cpu"
    if not chips or skip or importlib.util.find_spec("libtpu") is None:
        return said_by, 1
    server = variables.get("GCE_METADATA_IP", "metadata.google.internal")
    address = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return said_by, len(answer.read().decode().split(","))
    except OSError:
        return said_by, 1


def check_joined() -> None:
    """Raises ConfigError if the devices belong to several processes that were not started as one."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"there are {jax.process_count()} processes that don't know of each other; start them with a launcher of "
            "scripts/, or with --coordinator, --num-processes and --process-id (docs/scaling.md)."
        )


def is_main() -> bool:
    """Whether this process writes files and speaks: process 0, or the only one. Starts no device when it is alone."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here: what process 0 wrote before it, the others can read after it."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(name)


def broadcast_from_process_0(number: int) -> int:
    """The number (below 2^31) that process 0 has; all processes must call it."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def all_processes(flag: bool) -> bool:
    """Whether it is true in every process; all processes must call it."""
    return flag if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(flag))))


def keep_freed_memory() -> bool:
    """Makes malloc reuse large buffers; call once, before the first computation. True if it took effect.

    XLA on CPU allocates the temporaries of a step anew each time. glibc maps such buffers from the system and unmaps
    them when freed, so that every step pays a page fault per 4 KiB: a third of the time of a small training step
    (measured by benchmarks/train_step.py). Peak memory is the same; it only isn't returned between steps.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # the C library isn't glibc
        return False
    # M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD of glibc's <malloc.h>
    return all([mallopt(name, value) == 1 for name, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1))])


def usable_cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SAVING = 60.0  # seconds that workers have to save their states when one has failed


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes side by side, each on its share of the cores. On an error what waits is dropped, what runs ended."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (context.Value("i", 0), workers)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running = multiprocessing.active_children()
            for worker in running:
                worker.terminate()
            until = time.monotonic() + SAVING
            for worker in running:  # one would wait for ever for a lock that another held when it was ended
                worker.join(max(0.0, until - time.monotonic()))
                worker.kill()
            raise


def _start_worker(counter, workers: int) -> None:
    """Pins the process to its share of the cores before JAX starts its threads: side by side beats interleaved. It ends
    with its parent, however that ends; left alone it would wait for work for ever.
    """
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[number % workers :: workers]) or set(cores))
