"""JSON -> frozen dataclasses, strictly: what is unknown, missing or of another type is refused.

A bundle that is read loosely runs with a default where a number was misspelt. The form of a file
is said once, as dataclasses with types; this module compares a parsed JSON value with it.

    >>> read(Limits, {"min_size": 64, ...}, "limits")   # Limits(min_size=64, ...)
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dermaflux.errors import BundleError

T = TypeVar("T")


def read(form: type[T], value: object, where: str, **given: object) -> T:
    """An instance of dataclass `form` from the JSON object `value`, which is found at `where`.

    `given` are fields that do not come from the JSON. Forms may hold str, int, float, bool, None,
    unions of these, dataclasses, `tuple[X, ...]` (a JSON list), `tuple[X, Y]`, `Mapping[str, X]`,
    and `Any` (left as it is). An int is taken for a float; NaN and infinity are refused.

    Raises:
        BundleError: with the dotted name, the value found and the form needed.
    """
    if not isinstance(value, Mapping):
        raise BundleError(f"{where} needs an object, not {_show(value)}")
    hints = get_type_hints(form)
    names = [f for f in fields(form) if f.name not in given]  # type: ignore[arg-type]
    unknown = sorted(set(value) - {f.name for f in names})
    if unknown:
        raise BundleError(
            f"{where} has an unknown key {unknown[0]!r}; known: {', '.join(f.name for f in names)}"
        )
    required = [f.name for f in names if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        raise BundleError(f"{where} has no key {missing[0]!r}")
    content = {n: _convert(hints[n], v, f"{where}.{n}") for n, v in value.items()}
    return form(**content, **given)


def _convert(form: Any, value: Any, where: str) -> Any:
    """`value` as type `form`; see `read`."""
    if form is Any:
        return value
    if is_dataclass(form):
        return read(form, value, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(form), get_args(form)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        for choice in choices[:-1]:
            if isinstance(value, choice):
                return _convert(choice, value, where)
        return _convert(choices[-1], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BundleError(f"{where} needs a list, not {_show(value)}")
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) != len(value):
            raise BundleError(f"{where} needs {len(arguments)} values, not {len(value)}")
        return tuple(
            _convert(a, v, f"{where}[{i}]")
            for i, (a, v) in enumerate(zip(arguments, value, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise BundleError(f"{where} needs an object, not {_show(value)}")
        return {key: _convert(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    return _scalar(form, value, where)


def _scalar(form: type, value: object, where: str) -> object:
    # bool is an int to Python, and not to anybody who writes JSON.
    fits = isinstance(value, form) and not (form in (int, float) and isinstance(value, bool))
    if form is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise BundleError(f"{where} needs a finite number, not {_show(value)}") from None
    if not fits:
        words = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
        raise BundleError(f"{where} needs {words[form]}, not {_show(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"{where} needs a finite number, not {value}")
    return value


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
