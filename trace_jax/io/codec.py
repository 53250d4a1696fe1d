"""Dataclasses as plain values that JSON takes, and back: `encode` and `decode`.

Arrays become lists. JSON has no NaN: numbers that are not finite become null, and null becomes NaN where a number is
expected.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
_hints = functools.lru_cache(typing.get_type_hints)


def encode(value: Any, *, digits: int | None = None) -> Any:
    """A dataclass, mapping, sequence, array or number as plain values; floats with so many significant digits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name), digits=digits) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item, digits=digits) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return encode(value.tolist(), digits=digits)
    if isinstance(value, (list, tuple)):
        return [encode(item, digits=digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def decode(cls: type[T], plain: Mapping[str, Any]) -> T:
    """The dataclass that `encode` made `plain` from. Fields with a default may be missing.

    Raises:
      ValueError: another field is missing, or one is unknown.
    """
    fields, absent = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}, dataclasses.MISSING
    needed = {n for n, f in fields.items() if f.default is absent and f.default_factory is absent}
    unknown, missing = set(plain) - set(fields), needed - set(plain)
    if unknown or missing:
        raise ValueError(
            f"not a {cls.__name__}: missing {sorted(missing)}, unknown {sorted(unknown)}; expected {list(fields)}."
        )
    return cls(**{name: _decode(_hints(cls)[name], value) for name, value in plain.items()})


def _decode(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value)
    if hint is float:
        return math.nan if value is None else float(value)
    if hint is np.ndarray:
        array = np.array(value)
        return array.astype(np.float64) if array.dtype == object else array
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value)
    if origin is tuple:
        items = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(_decode(item, v) for item, v in zip(items, value, strict=True))
    if origin in (list, Sequence):
        return [_decode(arguments[0], v) for v in value]
    if origin in (dict, Mapping):
        return {key: _decode(arguments[1], v) for key, v in value.items()}
    return value
