"""Settings: nested mappings in, checked and frozen dataclasses out.

Each room declares its own settings as a `Section`; `trace_jax.run.experiment` composes them. A section checks itself
when it is made, so that a wrong value cannot travel: an error names the setting, what was given and what was expected.
"""

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
    """A setting that can't be used. The message is one sentence for the person at the keyboard.

    Example:
      >>> tj.UnlearningConfig(schedule="cosin")
      Traceback (most recent call last):
      trace_jax.config.ConfigError: schedule is 'cosin'; expected one of ...; did you mean 'cosine'?
    """


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple | None = None,
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> Any:
    """Declares one setting of a `Section`; `help` says in a line what it does, with its unit. Bounds are inclusive.

    `default` may be a function of the section, which reads the settings declared before this one; None stands for it.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if callable(default):
        metadata["usual"], default = default, None
    return dataclasses.field(default=default, metadata=metadata)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
@dataclasses.dataclass(frozen=True)
class Section:
    """Base of all settings, each a frozen dataclass that checks every field when it is made."""

    def __init_subclass__(cls, kw_only: bool = False, **arguments):
        super().__init_subclass__(**arguments)
        dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            if usual := field.metadata.get("usual"):
                default = usual(self)
                value = default if value is None else value
            if (
                field.metadata.get("choices")
                and isinstance(value, str)
                and typing.get_origin(hints[field.name]) is tuple
            ):
                value = [name.strip() for name in value.split(",")]  # "a,b", as one types it
            value = _convert(value, hints[field.name], field.name, default)
            _check_range(field, value)
            object.__setattr__(self, field.name, value)


class Variant(Section):
    """One of several kinds of a thing: `class Objective(Variant)` collects them, `class NPO(Objective, name="npo")`.

    A setting of type `Objective` is given by name, `"npo"`, or as a mapping, `{"name": "npo", "beta": 0.1}`. What this
    leaves out is as in the default, as far as that has it, too.
    """

    name: ClassVar[str]
    kinds: ClassVar[dict[str, type]]
    tag: ClassVar[str] = "name"  # what says which kind in a mapping

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
    if isinstance(value, (base, *base.kinds.values())):
        return value
    value, names = base.spelled_out(value), ", ".join(base.kinds)
    if not isinstance(value, (str, Mapping)):
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); expected one of {names}.")
    settings = {base.tag: value} if isinstance(value, str) else dict(value)
    kind = settings.pop(base.tag, default.name if isinstance(default, Variant) else default)
    if kind not in base.kinds:
        raise ConfigError(f"{name} is {kind!r}; expected one of {names}{nearest(kind, base.kinds)}")
    own = _names(base.kinds[kind])
    for key in sorted(settings.keys() - own):
        if others := " and ".join(other for other, cls in base.kinds.items() if key in _names(cls)):
            raise ConfigError(f"{name}.{key} would have no effect: it belongs to {others}, not to {kind}.")
    usual = as_dict(default) if isinstance(default, Variant) else {}
    return resolve(base.kinds[kind], {key: usual[key] for key in own & usual.keys()} | settings, path=name)


def _moved(cls: type[Section], key: str) -> str | None:
    """Where a setting is that once was `key` of this section: "objective.beta" for "beta" or "objective_beta"."""
    for field, base in typing.get_type_hints(cls).items():
        for kind in base.kinds.values() if isinstance(base, type) and issubclass(base, Variant) else ():
            for inner in (key.removeprefix(prefix) for prefix in ("", f"{field}_", f"{kind.name}_")):
                if there := inner if inner in _names(kind) else _moved(kind, inner):
                    return f"{field}.{there}"
    return None


def _check_range(field: dataclasses.Field, value: Any) -> None:
    name, about = field.name, field.metadata or option(help="").metadata
    choices, low, high = about["choices"], about["minimum"], about["maximum"]
    for item in value if isinstance(value, tuple) else () if value is None else (value,):
        if choices and item not in choices:
            names = ", ".join(map(str, choices))
            raise ConfigError(f"{name} is {item!r}; expected one of {names}{nearest(item, choices)}")
        if isinstance(item, float) and math.isnan(item):
            raise ConfigError(f"{name} is not a number (nan).")
        if fits(item, float) and not low <= item <= high:
            bounds = f"at least {low}" if high == math.inf else f"at most {high}"
            bounds = bounds if math.inf in (-low, high) else f"from {low} to {high}"
            raise ConfigError(f"{name} is {item!r}; expected a value {bounds} ({about['help']}).")


def nearest(name: Any, names: Iterable) -> str:
    """The end of a sentence: did you mean the one of `names` that is most like `name`, if any is."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def _convert(value: Any, hint: Any, name: str, default: Any = None) -> Any:
    """Value as the annotated type, or a `ConfigError`. Numbers are never guessed from text."""
    kinds = kinds_of(hint)
    for number in (int, float):
        if number in kinds and fits(value, number):
            return number(value)
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    if sections and issubclass(sections[0], Variant):
        return _variant(value, sections[0], name, default)
    if isinstance(value, Mapping) and sections:
        # The first whose required settings are given; so a wrong key of it is answered by it.
        section = next((s for s in sections if set(_required(s)) <= set(value)), sections[-1])
        return resolve(section, value, path=name)
    items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
    if items and items[0] not in kinds and fits(value, items[0]):
        value = (value,)
    if items and isinstance(value, (list, tuple)):
        return tuple(_convert(item, items[0], name) for item in value)
    if not fits(value, hint):
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); expected {type_name(hint)}.")
    return dict(value) if isinstance(value, Mapping) else value


def kinds_of(hint: Any) -> tuple:
    """The types of a union, but for None; otherwise the type alone."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return (hint,)
    return tuple(kind for kind in typing.get_args(hint) if kind is not types.NoneType)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. One kind of array stands for another, and a list for a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, kind) for kind in arguments)
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    kind, is_array = origin or hint, hasattr(value, "shape") and hasattr(value, "dtype")
    if hint is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind.__name__.rpartition(".")[2] in ("Array", "ndarray") or (is_array and kind in (Sequence, Iterable)):
        return is_array
    if kind is tuple and isinstance(value, (list, tuple)) and Ellipsis not in arguments:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if kind in (Sequence, Iterable, tuple) and isinstance(value, (list, tuple)) and arguments:
        return all(fits(item, arguments[0]) for item in value)
    return isinstance(value, kind) and not (isinstance(value, str) and kind in (Sequence, Iterable))


def type_name(hint: Any) -> str:
    """What is expected of a value, in words."""
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", os.PathLike: "a path"}
    names |= {dict: "a mapping", Mapping: "a mapping", Callable: "a function"}
    words = []
    for kind, origin in ((kind, typing.get_origin(kind)) for kind in kinds_of(hint)):
        word = names.get(origin or kind) or getattr(kind, "__name__", str(kind))
        of = [type_name(one) for one in typing.get_args(kind) if one is not Ellipsis]
        if origin in (tuple, Sequence, Iterable):
            is_pair = origin is tuple and Ellipsis not in typing.get_args(kind)
            word = f"({', '.join(of)})" if is_pair else f"a list, each item {of[0]}"
        words.append(f"{word} ({kind.made_by})" if hasattr(kind, "made_by") else word)
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
                there = f"{name} is {reprlib.repr(value)} ({type(value).__name__})"
                raise TypeError(f"{function.__name__}: {there}; expected {type_name(hints[name])}.")
        return function(*args, **kwargs)

    return call


def resolve(cls: type[SectionT], values: Mapping[str, Any] | ConfigDict, path: str = "") -> SectionT:
    """A section from a nested mapping; a `ConfigError` says what can't be used: the setting's dotted path, and why."""
    values, inside = values.to_dict() if isinstance(values, ConfigDict) else values, f"{path}." if path else ""
    for key in sorted(values.keys() - _names(cls), key=str):
        if there := _moved(cls, key):
            there = f"{inside}{there}"
            raise ConfigError(f"{inside}{key}: it belongs to {there.rpartition('.')[0]}; write {there}.")
        names = sorted(_names(cls))
        known = near if (near := nearest(key, names)) != "." else f". Known here: {', '.join(names)}."
        raise ConfigError(f"{inside}{key}: there is no setting of this name{known}")
    for name, field in _required(cls).items():
        if name not in values:
            raise ConfigError(f"{inside}{name} is missing: {field.metadata['help']}.")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{inside}{error}") from None


def _names(cls: type[Section]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _required(cls: type[Section]) -> dict[str, dataclasses.Field]:
    missing = dataclasses.MISSING
    return {f.name: f for f in dataclasses.fields(cls) if f.default is f.default_factory is missing}


def as_dict(value: Any) -> Any:
    """Nested plain dict of a section, every default included; `resolve` takes it back."""
    if isinstance(value, Section):
        kind = {value.tag: value.name} if isinstance(value, Variant) else {}
        return kind | {f.name: as_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: as_dict(item) for key, item in value.items()}
    return type(value)(map(as_dict, value)) if type(value) in (list, tuple) else value


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that identify settings (sections, dicts, strings, numbers) by their content."""
    text = json.dumps(as_dict(parts), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
