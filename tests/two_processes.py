"""Programs run as two real processes on this machine, joined over gloo, with two simulated devices each."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from trace_jax.parallel.processes import VARIABLES

CLUSTERS = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")
DEVICES = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
"""
JOIN = f"""{DEVICES}
from trace_jax.parallel.processes import start_processes
start_processes(timeout=60)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(program, arguments):
    """A process of `program` (a script or code) for each list of arguments; the environment says which each is."""
    clean = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, *CLUSTERS)}
    clean["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), clean.get("PYTHONPATH", "")])
    address, children = f"127.0.0.1:{free_port()}", []
    for index, own in enumerate(arguments):
        which = dict(zip(VARIABLES, (address, str(len(arguments)), str(index)), strict=True))
        command = [sys.executable, *([program] if isinstance(program, Path) else ["-c", program]), *map(str, own)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(command, env=clean | which, **pipes))
    return children


def run_processes(program, arguments, *, seconds=120):
    """[(exit code, what it printed between < and >, stderr)] of the processes of `launch`.

    Gloo prints too, from several threads at once, so that whole lines can't be told apart.
    """
    children = launch(program, arguments)
    try:
        said = [child.communicate(timeout=seconds) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(c.returncode, re.findall("<(.*?)>", out), err) for c, (out, err) in zip(children, said, strict=True)]
