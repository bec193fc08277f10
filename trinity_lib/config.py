"""Settings: checked dataclasses, overrides by dotted name, JSON in and out.

A settings class is a frozen keyword-only dataclass that calls `check(self)` in
`__post_init__` and then `require`s its ranges. An unknown key is always an error. What a
user can put right is a `Refusal`, whose one sentence is all that is shown of it.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class Refusal(Exception):
    """What the user can put right, in one sentence.

    A notebook shows the sentence in red and no traceback; a command prints it and ends
    with 1. Any other exception is a defect, and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:  # IPython's own hook
        return [str(self)]


class BadValue(Refusal, ValueError):
    """A value or the content of a file that cannot be used."""


class Missing(Refusal, FileNotFoundError):
    """A file, folder or run that is not there."""


class Taken(Refusal, FileExistsError):
    """A run that is complete, was begun before, or is being written."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """For commands: print a refusal's sentence and exit with 1, without a traceback.

    There is none either where what reads stdout stops early, as `head` does.
    """
    try:
        yield
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        raise SystemExit(1) from refusal
    except BrokenPipeError as error:
        if not _unread("\n"):  # it was a socket's, say
            raise
        raise SystemExit(1) from error
    finally:
        _unread()  # here, because Python's own flush at exit would show a traceback


def _unread(last: str = "") -> bool:
    """Print `last` and flush; whether stdout's reader is gone, and what was left with it.

    Where stdout has no buffer (PYTHONUNBUFFERED), only a `last` that is not empty tells.
    """
    try:
        print(end=last, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def require(ok: bool, field: str, value: object, right: str) -> None:
    """Raise BadValue "FIELD is VALUE; it must be RIGHT" unless `ok`."""
    if not ok:
        raise BadValue(f"{field} is {value!r}; it must be {right}.")


def meant(value: object, known: Iterable[str]) -> str:
    """ " (did you mean 'steps'?)" where a name that is not known is close to one that is."""
    close = difflib.get_close_matches(str(value), known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check(settings: Any) -> None:
    """Bring every field of a settings dataclass to its annotated type, or raise BadValue."""
    cls: Any = type(settings)
    for name, hint in _hints(cls).items():
        value = convert(hint, getattr(settings, name), name)
        object.__setattr__(settings, name, value)


def convert(hint: Any, value: Any, field: str) -> Any:
    """`value` as the type `hint` describes; BadValue names the field where it cannot be.

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
        options = [str(each) for each in arguments]
        right = f"one of {', '.join(options)}{meant(value, options)}"
        require(value in arguments, field, value, right)
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
            finite = math.isfinite(number)
            kind = kind if finite or hint is int else "a finite number"
            shown, value = number, hint(value) if finite and number == hint(number) else None
        except (TypeError, ValueError, OverflowError):
            shown, value = value, None
        require(value is not None, field, shown, kind)
    elif hint is str:
        require(isinstance(value, str), field, value, "text")
    return value


def build(cls: type, values: Any, field: str = "") -> Any:
    """A settings object of class `cls` from a mapping, which must hold known keys only."""
    require(isinstance(values, Mapping), field or cls.__name__, values, "a mapping")
    known = _hints(cls)
    for key in values:
        if key not in known:
            raise BadValue(_no_setting(cls, key))
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BadValue(f"{cls.__name__} lacks {', '.join(missing)}.")
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
            raise BadValue(_no_setting(cls, head))
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
    """The settings object of class `cls` that `to_json` wrote; BadValue on unknown keys."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise BadValue(f"{cls.__name__} is not JSON: {first_line(error)}.") from error
    return build(cls, values)


def from_file(cls: type, path: Path) -> Any:
    """The settings object in a file given as `--config`; a Refusal names the file."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Missing(f"--config is {path}; it cannot be read: {error}.") from error
    try:
        return from_json(cls, text)
    except BadValue as error:
        raise BadValue(f"--config {path}: {error}") from error


def differences(old: Any, new: Any, leave_out: tuple[str, ...] = ()) -> list[str]:
    """What differs between two settings of one class, as "NAME is NEW and was OLD"."""
    found = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name in leave_out or before == after:
            continue
        if dataclasses.is_dataclass(before) and type(before) is type(after):
            found += [f"{field.name}.{inner}" for inner in differences(before, after)]
        else:
            found.append(f"{field.name} is {after!r} and was {before!r}")
    return found


def digest(settings: Any) -> str:
    """The first eight hexadecimal digits of the SHA-256 of the settings' JSON."""
    return hashlib.sha256(to_json(settings).encode()).hexdigest()[:8]


def _no_setting(cls: type, name: str) -> str:
    known = sorted(_hints(cls))
    has = f"{', '.join(known)}{meant(name, known)}"
    return f"{cls.__name__} has no setting {name!r}; it has {has}."


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}
