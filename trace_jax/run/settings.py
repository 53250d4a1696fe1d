"""Every setting of an experiment with its default, what it may be, and what it is: the command `settings`."""

import argparse
import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from trace_jax.config import ConfigError, Section, Variant, as_dict, kinds_of, nearest, type_name
from trace_jax.routing.config import CalibrationConfig
from trace_jax.run.experiment import ExperimentConfig

# What `ExperimentConfig` has as a mapping: each method has a weighting of its own, which reads what it has.
_SETTINGS_OF, _UNNAMED = {"calibration": CalibrationConfig}, "calibration.weighting"


class Setting(NamedTuple):
    """A line of the reference."""

    path: str  # as after --config.
    of: str  # the kinds of its section that have it, or "" for all
    default: str
    accepts: str
    about: str


def settings() -> list[Setting]:
    """All settings, in the order in which they are declared; of kinds that share one it is listed once."""
    merged: dict[tuple[str, ...], dict[str, int]] = {}  # names of kinds, and how many there are
    for path, of, count, *rest in _walk(ExperimentConfig, "", "", 1):
        if path != _UNNAMED:
            merged.setdefault((path.replace(f"{_UNNAMED}.", "calibration."), *rest), {})[of] = count
    shown = ((", ".join(of) if len(of) < max(of.values()) else "", setting) for setting, of in merged.items())
    return [Setting(path, of, *rest) for of, (path, *rest) in shown]


def _walk(cls: type[Section], path: str, of: str, count: int) -> Iterator[tuple[Any, ...]]:
    """(path, kind, how many kinds there are, default, accepted, about) of a section's settings and those in it."""
    hints, usual = typing.get_type_hints(cls), _defaults(cls)
    for field in dataclasses.fields(cls):
        name, about = f"{path}{field.name}", field.metadata
        kinds = [_SETTINGS_OF.get(name, kind) for kind in kinds_of(hints[field.name])]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        variants = [kind for kind in sections if issubclass(kind, Variant)]
        if about:
            accepts = ", ".join(variants[0].kinds) if variants else _accepted(about, hints[field.name])
            yield name, of, count, usual.get(field.name, "required"), accepts, about["help"]
        for kind in [kind for variant in variants for kind in variant.kinds.values()] or sections:
            named = kind.name if issubclass(kind, Variant) else kind.__name__ if len(sections) > 1 else ""
            yield from _walk(kind, f"{name}.", named, len(variants[0].kinds) if variants else len(sections))


def _defaults(cls: type[Section]) -> dict[str, str]:
    """The defaults of a section's settings, those included that follow from others, as text."""
    fields = dataclasses.fields(cls)
    try:
        values = as_dict(cls())
    except (TypeError, ConfigError):  # something is required
        values = {field.name: as_dict(field.default) for field in fields if field.default is not dataclasses.MISSING}

    def text(value: Any) -> str:
        if isinstance(value, dict):  # a kind goes by its name
            return next((value[tag] for tag in ("name", "benchmark") if tag in value), str(value))
        return ", ".join(map(text, value)) if isinstance(value, tuple) else str(value)

    return {name: text(value) for name, value in values.items()}


def _accepted(about: Any, hint: Any) -> str:
    """The choices, the range or the type of a setting."""
    if about["choices"]:
        return ("any of " if typing.get_origin(hint) is tuple else "") + ", ".join(map(str, about["choices"]))
    low, high = about["minimum"], about["maximum"]
    ends = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
    return ", ".join([type_name(hint), *ends])


def settings_text(section: str = "") -> str:
    """The settings under a name, whole or a part of it (`unlearning`, `unlearning.objective`, `alpha`), for a terminal.

    Raises:
      ConfigError: there is none of that name.
    """
    found = [s for s in settings() if f".{section}." in f".{s.path}." or not section]
    if not found:
        names = dict.fromkeys(part for s in settings() for part in s.path.split("."))
        raise ConfigError(f"there is no section and no setting {section!r}{nearest(section, names)}")
    lines = []
    for path, of, default, accepts, about in found:
        lines += [f"{path} = {default or '(empty)'}    [{accepts}]" + f"  of {of}" * bool(of), f"    {about}"]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "those under this name, such as unlearning, unlearning.objective or alpha; default: all"
    parser.add_argument("section", nargs="?", default="", metavar="NAME", help=about)


def main(options: argparse.Namespace) -> int:
    """The command `settings`."""
    print(settings_text(options.section.removeprefix("--").removeprefix("config.")))
    return 0
