"""Settings: nested mappings in, checked and frozen dataclasses out.

Each room declares its own settings as a `Section`; `trace_jax.run.experiment` composes them. A section checks itself
when it is made, so that a wrong value cannot travel: types, ranges, choices, and settings that the rest of the
section would never read ("unused") are all errors that name the setting, what was given and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from ml_collections import ConfigDict

SectionT = TypeVar("SectionT", bound="Section")


class ConfigError(ValueError):
    """A setting that can't be used. The message is one sentence for the person at the keyboard."""


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    when: Mapping[str, tuple] | None = None,
) -> Any:
    """Declares one setting of a `Section`.

    Args:
      default: the value when none is given, or a function of the section that gives it from the settings declared
        before this one; None then stands for it. For a conditional setting it may be a dict from the value of the
        deciding setting to the default.
      help: one line on what the setting does, with its unit.
      choices: the values allowed.
      minimum, maximum: inclusive bounds of a number.
      when: `{other setting: (values,)}`: the setting is read only if the other one has one of these values. Anywhere
        else it must be left unset (None).
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "when": when}
    if when is not None:
        metadata["conditional_default"] = default
        default = None
    elif callable(default):
        metadata["usual"] = default
        default = None
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of all settings: checks every field on construction and fills conditional defaults."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint, default = getattr(self, field.name), hints[field.name], field.default
            if usual := field.metadata.get("usual"):
                default = usual(self)
                value = default if value is None else value
            object.__setattr__(self, field.name, _convert(value, hint, field.name, default))
        for field in dataclasses.fields(self):
            self._check_condition(field)
            _check_range(field, getattr(self, field.name))

    def _check_condition(self, field: dataclasses.Field) -> None:
        when = field.metadata.get("when")
        if not when:
            return
        value = getattr(self, field.name)
        for other, values in when.items():
            actual = getattr(self, other)
            if actual not in values:
                if value is not None:
                    raise ConfigError(
                        f"{field.name} = {value!r} would have no effect: it is read only when {other} is "
                        f"{_one_of(values)}, and {other} is {actual!r}. Remove it, or change {other}."
                    )
                return
        if value is None:
            default = field.metadata["conditional_default"]
            if isinstance(default, Mapping):
                default = default[getattr(self, next(iter(when)))]
            if default is dataclasses.MISSING:
                raise ConfigError(f"{field.name} is needed when {other} is {actual!r}: {field.metadata['help']}")
            object.__setattr__(self, field.name, default)


@dataclasses.dataclass(frozen=True)
class Variant(Section):
    """One of several kinds of a thing, each with settings of its own: an objective, an optimizer, a weighting.

    A class without a name collects its kinds: `class Objective(Variant)`, `class NPO(Objective, name="npo")`. A setting
    of type `Objective` is given by name, `"npo"`, or as a mapping, `{"name": "npo", "beta": 0.1}`. What a mapping
    leaves out is as in the default, if that is of the same kind.
    """

    name: ClassVar[str]
    kinds: ClassVar[dict[str, type]]

    @classmethod
    def spelled_out(cls, value: Any) -> Any:
        """A name or a mapping in place of another short way to write a kind; here there is none."""
        return value

    def __init_subclass__(cls, name: str = "", **arguments):
        super().__init_subclass__(**arguments)
        if name:
            cls.name = name
            cls.kinds[name] = cls
        elif Variant in cls.__bases__:  # others in between only share settings
            cls.kinds = {}


def _variant(value: Any, base: type[Variant], name: str, default: Any) -> Variant:
    """The kind that a name or a mapping names; a mapping without a name has settings of the default."""
    if isinstance(value, base):
        return value
    value = base.spelled_out(value)
    if not isinstance(value, (str, Mapping)):
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); expected one of {', '.join(base.kinds)}.")
    given = {"name": value} if isinstance(value, str) else dict(value)
    kind = given.pop("name", default.name if isinstance(default, Variant) else default)
    if kind not in base.kinds:
        names = ", ".join(base.kinds)
        raise ConfigError(f"{name} is {kind!r}; expected one of {names}{nearest(kind, base.kinds)}")
    known = {f.name for f in dataclasses.fields(base.kinds[kind])}
    for key in given.keys() - known:
        if others := [k for k, cls in base.kinds.items() if key in {f.name for f in dataclasses.fields(cls)}]:
            raise ConfigError(
                f"{name}.{key} would have no effect: it belongs to {' and '.join(others)}, not to {kind}."
            )
    usual = as_dict(default) if isinstance(default, Variant) and default.name == kind else {}
    return resolve(base.kinds[kind], {key: usual[key] for key in known & usual.keys()} | given, path=name)


def _moved(cls: type[Section], key: str) -> str | None:
    """Where a setting is that once was `key` of this section: "objective.beta" for "beta" or "objective_beta"."""
    for field, base in _variants(cls).items():
        for kind in base.kinds.values():
            for prefix in ("", f"{field}_", f"{kind.name}_"):
                inner = key.removeprefix(prefix)
                if inner in {f.name for f in dataclasses.fields(kind)}:
                    return f"{field}.{inner}"
                if deeper := _moved(kind, inner):
                    return f"{field}.{deeper}"
    return None


def _one_of(values: tuple) -> str:
    return " or ".join(repr(v) for v in values)


def _check_range(field: dataclasses.Field, value: Any) -> None:
    if value is None:
        return
    meta, name = field.metadata, field.name
    choices = meta.get("choices")
    if choices:
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                raise ConfigError(
                    f"{name} is {item!r}; expected one of {', '.join(map(str, choices))}{nearest(item, choices)}"
                )
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and math.isnan(item):
            raise ConfigError(f"{name} is not a number (nan).")
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            low, high = meta.get("minimum"), meta.get("maximum")
            if (low is not None and item < low) or (high is not None and item > high):
                bounds = (
                    f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
                )
                raise ConfigError(f"{name} is {item!r}; expected a value {bounds} ({meta['help']}).")


def nearest(given: Any, names: typing.Iterable) -> str:
    close = difflib.get_close_matches(str(given), [str(n) for n in names], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def _convert(value: Any, hint: Any, name: str, default: Any = None) -> Any:
    """Value as the annotated type, or a `ConfigError`. Numbers are never guessed from text."""
    kinds = _kinds(hint)
    if int in kinds and fits(value, int):
        return int(value)
    if float in kinds and fits(value, float):
        return float(value)
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    if sections and issubclass(sections[0], Variant):
        return _variant(value, sections[0], name, default)
    if isinstance(value, Mapping) and sections:
        # The first whose required settings are given; so a wrong key of it is answered by it.
        section = next((s for s in sections if set(_required(s)) <= set(value)), sections[-1])
        return resolve(section, value, path=name)
    items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
    if items and isinstance(value, (list, tuple)):
        return tuple(_convert(item, items[0], name) for item in value)
    if not fits(value, hint):
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); expected {type_name(hint)}.")
    return dict(value) if isinstance(value, Mapping) else value


def _kinds(hint: Any) -> tuple:
    """The types of a union, but for None; otherwise the type alone."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return (hint,)
    return tuple(kind for kind in typing.get_args(hint) if kind is not types.NoneType)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. One kind of array stands for another, and a list for a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, kind) for kind in arguments)
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind.__name__ in ("Array", "ndarray"):
        return hasattr(value, "shape") and hasattr(value, "dtype")
    if kind in (Sequence, tuple) and not isinstance(value, str) and isinstance(value, (list, tuple)):
        return not arguments or all(fits(item, arguments[0]) for item in value)
    if kind in (Sequence, Iterable) and (isinstance(value, str) or hasattr(value, "shape")):
        return not isinstance(value, str)
    return isinstance(value, kind)


def type_name(hint: Any) -> str:
    """What is expected of a value, in words."""
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", os.PathLike: "a path"}
    names |= {dict: "a mapping", Mapping: "a mapping", Callable: "a function"}
    words = []
    for kind in _kinds(hint):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (tuple, Sequence, Iterable):
            words.append(f"a list, each item {type_name(arguments[0])}")
        else:
            words.append(names.get(origin or kind) or getattr(kind, "__name__", str(kind)))
    return " or ".join(words)


def checked(function: Callable) -> Callable:
    """A public function that answers arguments of another type than it declares with one sentence (a TypeError)."""
    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}; it takes {', '.join(signature.parameters)}.") from None
        for name, value in arguments.items():
            if not fits(value, hints[name]):
                raise TypeError(
                    f"{function.__name__}: {name} is {reprlib.repr(value)} ({type(value).__name__}); expected "
                    f"{type_name(hints[name])}."
                )
        return function(*args, **kwargs)

    return call


def resolve(cls: type[SectionT], values: Mapping[str, Any] | ConfigDict, path: str = "") -> SectionT:
    """Builds a section from a nested mapping (a dict or an ml_collections `ConfigDict`).

    Raises:
      ConfigError: an unknown key (the nearest known one is named), a wrong type, a value out of range, or a
        setting that nothing would read. The message starts with the dotted path of the section.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else values
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            full = f"{path}.{key}" if path else str(key)
            if there := _moved(cls, key):
                there = f"{path}.{there}" if path else there
                raise ConfigError(f"{full}: it belongs to {there.rpartition('.')[0]}; write {there}.")
            near, names = nearest(key, sorted(known)), ", ".join(sorted(known))
            raise ConfigError(f"{full}: there is no setting of this name{near} Known here: {names}.")
    for name, field in _required(cls).items():
        if name not in values:
            raise ConfigError(f"{path + '.' if path else ''}{name} is missing: {field.metadata['help']}.")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}" if path else str(error)) from None


def is_read(cls: type[Section], values: Mapping[str, Any], name: str) -> bool:
    """Whether a section with these values, and defaults for the rest, reads the setting `name` (`when` of `option`)."""
    when = {f.name: f for f in dataclasses.fields(cls)}[name].metadata.get("when") or {}
    return all(_effective(cls, values, other) in allowed for other, allowed in when.items())


def _effective(cls: type[Section], values: Mapping[str, Any], name: str) -> Any:
    """The value that a setting has: what is given, or its default; None where nothing reads it."""
    field = {f.name: f for f in dataclasses.fields(cls)}[name]
    when = field.metadata.get("when")
    if when and not is_read(cls, values, name):
        return None
    if values.get(name) is not None or not when:
        return values.get(name, field.default)
    default = field.metadata["conditional_default"]
    return default[_effective(cls, values, next(iter(when)))] if isinstance(default, Mapping) else default


def _variants(cls: type[Section]) -> dict[str, type[Variant]]:
    """The settings of a section that are variants, by name."""
    hints = typing.get_type_hints(cls)
    found = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return {name: hint for name, hint in found.items() if isinstance(hint, type) and issubclass(hint, Variant)}


def _required(cls: type[Section]) -> dict[str, dataclasses.Field]:
    missing = dataclasses.MISSING
    return {f.name: f for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}


def as_dict(section: Section) -> dict:
    """Nested plain dict of a section, every default included; `resolve` takes it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Section):
            return as_dict(value)
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value

    kind = {"name": section.name} if isinstance(section, Variant) else {}
    return kind | {f.name: plain(getattr(section, f.name)) for f in dataclasses.fields(section)}


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that identify settings (sections, dicts, strings, numbers) by their content."""
    plain = [as_dict(part) if isinstance(part, Section) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
