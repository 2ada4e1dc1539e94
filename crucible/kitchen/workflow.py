"""Combinators: they take stages and are stages.

A number or a condition may be a function whose parameters name what it needs, as in
`repeat(lambda config: config.num_steps, ...)` or `when(lambda step: step > 0, ...)`. Those that
run stages beside each other are in `concurrency`, those for what can go wrong in `guards`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

from crucible import telemetry
from crucible.kitchen import ledger
from crucible.kitchen.context import Context
from crucible.kitchen.scope import reached, series
from crucible.kitchen.stage import Stage, missing
from crucible.kitchen.wiring import (
    Argument,
    combine,
    every_part,
    only_stages,
    options,
    surely_runs,
)

__all__ = ["bounds", "every", "fuse", "repeat", "run_id", "sequence", "turn", "when"]


def sequence(*stages: Stage) -> Stage:
    """Run stages one after the other.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> double = stage("x")(lambda x: 2 * x)
        >>> sequence(double, double)(Context(x=1))["x"]
        4
    """
    return combine("sequence", stages, series(only_stages("sequence", stages)), again=sequence)


def fuse(*stages: Stage) -> Stage:
    """Run device stages one after the other, compiled as one program with all their control flow.

    A compiled workflow makes one program of neighbouring device stages by itself, and leaves loops
    and conditions to the host. Within `fuse` they are XLA's: `when` and `every` become `lax.cond`,
    `repeat` a `lax` loop, so conditions must be arrays or known when traced.

    Raises:
        ValueError: a stage in it touches the host, needs a thread, or can be rolled back.

    Example:
        >>> from crucible.kitchen import Context, compile, stage
        >>> add = stage("x")(lambda x, step: x + step)
        >>> int(compile(fuse(repeat(5, add)))(Context(x=0))["x"])
        10
    """
    for part in (part for stage in only_stages("fuse", stages) for part in every_part(stage)):
        if part.fn is not None and part.host:
            raise ValueError(
                f"fuse takes device stages, but {part.name!r} touches the host (host=True). Put it "
                "before or after."
            )
        if part.kind in ("stream", "async_loop") or part.rollback is not None:
            what = f"{part}, which needs a thread" if part.parts else f"the rollback of {part}"
            raise ValueError(f"fuse cannot make {what} part of one program. Leave fuse out.")
    return combine("fuse", stages, series(stages), again=fuse)


def repeat(
    *count_and_stages: Any,
    over: Any = None,
    start: int | Callable[..., int] = 0,
    index: str | None = None,
    item: str = "item",
    chunk: int | str | Callable[..., Any] = 1,
) -> Stage:
    """Run stages for each number up to a count, or for each item of a collection.

    `repeat(count, *stages)` runs them for each number from `start` up to, not including, `count`;
    `repeat(*stages, over=items)` for each item. No repetitions are no repetitions.

    Args:
        *count_and_stages: where to stop, unless there is `over`, and the body.
        over: a collection, or a function of the context that returns one; asked once.
        start: the first number, unless there is `over`; a resumed run starts at the restored step.
        index: the name under which the body finds the number, a Python int: by default `step`, and
            `index` with `over`.
        item: the name under which the body finds the item.
        chunk: how many steps a compiled workflow runs per dispatch: the body's device stages become
            one loop on the device. Host stages before them run ahead for the whole chunk, and those
            after them follow; an `every(n, ...)` of host stages needs a chunk that divides n.
            "auto" times both forms and takes the faster.

    Raises:
        TypeError: something is not a stage, a number not whole, or `over` not a collection.
        ValueError: the chunk is not a positive number, "auto" or a function.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> add = stage("x")(lambda x, step: x + step)
        >>> repeat(5, add)(Context(x=0))["x"], repeat(0, add)(Context(x=0))["x"]
        (10, 0)
        >>> join = stage("text")(lambda text, item: text + item)
        >>> repeat(join, over=["a", "b"])(Context(text=""))["text"]
        'ab'
    """
    if not (callable(chunk) or chunk == "auto" or (type(chunk) is int and chunk > 0)):
        raise ValueError(f"chunk={chunk!r} must be a number of steps from 1 on, or 'auto'.")
    if over is None:
        if not count_and_stages or isinstance(count_and_stages[0], Stage):
            raise TypeError("repeat takes a count before its stages, or over=, a collection.")
        count, *stages = count_and_stages
    else:
        count, stages = None, list(count_and_stages)
        if callable(start) or start != 0:
            raise TypeError("repeat(over=...) begins with the first item: leave start= out.")
    index = index or ("step" if over is None else "index")
    settings = {
        "count": Argument(count if over is not None else _number("repeat: the count", count)),
        "over": None if over is None else Argument(over if callable(over) else _collection(over)),
        "start": Argument(_number("repeat: start", start)),
        "index": index,
        "item": None if over is None else item,
        "chunk": Argument(chunk),
    }
    return _repeat(settings, only_stages("repeat", stages))


def _repeat(settings: Mapping[str, Any], stages: Sequence[Stage]) -> Stage:
    over, index, item = settings["over"], settings["index"], settings["item"]
    body = series(stages, commit=True)

    def run(context: Context) -> Context:
        begin, end, items = bounds(settings, context)
        try:
            for number in range(begin, end):
                values = {index: number} if items is None else {index: number, item: items[number]}
                context = turn(body, context.replace(**values), index, number, end)
        except BaseException as error:
            reached(error, context)
            raise
        return context

    arguments = [over, *(settings[name] for name in ("count", "start", "chunk"))]
    bound = (index,) if over is None else (index, item)
    runs = surely_runs(settings)
    shown = [*stages, f"over={over}"] if over else [settings["count"], *stages]
    usual = {"start": 0, "index": "index" if over else "step", "item": "item", "chunk": 1}
    shown += options(settings, usual)
    return combine(
        "repeat",
        stages if runs is not False else (),
        run,
        arguments=[a for a in arguments if a] if runs is not False else [],
        bound=bound,
        certain=runs is True,
        settings=settings,
        shown=shown,
        again=lambda *parts: _repeat(settings, parts),
    )


def bounds(settings: Mapping[str, Any], context: Context) -> tuple[int, int, Any]:
    """The first number of a loop, the one to stop at, and the items if it has any."""
    over = settings["over"]
    if over is None:
        begin, end = settings["start"](context), settings["count"](context)
        return operator.index(begin), operator.index(end), None
    items = list(_collection(over(context), f"{over}"))
    return 0, len(items), items


def _collection(items: Any, shown: str = "...") -> Any:
    """The same items, if they are a collection."""
    whole = isinstance(items, Sized) and isinstance(items, Iterable)
    if not whole or isinstance(items, str | bytes | Mapping):
        raise TypeError(
            f"repeat(over={shown}) got a {type(items).__name__}, but needs a collection, such as a "
            "list. For what is lazy or endless there is stream."
        )
    return items


def _number(what: str, value: Any) -> Any:
    """The same number as a plain int, or the same function."""
    if callable(value):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be a whole number, or a function, not {value!r}.") from None


def turn(
    body: Callable[[Context], Context],
    context: Context,
    index: str,
    number: int,
    end: Any,
    count: int = 1,
) -> Context:
    """One turn of a loop, or a chunk of them; an error says which."""
    try:
        if telemetry.wanted("training.step") and index == "step":
            about = {"step": number, "steps": count, "total_steps": end, "run_id": run_id()}
            with telemetry.span("training.step", about):
                return body(context)
        return body(context)
    except (Exception, KeyboardInterrupt) as error:
        which = f"{index} {number}" if count == 1 else f"{index}s {number} to {number + count - 1}"
        error.add_note(f"At {which} of {end}." if end else f"At {which}.")
        raise


def run_id() -> str:
    """The run that this thread works for."""
    current = ledger.current()
    return current.run_id if current else ""


def every(period: int, *stages: Stage, index: str = "step") -> Stage:
    """Run stages when the loop's number is a multiple of `period`; 0 means never.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> seen = stage("seen", host=True)(lambda seen, step: (*seen, step))
        >>> repeat(7, every(3, seen))(Context(seen=()))["seen"]
        (0, 3, 6)
    """
    if callable(period) or (period := _number("every: the period", period)) < 0:
        raise ValueError(f"every({period}, ...): a period is a number of steps, or 0 for never.")
    body = series(only_stages("every", stages))

    def run(context: Context) -> Context:
        if index not in context:
            raise missing(f"every({period}, ...)", index, context)
        return body(context) if context[index] % period == 0 else context

    return combine(
        "every",
        stages if period else (),
        {0: lambda context: context, 1: body}.get(period, run),
        arguments=[Argument(None, (index,))] if period > 1 else [],
        certain=period == 1,
        settings={"period": period, "index": index},
        shown=[period, *stages, *options({"index": index}, {"index": "step"})],
        again=lambda *parts: every(period, *parts, index=index),
    )


def when(
    condition: bool | Callable[..., Any], *stages: Stage, otherwise: Stage | None = None
) -> Stage:
    """Run stages if a condition holds, else `otherwise`.

    A literal True or False is decided at once: the other branch is not part of the workflow.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> down, up = stage("x")(lambda x: x - 1), stage("x")(lambda x: x + 1)
        >>> when(lambda x: x > 0, down, otherwise=up)(Context(x=-3))["x"]
        -2
    """
    others = () if otherwise is None else (otherwise,)
    only_stages("when", (*stages, *others))
    return _when(Argument(condition), (sequence(*stages), sequence(*others)))


def _when(holds: Argument, branches: Sequence[Stage], shown: Sequence[Any] = ()) -> Stage:
    then, other = (branch.parts if branch.kind == "sequence" else (branch,) for branch in branches)
    if not shown:
        other = other if len(other) < 2 else (sequence(*other),)
        shown = [holds, *then, *(f"otherwise={stage}" for stage in other)]
    settings = {"condition": holds}
    if not callable(holds.value):
        again = lambda *parts: _when(holds, parts, shown)  # noqa: E731
        dead, chosen = sequence(), branches[0 if holds.value else 1]
        parts = (chosen, dead) if holds.value else (dead, chosen)
        return combine("when", parts, chosen.run, settings=settings, shown=shown, again=again)

    def run(context: Context) -> Context:
        return (branches[0] if holds(context) else branches[1]).run(context)

    gives = tuple(name for name in branches[0].gives if name in branches[1].gives)
    made = combine(
        "when",
        branches,
        run,
        apart=True,
        arguments=[holds],
        certain=False,
        settings=settings,
        shown=shown,
        again=lambda *parts: _when(holds, parts),
    )
    return dataclasses.replace(made, gives=gives)
