"""Trackers: where a run is shown while it goes on, besides its own files (docs/tracking.md).

Each works in a thread of its own: it may be slow or fail, and the run goes on.
"""

import contextlib
import importlib
import json
import os
import queue
import re
import secrets
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from trace_jax.config import ConfigError, Section, option
from trace_jax.io.environment import version_of
from trace_jax.io.files import local_copy, read_json, shown, write_json
from trace_jax.io.progress import say

_PATIENCE = 10.0  # seconds in which trackers can finish before the run goes on


class TrackingConfig(Section):
    """Where a run is shown while it goes on: any number of trackers, each with an extra of the package."""

    tensorboard: bool = option(False, help="event files in WORKDIR/tensorboard, a run for each method")
    wandb: bool = option(False, help="Weights & Biases, set up by its variables: WANDB_PROJECT, WANDB_MODE, ...")
    trackio: bool = option(False, help="trackio, set up by its variables: TRACKIO_DIR, TRACKIO_SPACE_ID, ...")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the trackers that were asked for."""
        return tuple(name for name in _BACKENDS if getattr(self, name))

    def check(self) -> None:
        """Raises ConfigError where a tracker's package is not installed."""
        for name in self.chosen:
            if version_of(package := _BACKENDS[name].package) is None:
                how = f"pip install {package}, or leave tracking.{name} out"
                raise ConfigError(f"tracking.{name} is on, and its package {package} is not installed: {how}.")


class Tracker:
    """The run of a method in all trackers that `config` names. A context: at its end they get seconds to finish.

    directory: WORKDIR/methods/LABEL; in a tracker the run is called WORKDIR/LABEL, in the group WORKDIR of a project.
      Its id is in tracking.json, so that a continued run goes on in it.
    settings: shown as the configuration of the run.
    """

    def __init__(self, config: TrackingConfig, directory: Path, *, project: str, settings: dict[str, Any]):
        workdir, label = directory.parents[1], directory.name
        self.group = os.path.basename(shown(workdir))
        self.project, self.name, self.id, self.settings = project, f"{self.group}/{label}", "", settings
        self.events = workdir / "tensorboard" / label
        self.report = re.sub(r"[^\w.-]", "-", f"{self.group}-report", flags=re.ASCII)
        self._directory, self._chosen = directory, config.chosen
        self._workers: list[_Worker] = []
        self._measured: dict[str, float] = {}
        self._written: Collection[tuple[str, int]] = ()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: Any) -> None:
        end = time.monotonic() + _PATIENCE
        for worker in self._workers:
            worker.put(None)
        for worker in self._workers:
            worker.join(max(0.0, end - time.monotonic()))
            if worker.is_alive():
                say(f"tracking with {worker.name} is slow; the run does not wait for it any longer")

    def begin(self, step: int | None, written: Collection[tuple[str, int]] = ()) -> None:
        """Starts the trackers: of a run that starts (step 0), goes on after `step`, or (None) has ended. `written` are
        kinds and steps of the lines that were written before; those that come again are not sent again.
        """
        if not self._chosen:
            return
        file = self._directory / "tracking.json"
        known = read_json(file) if step != 0 else None
        self.id = known["id"] if known else secrets.token_hex(4)
        write_json(file, {"id": self.id})
        self._written = written
        for name in self._chosen:
            with contextlib.suppress(Exception):  # it comes again, and is told, where the package is used
                importlib.import_module(_BACKENDS[name].package)  # one thread at a time may compile: Python 3.11's bug
        self._workers = [_Worker(name, lambda kind=_BACKENDS[name]: kind(self, step)) for name in self._chosen]

    def line(self, row: Mapping[str, Any]) -> None:
        """Shows a line of metrics.jsonl; the measurements of an evaluation once all of them are there."""
        kind, step = row["kind"], row["step"]
        if kind == "measurement" and "name" in row:
            self._measured[f"eval/{row.get('split')}/{row['name']}"] = row["value"]
        if (group := {"step": "train", "evaluation": "eval"}.get(kind)) is None:
            return
        own = {f"{group}/{name}": value for name, value in row.items() if name not in ("kind", "step", "identity")}
        values, self._measured = {**own, **self._measured}, {}
        again = (kind, step) in self._written
        for worker in self._workers:
            worker.put(lambda backend: None if again and not backend.purges else backend.log(step, values))

    def attach(self, page: Path, text: str) -> None:
        """Adds the report of a run that has ended, as a page or, where no page can be shown, as text."""
        for worker in self._workers:
            worker.put(lambda backend: backend.attach(page, text))


class _Worker(threading.Thread):
    """Does what is asked of a tracker, in order; after an error, which it tells once, nothing more."""

    def __init__(self, name: str, make: Callable[[], Any]):
        super().__init__(name=name, daemon=True)
        self._make, self._jobs = make, queue.SimpleQueue()
        self.start()

    def put(self, job: Callable[[Any], Any] | None) -> None:
        """Asks for something to be done with the tracker; None: that it ends."""
        if self.is_alive():
            self._jobs.put(job)

    def run(self) -> None:
        try:
            backend = self._make()
            while (job := self._jobs.get()) is not None:
                job(backend)
            backend.close()
        except Exception as error:  # whatever it is, a run is worth more
            say(f"tracking with {self.name} failed, and the run goes on without it ({type(error).__name__}: {error})")


# --- the trackers


class _TensorBoard:
    package, purges = "tensorboardX", True  # what comes again takes the place of what was there

    def __init__(self, run: Tracker, step: int | None):
        from tensorboardX import SummaryWriter

        how: Any = {"flush_secs": 10, "purge_step": step and step + 1}
        suffix = f".{time.time_ns()}"  # files are named by the second; one of the same name would be overwritten
        self._writer = SummaryWriter(os.fspath(run.events), filename_suffix=suffix, **how)
        if step == 0:
            self._writer.add_text("settings", _indented(json.dumps(run.settings, indent=1, default=str)), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not name.endswith("/time"):
                self._writer.add_scalar(name, value, step, values.get("train/time", values.get("eval/time")))

    def attach(self, page: Path, text: str) -> None:
        self._writer.add_text("report", f"{_indented(text)}\n\n{page}")

    def close(self) -> None:
        self._writer.close()


def _indented(text: str) -> str:
    return textwrap.indent(text, "    ")  # as it is, in Markdown


class _WandB:
    package, purges = "wandb", False

    def __init__(self, run: Tracker, step: int | None):
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("not logged in: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline")
        where = {"project": os.environ.get("WANDB_PROJECT", run.project), "group": run.group, "name": run.name}
        how: Any = {"resume": "allow", "reinit": "create_new", "settings": wandb.Settings(console="off", quiet=True)}
        self._artifact = wandb.Artifact(run.report, "report")
        self._run = wandb.init(**where, id=run.id, config=run.settings, **how)
        self._run.define_metric("*", step_metric="step")  # its own steps can't be written to twice

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def attach(self, page: Path, text: str) -> None:
        with local_copy(page) as local:
            self._artifact.add_file(os.fspath(local), name="report.html")
        self._run.log_artifact(self._artifact)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    package, purges = "trackio", False

    def __init__(self, run: Tracker, step: int | None):
        self._artifact = run.report
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            import trackio

            # It goes on in the newest run of a name, so that names must differ.
            about: Any = {"name": f"{run.name}-{run.id}", "group": run.group, "config": run.settings}
            self._run = trackio.init(run.project, **about, resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def attach(self, page: Path, text: str) -> None:
        with local_copy(page) as local:
            self._run.log_artifact(local, name=self._artifact, type="report")

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


_BACKENDS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}
