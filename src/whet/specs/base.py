"""What all specs share: validation helpers and the plain-dict form.

A spec's plain form is `{"Prune": {"sparsity": 0.8}}`: its class name and the fields that differ from their defaults. It
holds only what YAML and JSON hold. A user's function is written as `{"function": "module:name"}`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from whet.errors import SpecError

_SPECS: dict[str, type] = {}
MAPPING = {"mapping": True}  # metadata of a field that maps a user's names to specs
T = TypeVar("T")


def spec(cls: type[T]) -> type[T]:
    """Register a spec class under its name, so that `from_dict` finds it."""
    _SPECS[cls.__name__] = cls
    return cls


def to_dict(value: Any) -> Any:
    """The plain form of a spec, or of a value inside one.

    Raises:
        SpecError: a function that cannot be imported again by name (a lambda or a local function).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if not _is_default(field, item):
                fields[field.name] = to_dict(item)
        return {type(value).__name__: fields}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # NumPy's own floats and strings are subclasses, which YAML does not write
        if isinstance(value, kind):
            return kind(value)
    if callable(value):
        return {"function": function_name(value)}
    raise SpecError(f"A spec cannot hold a {type(value).__name__} and still be saved, got {value!r}.")


def from_dict(plain: Any) -> Any:
    """The spec that `to_dict` wrote as `plain`.

    Raises:
        SpecError: an unknown spec or field, or a value that the spec refuses.
    """
    if isinstance(plain, Mapping):
        if set(plain) == {"function"}:
            return import_function(plain["function"])
        if len(plain) == 1:
            (name, fields), *_ = plain.items()
            if name in _SPECS:
                return _build(name, fields)
            if isinstance(name, str) and name[:1].isupper() and isinstance(fields, Mapping | None):
                raise SpecError(f"Unknown spec {name!r}. Known: {', '.join(sorted(_SPECS))}.")
        return {key: from_dict(item) for key, item in plain.items()}
    if isinstance(plain, list | tuple):
        return tuple(from_dict(item) for item in plain)
    return plain


def _build(name: str, fields: Any) -> Any:
    cls = _SPECS[name]
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise SpecError(f"{name} must be followed by its fields as a mapping, got {fields!r}.")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise SpecError(f"{name} has no field {unknown[0]!r}. Its fields: {', '.join(known)}.")
    missing = [field.name for field in known.values() if field.name not in fields and _is_required(field)]
    if missing:
        raise SpecError(f"{name} needs a value for {missing[0]!r}.")
    return cls(**{key: _value(known[key], item) for key, item in fields.items()})


def _value(field: dataclasses.Field[Any], plain: Any) -> Any:
    if field.metadata == MAPPING and isinstance(plain, Mapping):  # a layer may bear the name of a spec
        return {key: from_dict(item) for key, item in plain.items()}
    return from_dict(plain)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def function_name(function: Callable[..., Any]) -> str:
    """`module:name` of a function that can be imported again.

    Raises:
        SpecError: it cannot (a lambda, a local function, or one defined in `__main__`).
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or "<" in name or not name:
        raise SpecError(
            f"The function {function!r} cannot be saved: it must be importable as module:name. "
            "Define it at the top level of an importable module."
        )
    return f"{module}:{name}"


def import_function(path: str) -> Callable[..., Any]:
    """The function named `module:name`.

    Raises:
        SpecError: there is no such module or name.
    """
    module, _, name = str(path).partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as cause:
        raise SpecError(f"Cannot import the function {path!r} ({cause}). It must be written as module:name.") from cause
    if not callable(found):
        raise SpecError(f"{path!r} must name a function, got a {type(found).__name__}.")
    function: Callable[..., Any] = found
    return function


def _is_default(field: dataclasses.Field[Any], item: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(type(item) is type(field.default) and item == field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(item == field.default_factory())
    return False


def check_number(
    owner: str, value: Any, *, low: float, high: float, open_low: bool = False, open_high: bool = False, words: str = ""
) -> None:
    """Raise `SpecError` unless `value` is a finite number between `low` and `high`. words: what the error also allows."""
    bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"{owner} must be a number in {bounds}{words}, got {value!r}.{_text_hint(value)}")
    if value < low or value > high or (open_low and value == low) or (open_high and value == high):
        hint = f" Did you mean {value / 100:g}?" if high == 1 and 1 < value <= 100 else ""
        raise SpecError(f"{owner} must be in {bounds}, got {value!r}.{hint}")


def _text_hint(value: Any) -> str:
    """YAML 1.1 takes 1e-3 for text: say so."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return f" That is text; YAML needs a dot and a sign in the exponent: {number!r}." if math.isfinite(number) else ""


def check_integer(owner: str, value: Any, *, low: int, high: int | None = None) -> None:
    """Raise `SpecError` unless `value` is an integer in `[low, high]`."""
    allowed = f"an integer in [{low}, {high}]" if high is not None else f"an integer of at least {low}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise SpecError(f"{owner} must be {allowed}, got {value!r}.")


def check_type(owner: str, value: Any, *allowed: type | None) -> None:
    """Raise `SpecError` unless `value` is an instance of one of `allowed` (`None` allows None)."""
    kinds = tuple(type(None) if kind is None else kind for kind in allowed)
    if not isinstance(value, kinds):
        names = ", ".join("None" if kind is None else kind.__name__ for kind in allowed)
        raise SpecError(f"{owner} must be one of: {names}; got {value!r}.")


def name_patterns(owner: str, value: Any) -> tuple[str | type, ...]:
    """`value` as a tuple of layer-name patterns and layer classes; a single one is a tuple of one."""
    if isinstance(value, str | type):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(item, str | type) for item in value):
        return tuple(value)
    raise SpecError(f"{owner} must be a tuple of layer names, patterns or layer classes, got {value!r}.")
