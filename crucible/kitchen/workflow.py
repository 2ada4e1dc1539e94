"""Combinators: they take stages and are stages.

A number or a condition may be a function whose parameters name what it needs, as in
`repeat(lambda config: config.num_steps, ...)` or `when(lambda step: step > 0, ...)`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from crucible.kitchen.context import Context
from crucible.kitchen.stage import Stage, parameters_of
from crucible.kitchen.words import did_you_mean

__all__ = ["check", "every", "repeat", "sequence", "when"]


def sequence(*stages: Stage) -> Stage:
    """Run stages one after the other.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> double = stage("x")(lambda x: 2 * x)
        >>> sequence(double, double)(Context(x=1))["x"]
        4
    """
    _must_be_stages("sequence", stages)

    def run(context: Context) -> Context:
        for part in stages:
            context = part(context)
        return context

    return _combine("sequence", stages, run, needs=_needs(stages), gives=_gives(stages))


def repeat(
    count: int | Callable[..., int],
    *stages: Stage,
    start: int | Callable[..., int] = 0,
    index: str = "step",
) -> Stage:
    """Run stages for each number from `start` up to, not including, `count`.

    Args:
        count: where to stop; 0 repetitions are 0 repetitions.
        *stages: the body.
        start: the first number; a resumed run starts at the restored step.
        index: the name under which the body finds the number, a Python int.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> add = stage("x")(lambda x, step: x + step)
        >>> repeat(5, add)(Context(x=0))["x"], repeat(0, add)(Context(x=0))["x"]
        (10, 0)
    """
    _must_be_stages("repeat", stages)
    first, stop = _argument(start), _argument(count)

    def run(context: Context) -> Context:
        begin, end = operator.index(first(context)), operator.index(stop(context))
        for number in range(begin, end):
            try:
                context = context.replace(**{index: number})
                for part in stages:
                    context = part(context)
            except (Exception, KeyboardInterrupt) as error:
                error.add_note(f"At {index} {number} of {end}.")
                raise
        return context

    needs = (*first.needs, *stop.needs, *_needs(stages, given=(index,)))
    runs = isinstance(count, int) and isinstance(start, int) and start < count
    gives = (index, *_gives(stages)) if runs else ()
    return _combine("repeat", stages, run, needs=needs, gives=gives, shown=[stop, *stages])


def every(period: int, *stages: Stage, index: str = "step") -> Stage:
    """Run stages when the loop's number is a multiple of `period`; 0 means never.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> seen = stage("seen")(lambda seen, step: (*seen, step))
        >>> repeat(7, every(3, seen))(Context(seen=()))["seen"]
        (0, 3, 6)
    """
    if not isinstance(period, int) or period < 0:
        raise ValueError(f"every({period}, ...): a period is a number of steps, or 0 for never.")
    _must_be_stages("every", stages)

    def run(context: Context) -> Context:
        if period and context[index] % period == 0:
            for part in stages:
                context = part(context)
        return context

    return _combine("every", stages, run, needs=(index, *_needs(stages)), shown=[period, *stages])


def when(
    condition: bool | Callable[..., Any], *stages: Stage, otherwise: Stage | None = None
) -> Stage:
    """Run stages if a condition holds, else `otherwise`.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> down, up = stage("x")(lambda x: x - 1), stage("x")(lambda x: x + 1)
        >>> when(lambda x: x > 0, down, otherwise=up)(Context(x=-3))["x"]
        -2
    """
    branches = (sequence(*stages), sequence(*((otherwise,) if otherwise else ())))
    holds = _argument(condition)

    def run(context: Context) -> Context:
        return (branches[0] if holds(context) else branches[1])(context)

    needs = (*holds.needs, *branches[0].needs, *branches[1].needs)
    gives = tuple(name for name in branches[0].gives if name in branches[1].gives)
    shown = [holds, *stages] + ([f"otherwise={otherwise!r}"] if otherwise else [])
    return _combine("when", branches, run, needs=needs, gives=gives, shown=shown)


def check(workflow: Stage, given: Iterable[str]) -> None:
    """Check before anything runs that every stage will find what it needs.

    Args:
        workflow: any stage.
        given: the names in the first context.

    Raises:
        ValueError: something needed is never given; a misspelling is answered.
    """
    given = set(given)
    for name in workflow.needs:
        if name not in given:
            reader = _first_reader(workflow, name)
            elsewhere = set(_all_gives(workflow))
            advice = (
                " It is given only later, or in a loop or branch that may not run: give it a first "
                f"value, or make the parameter optional ({name}=None)."
                if name in elsewhere
                else did_you_mean(name, given | elsewhere)
            )
            raise ValueError(f"{reader} needs {name!r}, which nothing gives before it." + advice)


def _first_reader(workflow: Stage, name: str) -> str:
    for part in workflow.parts:
        if name in part.needs:
            return _first_reader(part, name)
    return f"Stage {workflow.name!r}" if workflow.fn else f"The condition or count of {workflow}"


def _all_gives(workflow: Stage) -> tuple[str, ...]:
    return (*workflow.gives, *(name for part in workflow.parts for name in _all_gives(part)))


class _argument:
    """A constant, or a function of named values of the context, with its needs."""

    def __init__(self, value: Any):
        self.value = value
        self.needs = parameters_of(value)[0] if callable(value) else ()

    def __call__(self, context: Context) -> Any:
        if not callable(self.value):
            return self.value
        return self.value(**{name: context[name] for name in self.needs})

    def __repr__(self) -> str:
        name = getattr(self.value, "__name__", "")
        return (name if name != "<lambda>" else f"λ({', '.join(self.needs)})") or repr(self.value)


def _combine(name, stages, run, *, needs, gives=(), shown=None) -> Stage:
    """A stage made of stages; `shown` are the arguments it was made from, if not just these."""
    arguments = ", ".join(map(str, stages if shown is None else shown))
    return Stage(
        name=name,
        needs=tuple(dict.fromkeys(needs)),
        gives=tuple(dict.fromkeys(gives)),
        run=run,
        host=any(part.host for part in stages),
        parts=tuple(stages),
        expression=f"{name}({arguments})",
    )


def _needs(stages: Iterable[Stage], given: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What a series of stages needs from outside."""
    have, needs = set(given), []
    for part in stages:
        needs += [name for name in part.needs if name not in have]
        have.update(part.gives)
    return tuple(needs)


def _gives(stages: Iterable[Stage]) -> tuple[str, ...]:
    return tuple(name for part in stages for name in part.gives)


def _must_be_stages(combinator: str, stages: Iterable[Any]) -> None:
    for part in stages:
        if not isinstance(part, Stage):
            raise TypeError(
                f"{combinator} takes stages, not {part!r}. Decorate a function with "
                "@kitchen.stage('what_it_gives')."
            )
