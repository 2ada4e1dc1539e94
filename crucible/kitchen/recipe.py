"""Recipes: a workflow builder and a frozen config, nothing else."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crucible.kitchen.stage import Stage
from crucible.kitchen.words import did_you_mean

__all__ = ["Recipe", "changes", "override", "to_json"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a file in `recipes/` holds.

    Attributes:
        name: names the run's directory, `runs/NAME/...`.
        workflow: builds the workflow from the config.
        config: the settings, a frozen dataclass.
    """

    name: str
    workflow: Callable[[Any], Stage]
    config: Any


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with some fields changed; a mapping changes fields of a nested config.

    Values may be what JSON says of them: a list for a tuple, a string for a path.

    Raises:
        TypeError: no such field; a misspelling is answered.

    Example:
        >>> from crucible.kitchen import SupervisedConfig
        >>> config = override(SupervisedConfig(), {"seed": 7, "model": {"layers": 4}})
        >>> config.seed, config.model.layers
        (7, 4)
        >>> override(config, {"learning_rat": 0.1})
        Traceback (most recent call last):
        TypeError: SupervisedConfig has no field 'learning_rat'. Did you mean 'learning_rate'?
    """
    known = _fields(type(config))
    hints = typing.get_type_hints(type(config))
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise TypeError(
                f"{type(config).__name__} has no field {name!r}.{did_you_mean(name, known)}"
            )
        values[name] = _fit(name, hints[name], getattr(config, name), value)
    return dataclasses.replace(config, **values)


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _fit(name: str, hint: Any, current: Any, value: Any) -> Any:
    """A value as its field wants it."""
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, Mapping):
        configs: list[Any] = [
            kind for kind in (type(current), *kinds) if dataclasses.is_dataclass(kind)
        ]
        if not configs:
            raise TypeError(f"{name} takes {hint}, not a mapping: {dict(value)!r}.")
        kind = next((kind for kind in configs if set(value) <= _fields(kind)), configs[0])
        return override(current if isinstance(current, kind) else kind(), value)
    if isinstance(value, str) and Path in kinds:
        return Path(value).expanduser()
    return tuple(value) if isinstance(value, list) else value


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configs in JSON, a line a field."""
    lines = []
    for name in after:
        old, new = before.get(name), after[name]
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return lines


def to_json(value: Any) -> Any:
    """A config as plain values that JSON can say."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value
