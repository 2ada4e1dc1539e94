"""Recipes: a workflow builder and a frozen config, nothing else; and their command line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from crucible.kitchen.stage import Stage
from crucible.kitchen.words import did_you_mean

__all__ = ["Recipe", "main", "override", "to_json"]


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
    known = {field.name for field in dataclasses.fields(config)}
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise TypeError(
                f"{type(config).__name__} has no field {name!r}.{did_you_mean(name, known)}"
            )
        current = getattr(config, name)
        nested = isinstance(value, Mapping) and dataclasses.is_dataclass(current)
        values[name] = override(current, value) if nested else value
    return dataclasses.replace(config, **values)


def to_json(value: Any) -> Any:
    """A config as plain values that JSON can say."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def main(recipe: Recipe) -> None:
    """Run a recipe from the command line: every field of its config is an option.

    Exits with 0 when done, 2 when an option is wrong, 1 when the input is, 130 after Ctrl-C; an
    error inside the training loop is raised with its traceback.
    """
    import tyro

    from crucible.kitchen.runner import run

    program = f"python -m recipes.{recipe.name}"
    lines = (sys.modules["__main__"].__doc__ or "").splitlines()
    description = "\n\n".join(filter(None, lines))  # each its own paragraph: none are joined
    try:
        config = tyro.cli(
            type(recipe.config),
            default=recipe.config,
            prog=program,
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:  # a field's own check, in __post_init__
        _exit(2, f"{program}: {error}")
    try:
        run(dataclasses.replace(recipe, config=config))
    except KeyboardInterrupt as interrupt:
        notes = "\n".join(getattr(interrupt, "__notes__", ()))
        _exit(130, f"\nInterrupted.\n{notes}")
    except (ValueError, OSError, ImportError) as error:
        notes = getattr(error, "__notes__", [])
        if any(note.startswith("At ") for note in notes):
            raise
        _exit(1, "\n".join([f"{program}: {error}", *notes]))


def _exit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
