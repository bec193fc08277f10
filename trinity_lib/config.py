"""Settings: checked dataclasses, overrides by dotted name, JSON in and out.

A settings class is a frozen keyword-only dataclass that calls `check(self)` in
`__post_init__` and then `require`s its ranges. An unknown key is always an error.
"""

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any


def require(ok: bool, field: str, value: object, right: str) -> None:
    """Raise ValueError "FIELD is VALUE; it must be RIGHT" unless `ok`."""
    if not ok:
        raise ValueError(f"{field} is {value!r}; it must be {right}.")


def check(settings: Any) -> None:
    """Bring every field of a settings dataclass to its annotated type, or raise ValueError."""
    cls: Any = type(settings)
    for name, hint in _hints(cls).items():
        value = convert(hint, getattr(settings, name), name)
        object.__setattr__(settings, name, value)


def convert(hint: Any, value: Any, field: str) -> Any:
    """`value` as the type `hint` describes; ValueError names the field where it cannot be.

    Text that spells a number or true/false is accepted where a number or a bool belongs,
    because that is how papermill and shells hand them over.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return convert(next(a for a in arguments if a is not type(None)), value, field)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, field)
    if origin is typing.Literal:
        options = ", ".join(map(str, arguments))
        require(value in arguments, field, value, f"one of {options}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, field)
    if origin is dict:
        require(isinstance(value, Mapping), field, value, "a mapping")
        return {
            convert(arguments[0], k, field): convert(arguments[1], v, f"{field}.{k}")
            for k, v in value.items()
        }
    return _convert_scalar(hint, value, field)


def _convert_tuple(arguments: tuple, value: Any, field: str) -> tuple:
    require(isinstance(value, list | tuple), field, value, "a list")
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    require(len(value) == len(arguments), field, value, f"a list of {len(arguments)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(convert(hint, item, f"{field}[{i}]") for i, (hint, item) in enumerate(pairs))


def _convert_scalar(hint: Any, value: Any, field: str) -> Any:
    if hint is bool:
        flags = {"true": True, "false": False}
        value = flags.get(value.lower(), value) if isinstance(value, str) else value
        require(isinstance(value, bool), field, value, "true or false")
    elif hint in (int, float):
        kind = "a whole number" if hint is int else "a number"
        require(not isinstance(value, bool), field, value, kind)
        try:
            number = float(value)
            value = hint(value) if number == hint(number) or number != number else None
        except (TypeError, ValueError, OverflowError):
            value_shown, value = value, None
        else:
            value_shown = number
        require(value is not None, field, value_shown, kind)
    elif hint is str:
        require(isinstance(value, str), field, value, "text")
    return value


def build(cls: type, values: Any, field: str = "") -> Any:
    """A settings object of class `cls` from a mapping, which must hold known keys only."""
    require(isinstance(values, Mapping), field or cls.__name__, values, "a mapping")
    known = _hints(cls)
    for key in values:
        if key not in known:
            raise ValueError(
                f"{cls.__name__} has no setting {key!r}; it has {', '.join(sorted(known))}."
            )
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}.")
    return cls(**values)


def override(settings: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with dotted settings replaced: `override(config, {"optim.muon_rate": 0.01})`.

    Changes are applied together, so that two settings which must agree can move at once.
    """
    cls: Any = type(settings)
    here: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in _hints(cls):
            names = ", ".join(sorted(_hints(cls)))
            raise ValueError(f"{cls.__name__} has no setting {head!r}; it has {names}.")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            here[head] = value
    for head, inner in nested.items():
        part = here.get(head, getattr(settings, head))
        require(dataclasses.is_dataclass(part), head, part, "a group of settings, to be dotted")
        here[head] = override(part, inner)
    return dataclasses.replace(settings, **here)


def to_json(settings: Any) -> str:
    """One line of JSON that `from_json` reads back as an equal object."""
    return json.dumps(dataclasses.asdict(settings), sort_keys=True)


def from_json(cls: type, text: str) -> Any:
    """The settings object of class `cls` that `to_json` wrote; ValueError on unknown keys."""
    return build(cls, json.loads(text))


def digest(settings: Any) -> str:
    """The first eight hexadecimal digits of the SHA-256 of the settings' JSON."""
    return hashlib.sha256(to_json(settings).encode()).hexdigest()[:8]


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}
