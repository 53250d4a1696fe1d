"""Stages of a run: each leaves an artefact with the hash of what made it, and is skipped when that is there."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from trace_jax.config import ConfigError, as_dict
from trace_jax.io.files import as_path, free_bytes, is_remote, read_json, remove, write_json
from trace_jax.io.progress import say
from trace_jax.parallel.processes import all_processes, barrier, broadcast_from_process_0
from trace_jax.run.experiment import ExperimentConfig

_SECONDS_TO_SEE = 30.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage in its directory. `identity` is the hash of every setting that shapes its artefact."""

    name: str
    directory: Path
    identity: str

    @property
    def _marker(self) -> Path:
        return self.directory / f"{self.name}.stage.json"

    def done(self) -> bool:
        """Whether the artefact of exactly these settings is there; the same on every process."""
        marker = read_json(self._marker)
        return bool(broadcast_from_process_0(marker is not None and marker.get("identity") == self.identity))

    def invalidate(self) -> None:
        """Makes the stage run again."""
        remove(self._marker)

    def run(self, make: Callable[[], Any], title: str, load: Callable[[], Any] = lambda: None) -> Any:
        """What `make` makes (and writes) or, if the stage is done, what `load` reads."""
        if self.done():
            say(f"{title}: already done")
            return load()
        if self._marker.exists():
            say(f"{title}: its settings changed, so it is made anew")
            self.invalidate()
        result = make()
        write_json(self._marker, {"identity": self.identity})
        barrier(f"{title}: written")  # later stages read it, on every process
        return result


def calibration_directory(workdir: Path, label: str) -> Path:
    """Where the weights of `methods/LABEL` are, and the calibration they come from.

    Methods with the same weights share them in `calibrations/HASH`; earlier versions have them in `methods/LABEL`.
    """
    directory = workdir / "methods" / label
    shared = read_json(directory / "weights.json")
    return directory if shared is None else workdir / "calibrations" / shared["calibration"]


def open_workdir(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Makes or reopens a run directory and writes the resolved configuration into it.

    Raises:
      ConfigError: see `check_workdir`.
    """
    path = as_path(workdir)
    replaces = check_workdir(config, path, overwrite=overwrite)
    barrier("the workdir as it was found")  # a process that is late must not see what is written now
    if replaces:
        remove(path)
    write_json(path / "config.json", {"identity": config.identity(), "config": as_dict(config)})
    _check_shared(path)
    return path


def _check_shared(path: Path) -> None:
    """Every process must see what process 0 writes: a run continues from its files, and states are written by all."""
    if not jax.distributed.is_initialized():
        return
    file, token = path / "shared.json", broadcast_from_process_0(int.from_bytes(os.urandom(3)))
    write_json(file, token)
    barrier("a token in the workdir")
    end = time.monotonic() + _SECONDS_TO_SEE
    while not (seen := read_json(file) == token) and time.monotonic() < end:
        time.sleep(0.5)  # network file systems take a while
    shared = all_processes(seen)
    remove(file)
    if not shared:
        raise ConfigError(
            f"{path}: not every process sees what process 0 writes there; each host has a disk of its own. Give "
            "--workdir a directory that all hosts mount, or an address gs://BUCKET/NAME."
        )


def check_workdir(config: ExperimentConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> bool:
    """Whether a run of another configuration is in `workdir` and would be replaced. Writes nothing.

    Raises:
      ConfigError: the directory belongs to another corpus or model (and `overwrite` is not given), holds something
        that is not a run, or is on a disk without space.
    """
    path = as_path(workdir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; --workdir needs a directory.")
    earlier = read_json(path / "config.json") if path.is_dir() else None
    if earlier is None and path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path}: is not empty and holds no run (no config.json). Choose another --workdir.")
    replaces = earlier is not None and earlier.get("identity") != config.identity()
    if earlier is not None and replaces and not overwrite:
        before, after = earlier["config"], json.loads(json.dumps(as_dict(config)))  # tuples are lists, as in the file
        changed = [
            f"{section}.{key} {before.get(section, {}).get(key)!r} -> {value!r}"
            for section in ("data", "model")
            for key, value in after[section].items()
            if before.get(section, {}).get(key) != value
        ] or ["the content of its checkpoint, or its settings are of an earlier version"]
        raise ConfigError(
            f"{path}: holds a run of another configuration ({'; '.join(changed)}). Choose another --workdir, or "
            "pass --overwrite to replace that run."
        )
    check_export(config, path)
    if (free := free_bytes(path)) < 1 << 30:
        raise ConfigError(f"{path}: only {free / 2**20:.0f} MiB are free there; a run needs 1 GiB.")
    return replaces


def check_export(config: ExperimentConfig, workdir: str | os.PathLike) -> None:
    """Raises ConfigError if the run would export a checkpoint to an address."""
    if config.export and is_remote(workdir):
        raise ConfigError(
            f"{os.fspath(workdir)}: checkpoints are exported to a local disk. Pass --config.export=None; afterwards, "
            f"on one machine: python -m trace_jax.main export --workdir {os.fspath(workdir)} --output DIR."
        )
