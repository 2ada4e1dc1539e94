"""What a plan has run, the run does not run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from crucible.kitchen.context import Context
from crucible.kitchen.scope import completed
from crucible.kitchen.stage import Stage

__all__ = ["Made", "identical", "recall"]

Made = tuple[Stage, dict[str, Any], Any]  # a stage, what it was given, and what it made of it


def recall(made: Sequence[Made], workflow: Stage) -> Stage:
    """The workflow, in which stages that the plan has run do not run again.

    A stage finds what it made if it is given the very same objects as then.
    """
    results = {id(stage) for stage, _, _ in made if stage.plan is True}

    def known(stage: Stage) -> Stage:
        if stage.again is not None:
            return stage.again(*map(known, stage.parts))
        return _recalling(stage, made) if id(stage) in results else stage

    return known(workflow)


def _recalling(stage: Stage, made: Sequence[Made]) -> Stage:
    def run(context: Context) -> Context:
        values = {name: context[name] for name in stage.reads if name in context}
        for other, seen, result in made:
            if other is stage and identical(seen, values):
                results = (result,) if len(stage.gives) == 1 else result
                after = context.replace(**dict(zip(stage.gives, results or (), strict=True)))
                if stage.rollback is not None:
                    completed(stage, after)
                return after
        return stage.run(context)

    return replace(stage, run=run)


def identical(seen: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether named values are the very same objects, or equal numbers, texts or None."""
    if seen.keys() != values.keys():
        return False
    return all(seen[name] is values[name] or _same(seen[name], values[name]) for name in seen)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | float | str | None) and a == b
