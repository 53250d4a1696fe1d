"""An experiment from a Python file with a `get_config` function, and the overrides of the command line."""

import inspect
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from trace_jax.config import ConfigError, resolve
from trace_jax.run.experiment import ExperimentConfig


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """The experiment of a config file, `FILE` or `FILE:variant`, with overrides by dotted name applied.

    Another objective, or another kind of anything that has kinds, takes the place of the file's with its settings.

    Raises:
      ConfigError: no such file, no `get_config` in it, an error in it, an unknown setting or a wrong value.
    """
    file, _, variant = name.partition(":")
    if not Path(file).is_file():
        raise ConfigError(f"{file}: no such config file. Give --config a Python file with a get_config function.")
    sys.path.insert(0, str(Path(file).resolve().parent))  # for what configs share, which lies beside them
    try:
        values = _run(file, variant)
    finally:
        del sys.path[0]
    for path, value in (overrides or {}).items():
        _override(values, path, value)
    return resolve(ExperimentConfig, values)


def _run(file: str, variant: str) -> dict[str, Any]:
    """What the file's get_config returns; it takes the variant if the file has any."""
    arguments = [variant] if variant else []
    try:
        get_config = runpy.run_path(file).get("get_config")
        if not callable(get_config):
            raise ConfigError(f"{file}: has no get_config function.")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            problem = f"has no variants, and {variant!r} is given" if variant else "needs a variant: FILE:variant"
            raise ConfigError(f"{file}: {problem}.") from None
        values = get_config(*arguments)
    except ConfigError:
        raise
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise ConfigError(
            f"{error.filename or file}{line}: is not Python ({error.msg}); --config takes a Python file with a "
            "get_config function."
        ) from error
    except Exception as error:  # whatever a user's code can raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f":{lines[-1]}" if lines else ""
        raise ConfigError(f"{file}{line}: {type(error).__name__}: {error}") from error
    if not isinstance(values, (Mapping, ConfigDict)):
        raise ConfigError(f"{file}: get_config returned {values!r}; expected a ConfigDict, or settings in a dict.")
    return values.to_dict() if isinstance(values, ConfigDict) else dict(values)


def _override(values: dict, path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for depth, section in enumerate(sections):
        inner = values.setdefault(section, {})
        if depth and isinstance(inner, str):  # the name of a variant, such as an objective, that gets settings
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--config.{path}: {section} is a single setting, not a group of settings.")
        values = inner
    before = values.get(key)
    if not (isinstance(before, dict) and isinstance(value, str) and before.get("name") == value):
        values[key] = value  # a variant that is named as in the file keeps its settings there
