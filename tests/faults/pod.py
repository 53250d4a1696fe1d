"""A TPU slice in small: four hosts of two simulated devices, started by the script that scripts/launch.py prints.

Only what surrounds the script is ours: gcloud, which runs a host's part in a folder; the installation; the environment
of a TPU host, and a store that answers as Google's, which hosts reach by gcsfs and TensorStore.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.harness import ROOT, Place, environment, numbers, plain, start, wait
from tests.faults.interruptions import Tried
from tests.run.gcs import Bucket, for_other_processes
from tests.two_processes import CLUSTERS, VARIABLES, free_port

HOSTS, DEVICES, ACCELERATOR = 4, 2, "v5e:4x4"
GCLOUD = """#!/bin/bash
# describe finds no slice; scp copies to every host; ssh runs the command on one, or on all side by side
set -u
command="" archive=""
for word; do case "$word" in --command=*) command="${word#--command=}" ;; *.tgz) archive="$word" ;; esac; done
case "$4" in
  describe) exit 1 ;;
  scp) for host in "$POD"/host-*; do cp "$archive" "$host"; done ;;
  ssh)
    case "$*" in *--worker=all*) hosts=("$POD"/host-*) ;; *) hosts=("$POD/host-0") ;; esac
    for host in "${hosts[@]}"; do
      (cd "$host" && HOME="$host" TPU_WORKER_ID="${host##*-}" PATH="$POD/bin:$PATH" exec bash -c "$command") &
    done
    wait ;;
esac
"""
# `python3 -m uv venv` makes an interpreter; the others have nothing to install.
PYTHON3 = """#!/bin/bash
if [ "$3" = venv ]; then mkdir -p .venv/bin; ln -sf "$POD/bin/python" .venv/bin/python; fi
"""
PYTHON = """#!/bin/bash
sleep "$(cat "$HOME/late" 2>/dev/null || echo 0)"
PYTHONPATH="$POD/bin:$PWD" exec {python} "$@"
"""
# The clock of a host, by as many seconds as its file says.
CLOCK = """
import os, time
if os.path.exists(late := os.path.expanduser("~/clock")):
    offset, clock, clock_ns = float(open(late).read()), time.time, time.time_ns
    time.time, time.time_ns = lambda: clock() + offset, lambda: clock_ns() + int(offset * 1e9)
"""

SETTINGS = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8},
    "unlearning": {"steps": 24, "evaluate_every": 12, "checkpoint_every": 4, "forget_batch_size": 8},
    "target": {"steps": 8, "batch_size": 8, "checkpoint_every": 3, "retrained": True},
    "evaluation": {"batch_size": 16, "levels": (0.99,), "max_rows": 8, "max_prompts": 4, "max_gradients": 0},
    "calibration": {"routing": {"name": "recalibrated", "every": 5}, "rule": {"name": "difference", "top": 1}},
    "attacks": {"relearning": {"steps": (2,), "batch_size": 2, "learning_rate": 1e-3}, "router_swap": {}},
}
SETTINGS["model"] |= {"num_heads": 2, "num_kv_heads": 2, "head_size": 8, "vocab_size": 320}
SETTINGS["unlearning"] |= {"retain_batch_size": 8}
SETTINGS["evaluation"] |= {"bootstrap": 100}
MOST = 60.0  # seconds in which the others must have ended when one has


class Host(NamedTuple):
    """How a host's process ended."""

    said: str
    seconds: float  # after the launch, or after another was killed

    def problem(self, *, of_death: bool = False) -> str:
        """What should not have been, "" if nothing; `of_death`: another had died."""
        if "Traceback (most recent call last)" in self.said:
            return f"a traceback: {self.said[-800:]}"
        if of_death and self.seconds > MOST:
            return f"ended only {self.seconds:.0f} s after another had died"
        told = "another task died" in self.said or "trace_jax: " in self.said
        return f"said nothing of the death of another: {self.said[-300:]}" if of_death and not told else ""


class Pod:
    """A folder with the hosts. `late` and `clock`: seconds by host."""

    def __init__(self, folder: Path, *, late: Mapping[int, float] = {}, clock: Mapping[int, float] = {}):
        self._hosts = [folder / f"host-{index}" for index in range(HOSTS)]
        self._folder = folder
        programs = {"gcloud": GCLOUD, "python3": PYTHON3, "python": PYTHON.format(python=sys.executable)}
        (folder / "bin").mkdir(parents=True)
        for name, text in {**programs, "sitecustomize.py": CLOCK}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        for index, host in enumerate(self._hosts):
            host.mkdir()
            for name, values in (("late", late), ("clock", clock)):
                if index in values:
                    (host / name).write_text(str(values[index]))

    def run(self, command: Sequence[str], *, kill: int | None = None, when: str = "", most: float = 900) -> list[Host]:
        """All hosts through `trace_jax.main COMMAND`; the host `kill` is killed when process 0 has said `when`."""
        for host in self._hosts:
            for name in ("run.log", "run.pid"):
                (host / "trace_jax" / name).unlink(missing_ok=True)
        launch = [sys.executable, str(ROOT / "scripts" / "launch.py"), "tpu", "--accelerator", ACCELERATOR]
        launch += ["--zone", "a", "--name", "small", *command]
        began, ended = time.monotonic(), {}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        with subprocess.Popen(launch, env=self._environment(), **quiet) as launcher:
            while len(ended) < HOSTS and time.monotonic() - began < most:
                time.sleep(0.2)
                if kill is not None and when in self._said(0):
                    self._kill(kill)
                    kill, began = None, time.monotonic()
                for index in range(HOSTS):
                    if index not in ended and self._has_ended(index):
                        ended[index] = time.monotonic() - began
            for index in range(HOSTS):
                self._kill(index)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)
        return [Host(self._said(index), ended.get(index, most)) for index in range(HOSTS)]

    def _environment(self) -> dict[str, str]:
        """Of the launcher, and of a host, which TPU_WORKER_ID tells apart."""
        plain = {name: value for name, value in environment().items() if name not in (*VARIABLES, *CLUSTERS)}
        slice_of = {"JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * HOSTS)}
        slice_of |= {
            "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
        }
        slice_of |= {"JAX_NUM_CPU_DEVICES": str(DEVICES), "JAX_COORDINATOR_PORT": str(free_port())}
        path = f"{self._folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**plain, **slice_of, **for_other_processes(), "POD": str(self._folder), "PATH": path}

    def _said(self, index: int) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self._hosts[index] / "trace_jax" / "run.log").read_text(errors="replace")
        return ""

    def _pid(self, index: int) -> int | None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((self._hosts[index] / "trace_jax" / "run.pid").read_text())
        return None

    def _kill(self, index: int) -> None:
        if (pid := self._pid(index)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _has_ended(self, index: int) -> bool:
        if (pid := self._pid(index)) is None:
            return False  # it has not begun
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
        return True


def command(place: Place, workdir: str) -> list[str]:
    """A whole run with recalibration, patching and attacks, whose programs are small."""
    values = {f"{section}.{name}": value for section, own in SETTINGS.items() for name, value in own.items()}
    files = {f"data.{name}": str(place.folder / f"{name}.jsonl") for name in ("forget", "retain", "neighbour")}
    values |= {**files, "data.row_length": 32, "data.vocab_size": 320, "methods": ("uniform", "trace_rows")}
    options = [f"--config.{name}={value}" for name, value in values.items()]
    return ["run", "--config", "configs/text.py", "--workdir", workdir, *options]


class Trial:
    """Runs in a pod, at addresses of their own, and what was found there."""

    def __init__(self, place: Place):
        self._place = place
        self.command = command(place, "gs://bucket/run")

    def through(self, deaths: Sequence[int] = (), **how: Any) -> tuple[str, Any]:
        """(what should not have been, results); `deaths`: hosts that are killed as they unlearn, until nobody is."""
        Bucket.store.clear()
        pod, problems = Pod(Path(tempfile.mkdtemp(dir=self._place.folder)), **how), []
        for host in deaths:
            ends = pod.run(self.command, kill=host, when="unlearning with uniform: compiling")
            problems += [f"host {i}: {ended.problem(of_death=True)}" for i, ended in enumerate(ends) if i != host]
        problems += [f"host {i}: {ended.problem()}" for i, ended in enumerate(pod.run(self.command))]
        problems = [problem for problem in problems if not problem.endswith(": ")]
        found = Bucket.store.get("/bucket/run/results.json")
        return "; ".join(problems), found and plain(json.loads(found.getvalue()))

    def export(self) -> str:
        """What is wrong with the export of the run at the address, on one machine; "" if nothing."""
        output, store = self._place.folder / "export", {**environment(), **for_other_processes()}
        export = ["export", "--workdir", "gs://bucket/run", "--method", "trace_rows", "--output", str(output)]
        ended = wait(start([sys.executable, "-m", "trace_jax.main", *export], env=store))
        return "" if ended.code == 0 and (output / "model.safetensors").exists() else ended.said[-500:]

    def alone(self) -> Any:
        """Results of the same run in one process, on one device."""
        workdir = self._place.folder / "alone"
        ended = wait(start([sys.executable, "-m", "trace_jax.main", *command(self._place, str(workdir))]))
        return None if ended.code else numbers("run", workdir)


def values(results: Any) -> list[tuple[str, float]]:
    """All measurements, but ranks of a few texts, which a rounding moves by a sixth."""
    if isinstance(results, dict) and {"name", "value", "split"} <= results.keys():
        name = results["name"]
        return [] if name.startswith(("membership", "privleak")) else [(name, results["value"])]
    parts = results.values() if isinstance(results, dict) else results if isinstance(results, list) else ()
    return [value for part in parts for value in values(part)]


def scenarios(place: Place) -> Iterator[Tried]:
    """A pod that nobody disturbs ends in the numbers of one process; one that is, in its own, to the last digit."""
    trial = Trial(place)
    problem, expected = trial.through()
    yield Tried("undisturbed", "a pod", problem or "no results" * (expected is None))
    yield Tried("export from its address", "a pod", trial.export())
    pairs = [*zip(values(expected), values(trial.alone()), strict=True)]
    far = [(*a, b[1]) for a, b in pairs if not math.isclose(a[1], b[1], rel_tol=0.03, abs_tol=0.02)]
    yield Tried("the numbers of one process", "a pod", f"{len(far)} of {len(pairs)} differ: {far[:3]}" if far else "")
    problem, found = trial.through([2, 0], late={3: 20.0}, clock={0: 3600.0, 2: -7200.0})
    about = "a host dies, then process 0; one comes 20 s late, and clocks differ by hours"
    yield Tried(about, "a pod", problem or "other numbers" * (found != expected))
