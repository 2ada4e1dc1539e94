"""What is wrong with a definition, and its way to JSON and back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from crucible.ir import definitions
from crucible.ir.definitions import DEPTH, Frozen, Rule, fields_of

__all__ = ["from_json", "problems", "to_json", "validate"]

T = TypeVar("T")
_FORMAT = 1  # of the JSON; raise it when an older reader would misunderstand
_BITS = 1024  # of an integer; the text of a very long one Python itself refuses to read
_MISSING: Any = object()  # stands for a required field that the JSON lacks
_SCALARS: dict[Any, tuple[Any, str]] = {
    str: (str, "text"),
    bool: (bool, "True or False"),
    int: (int, "an integer"),
    float: (int | float, "a number"),
    datetime: (datetime, "a time with its zone, like 2026-01-31T12:00:00+01:00"),
}

_STRUCTS: dict[str, Any] = {
    name: kind
    for name in definitions.__all__
    if dataclasses.is_dataclass(kind := getattr(definitions, name))
}


def problems(value: Any) -> tuple[str, ...]:
    """Everything that is wrong with a definition, each with its path, in the order of the fields.

    Raises:
        TypeError: it is none of this module's structs.

    Example:
        >>> from crucible.ir import Experiment, StageDef
        >>> stages = (StageDef(name="train"), StageDef(name="", enabled=1))
        >>> for problem in problems(Experiment(id="first", pipeline=stages)):
        ...     print(problem)
        pipeline[1].name: must be text that is not empty, not ''.
        pipeline[1].enabled: must be True or False, not 1.
    """
    if type(value) not in _STRUCTS.values():
        raise TypeError(f"{_show(value)} is no definition. There are: {', '.join(_STRUCTS)}.")
    return tuple(_struct_problems(value, ""))


def validate(value: T) -> T:
    """The definition itself, if nothing is wrong with it.

    Raises:
        ValueError: something is; the message has a line for each of its `problems`.
        TypeError: it is none of this module's structs.
    """
    _refuse(type(value).__name__, problems(value))
    return value


def _refuse(name: str, found: Iterable[str]) -> None:
    if found := list(found):
        count = "a problem" if len(found) == 1 else f"{len(found)} problems"
        raise ValueError("\n  ".join((f"{name} has {count}:", *found)))


def to_json(value: Any) -> str:
    """A definition as JSON text, its fields in their order.

    Raises:
        ValueError: the definition is not valid; see `validate`.
        TypeError: it is none of this module's structs.

    Example:
        >>> from crucible.ir import StageDef
        >>> print(to_json(StageDef(name="train")))
        {
          "kind": "StageDef",
          "format": 1,
          "definition": {
            "name": "train",
            "module": null,
            "options": {},
            "enabled": true
          }
        }
    """
    # The fields stand apart, since a DatasetRef has a `format` of its own.
    whole = {"kind": type(value).__name__, "format": _FORMAT, "definition": validate(value)}
    return json.dumps(whole, indent=2, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return dict(value) if isinstance(value, Frozen) else fields_of(value)


@typing.overload
def from_json(text: str, kind: type[T]) -> T: ...
@typing.overload
def from_json(text: str, kind: None = None) -> Any: ...
def from_json(text: str, kind: Any = None) -> Any:
    """A valid definition from the text of `to_json`; a field left out takes its default.

    Args:
        text: the JSON.
        kind: the struct it must be, such as `Experiment`; None for whichever the text says.

    Raises:
        ValueError: the text is not JSON, is of another kind or format, or is not valid: every key
            that is unknown, missing or written twice and every problem has its line.
        TypeError: `kind` is none of this module's structs.

    Example:
        >>> from_json('{"kind": "StageDef", "format": 1, "definition": {"nam": "train"}}')
        Traceback (most recent call last):
        ValueError: StageDef has 2 problems:
          nam: StageDef has no such field. Did you mean 'name'?
          name: is missing.
    """
    if kind is not None and kind not in _STRUCTS.values():
        raise TypeError(f"kind={_show(kind)} is no definition. There are: {', '.join(_STRUCTS)}.")
    found: list[str] = []
    whole = _parse(text, found)
    struct = _struct_of(whole)
    if kind not in (None, struct):
        raise ValueError(f"The JSON is of kind {struct.__name__}, not {kind.__name__}.")
    value = _build(struct, whole["definition"], "", found)
    _refuse(struct.__name__, (*found, *problems(value)))
    return value


def _parse(text: str, found: list[str]) -> dict[str, Any]:
    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = {}
        for key, value in pairs:
            if key in made:
                both = f"{_show(made[key])}, then {_show(value)}"
                found.append(f"{_show(key)} is written twice in one object: {both}.")
            made[key] = value
        return made

    try:
        whole = json.loads(text, object_pairs_hook=to_dict)
    except json.JSONDecodeError as error:
        end = " The text ends there: was it cut off?" if error.pos >= len(text.rstrip()) else ""
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"Not JSON at {where}: {error.msg}.{end}") from None
    except (ValueError, RecursionError) as error:  # an endless number, endless nesting
        raise ValueError(f"JSON that cannot be read: {error}.") from None
    if not isinstance(whole, dict) or set(whole) != {"kind", "format", "definition"}:
        has = f"the keys {', '.join(map(repr, whole))}" if isinstance(whole, dict) else _show(whole)
        must = f'{{"kind": "Experiment", "format": {_FORMAT}, "definition": {{...}}}}'
        raise ValueError(f"The JSON must be {must}, but has {has}.")
    return whole


def _struct_of(whole: dict[str, Any]) -> Any:
    kind, number, fields = whole["kind"], whole["format"], whole["definition"]
    if type(number) is not int or number != _FORMAT:
        raise ValueError(
            f"The JSON has format {_show(number)}, and this version of crucible reads {_FORMAT} "
            "only. Read it with the version that wrote it."
        )
    if not isinstance(kind, str) or kind not in _STRUCTS:
        raise ValueError(f"No definition is of kind {_show(kind)}.{_near(kind, _STRUCTS)}")
    if not isinstance(fields, dict):
        raise ValueError(f"The 'definition' must be an object of fields, not {_show(fields)}.")
    return _STRUCTS[kind]


def _build(struct: Any, items: dict[str, Any], path: str, found: list[str]) -> Any:
    """A struct from JSON; what cannot be read stays as it is, for `problems` to name."""
    hints = _hints(struct)
    found += [
        f"{_at(path, key)}: {struct.__name__} has no such field.{_near(key, hints)}"
        for key in items
        if key not in hints
    ]
    required = (f.name for f in dataclasses.fields(struct) if f.default is dataclasses.MISSING)
    values = dict.fromkeys(required, _MISSING)
    for name in hints:
        if name in items:
            values[name] = _read(hints[name], items[name], _at(path, name), found)
    return struct(**values)


def _read(hint: Any, value: Any, path: str, found: list[str]) -> Any:
    base = _split(hint)[0]
    if base in _STRUCTS.values() and isinstance(value, dict):
        return _build(base, value, path, found)
    if typing.get_origin(base) is tuple and isinstance(value, list):
        item = typing.get_args(base)[0]
        return tuple(_read(item, v, f"{path}[{i}]", found) for i, v in enumerate(value))
    if base is datetime and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(value)
    return value


def _struct_problems(struct: Any, path: str) -> Iterator[str]:
    for name, hint in _hints(type(struct)).items():
        yield from _problems(hint, getattr(struct, name), _at(path, name))


def _problems(hint: Any, value: Any, path: str) -> Iterator[str]:
    base, rules, optional = _split(hint)
    if value is _MISSING:
        yield f"{path}: is missing."
    elif value is not None or not optional:
        broken = (rule.says for rule in rules if not rule.holds(value))
        if must := _must_be(base, value) or next(broken, ""):
            close = _close(value, typing.get_args(base))
            yield f"{path}: must be {must}, not {_show(value)}.{close}"
        elif base in _STRUCTS.values():
            yield from _struct_problems(value, path)
        elif typing.get_origin(base) is tuple:
            for i, item in enumerate(typing.cast(Any, value)):
                yield from _problems(typing.get_args(base)[0], item, f"{path}[{i}]")
        elif isinstance(value, Frozen):
            yield from _map_problems(value, path)


def _must_be(base: Any, value: Any) -> str:
    """What a value of this type must be, if it is not."""
    origin = typing.get_origin(base)
    if origin is Literal:
        words = typing.get_args(base)
        known = isinstance(value, str) and value in words
        return "" if known else f"one of {', '.join(map(repr, words))}"
    if base in _STRUCTS.values():
        return "" if isinstance(value, base) else f"{base.__name__}(...)"
    if origin is not None:
        kind, must = (tuple, "a list") if origin is tuple else (Frozen, "a map")
        return "" if isinstance(value, kind) else must
    kind, must = _SCALARS[base]
    if not isinstance(value, kind) or (isinstance(value, bool) and base is not bool):
        return must
    if isinstance(value, datetime):
        return must if value.utcoffset() is None else ""
    return _must_be_json(value)


def _map_problems(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Frozen):
        for key, item in value.items():
            if not isinstance(key, str) or _must_be_json(key):
                yield f"{path}: has the key {_show(key)}, but must have whole strings for keys."
            yield from _map_problems(item, _at(path, key))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _map_problems(item, f"{path}[{i}]")
    elif isinstance(value, Mapping | list):  # what `_freeze` left alone
        yield f"{path}: holds itself, or lies more than {DEPTH} deep."
    elif must := _must_be_json(value):
        yield f"{path}: must be {must}, not {_show(value)}."


def _must_be_json(value: Any) -> str:
    """What a scalar must be for JSON to bring it back, if it is not."""
    if isinstance(value, str):
        halved = re.search("[\ud800-\udfff]", value)
        return "text without half characters (lone surrogates)" if halved else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "finite, or None: JSON has no NaN or infinity"
    if isinstance(value, int):
        return "" if value.bit_length() <= _BITS else f"an integer of at most {_BITS} bits"
    return "" if value is None else "text, a number, True, False, None, a list or a map"


def _split(hint: Any) -> tuple[Any, list[Rule], bool]:
    """`Annotated[int, rule] | None` as `(int, [rule], True)`."""
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        hint, _ = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        hint, *rules = typing.get_args(hint)
        return hint, rules, optional
    return hint, [], optional


@functools.cache
def _hints(struct: Any) -> dict[str, Any]:
    return typing.get_type_hints(struct, include_extras=True)


def _at(path: str, key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{_show(key)}]"


def _show(value: Any) -> str:
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except Exception:  # an integer too long to write, a class of the caller's
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _close(word: Any, known: Iterable[Any]) -> str:
    if not isinstance(word, str):
        return ""
    words = [other for other in known if isinstance(other, str)]
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _near(word: Any, known: Iterable[str]) -> str:
    return _close(word, known) or f" There are: {', '.join(known)}."
