"""Combinators: they take stages and are stages.

A number or a condition may be a function whose parameters name what it needs, as in
`repeat(lambda config: config.num_steps, ...)` or `when(lambda step: step > 0, ...)`. Those that
run stages beside each other (`parallel`, `stream`, `async_loop`, `timeout`) are in `concurrency`.
"""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

from crucible import telemetry, train
from crucible.kitchen import ledger
from crucible.kitchen.context import Context
from crucible.kitchen.scope import failed_at, reached, series
from crucible.kitchen.stage import Stage, missing, parameters_of, take
from crucible.kitchen.words import did_you_mean

__all__ = ["check", "ensure", "every", "fuse", "repeat", "retry", "sequence", "when"]


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
    runs = _certain(settings)
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


def _certain(settings: Mapping[str, Any]) -> bool | None:
    """Whether a loop certainly runs (True), certainly does not (False), or it depends."""
    if settings["over"] is not None:
        items = settings["over"].value
        return None if callable(items) else len(items) > 0
    start, count = settings["start"].value, settings["count"].value
    if isinstance(start, int) and isinstance(count, int):
        return start < count
    return None


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


def ensure(stage: Stage, cleanup: Stage) -> Stage:
    """Run a stage, and then the cleanup, whatever happens: an error, or Ctrl-C.

    The cleanup finds the context as far as it has come. It runs even if the stage fails at once, so
    what the stage itself gives must be optional for it (a parameter with a default). What goes
    wrong in a cleanup after an error becomes a note on that error.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> work = stage("file", host=True)(lambda: "open")
        >>> close = stage("file", host=True)(lambda file=None: "closed")
        >>> ensure(work, close)(Context())["file"]
        'closed'
    """
    only_stages("ensure", (stage, cleanup))
    body = series((stage,))

    def run(context: Context) -> Context:
        cleaning = False
        try:
            context = body(context)
            with train.hold_interrupts():
                cleaning = True
                return cleanup.run(context)
        except BaseException as error:
            if cleaning:
                reached(error, context)
                raise
            last = failed_at(error, context)
            try:
                with train.hold_interrupts():
                    try:
                        cleanup.run(last)
                    except Exception as also:
                        error.add_note(f"The cleanup {cleanup} failed too: {also!r}")
            except KeyboardInterrupt as held:
                reached(held, last)
                raise
            raise

    return combine("ensure", (stage, cleanup), run, apart=True, again=ensure)


def retry(
    stage: Stage,
    *,
    attempts: int = 3,
    backoff: float = 1.0,
    on: type[Exception] | tuple[type[Exception], ...] = (OSError,),
) -> Stage:
    """Run a host stage again when it fails, each time from the context that it started from.

    Args:
        stage: all of it touches the host: a device stage may have consumed what it was given.
        attempts: how often to try in all, at least once.
        backoff: seconds to wait before the second try; twice as long before each that follows.
        on: the errors to try again after; all others, and the last one, go on.

    Raises:
        TypeError: `on` is not made of kinds of Exception (Ctrl-C is not one).
        ValueError: a stage in it runs on the device, or a number is out of range.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> answers = iter([OSError("busy"), "ready"])
        >>> @stage("answer", host=True)
        ... def ask():
        ...     answer = next(answers)
        ...     if isinstance(answer, OSError):
        ...         raise answer
        ...     return answer
        >>> retry(ask, attempts=2, backoff=0.0)(Context())["answer"]
        Stage 'ask' failed: OSError: busy. Trying again (2 of 2) in 0 s.
        'ready'
    """
    host_only("retry", stage)
    if not isinstance(attempts, int) or attempts < 1 or not backoff >= 0:
        raise ValueError(f"retry(attempts={attempts}, backoff={backoff}): at least 1 and 0 s.")
    on = on if isinstance(on, tuple) else (on,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in on):
        raise TypeError(f"retry(on={on}): name kinds of Exception, such as on=(OSError,).")
    body = series((stage,))

    def run(context: Context) -> Context:
        for attempt in range(1, attempts + 1):
            try:
                return body(context)
            except on as error:
                if attempt == attempts:
                    error.add_note(f"Tried {attempts} time{'s' * (attempts > 1)}.")
                    raise
                wait = backoff * 2 ** (attempt - 1)
                print(
                    f"Stage {stage.name!r} failed: {type(error).__name__}: {error}. Trying again "
                    f"({attempt + 1} of {attempts}) in {wait:g} s."
                )
                about = {"stage": stage.name, "error": repr(error), "run_id": run_id()}
                telemetry.emit("stage.retry", {"attempt": attempt}, about)
            with ledger.waiting():
                time.sleep(wait)
        raise AssertionError("unreachable")

    names = ", ".join(kind.__name__ for kind in on)
    settings = {"attempts": attempts, "backoff": backoff, "on": names}
    names += "," if len(on) == 1 else ""
    shown = [stage, f"attempts={attempts}", f"backoff={backoff:g}", f"on=({names})"]
    again = lambda part: retry(part, attempts=attempts, backoff=backoff, on=on)  # noqa: E731
    return combine("retry", (stage,), run, settings=settings, shown=shown, again=again)


def check(workflow: Stage, given: Iterable[str]) -> None:
    """Check before anything runs that every stage will find what it needs.

    Args:
        workflow: any stage.
        given: the names in the first context.

    Raises:
        ValueError: something needed is never given; a misspelling is answered.
    """
    for problem in wiring_problems(workflow, given):
        raise ValueError(problem)


def wiring_problems(workflow: Stage, given: Iterable[str]) -> list[str]:
    """What `check` would say, all of it."""
    given, problems = set(given), []
    for name in workflow.needs:
        if name not in given:
            reader = _first_reader(workflow, name)
            elsewhere = may_give(workflow)
            advice = (
                " It is given only later, or in a loop or branch that may not run: give it a first "
                f"value, or make the parameter optional ({name}=None)."
                if name in elsewhere
                else did_you_mean(name, given | elsewhere)
            )
            problems.append(f"{reader} needs {name!r}, which nothing gives before it." + advice)
    return problems


def _first_reader(workflow: Stage, name: str) -> str:
    for part in workflow.parts:
        if name in part.needs:
            return _first_reader(part, name)
        if name in _undo_needs(part):
            return f"The rollback of {part.name!r}"
    return f"Stage {workflow.name!r}" if workflow.fn else f"The condition or count of {workflow}"


def _undo_needs(stage: Stage) -> Iterable[str]:
    """Names that must be in the context for a stage's rollback, beside what the stage gives."""
    needs = parameters_of(stage.rollback)[0] if stage.rollback is not None else ()
    return [name for name in needs if name not in (*stage.gives, "error")]


def may_give(workflow: Stage) -> set[str]:
    """All names that a stage may give, on any path; also the numbers and items of its loops."""
    return {name for part in every_part(workflow) for name in (*part.gives, *_bound(part))}


def _bound(stage: Stage) -> Iterable[str]:
    """Names that a loop gives to its body itself, if it runs."""
    if stage.kind == "repeat" and _certain(stage.settings) is False:
        return ()
    loop = stage.kind in ("repeat", "stream", "async_loop")
    names = (stage.settings.get(key) for key in ("index", "item", "version") if loop)
    return [name for name in names if name is not None]


def every_part(workflow: Stage) -> Iterable[Stage]:
    """A stage and all that it is made of, itself first."""
    yield workflow
    for part in workflow.parts:
        yield from every_part(part)


def leaves(stages: Iterable[Stage]) -> Iterable[Stage]:
    """The stages made from functions."""
    return (part for s in stages for part in every_part(s) if part.fn is not None)


class Argument:
    """A constant, or a function of named values of the context, with its needs."""

    def __init__(self, value: Any, needs: tuple[str, ...] = ()):
        if isinstance(value, Stage):
            raise TypeError(f"The stage {value} stands where a value or a plain function belongs.")
        self.value = value
        self.needs, self.optional = parameters_of(value) if callable(value) else (needs, ())
        self._who = str(self) if callable(value) else ""

    def __call__(self, context: Context) -> Any:
        if not callable(self.value):
            return self.value
        return self.value(**take(context, self.needs, self.optional, self._who))

    def but(self, name: str) -> Argument:
        """What it needs but for a name that it is given by who asks."""
        other = Argument(None, tuple(n for n in self.needs if n != name))
        other.optional = tuple(n for n in self.optional if n != name)
        return other

    def __repr__(self) -> str:
        name = getattr(self.value, "__name__", "")
        return (name if name != "<lambda>" else f"λ({', '.join(self.needs)})") or repr(self.value)


def options(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """The keyword arguments of an expression: those that are not the usual ones."""
    values = {name: settings[name] for name in usual if settings[name] is not None}
    plain = {k: v.value if isinstance(v, Argument) else v for k, v in values.items()}
    unusual = [k for k, v in plain.items() if callable(v) or v != usual[k]]
    return [f"{name}={values[name]!r}" for name in unusual]


def combine(
    kind: str,
    stages: Sequence[Stage],
    run: Callable[[Context], Context],
    *,
    arguments: Sequence[Argument] = (),
    bound: tuple[str, ...] = (),
    certain: bool = True,
    apart: bool = False,
    settings: Mapping[str, Any] | None = None,
    shown: Sequence[Any] | None = None,
    again: Callable[..., Stage],
) -> Stage:
    """A stage made of stages.

    Args:
        kind: the combinator's name.
        stages: what it is made of.
        run: what it does.
        arguments: what it asks of the context before its stages run.
        bound: names that it gives to its stages itself.
        certain: whether its stages certainly run.
        apart: each stage finds only what was there before all of them.
        settings: what it was given beside stages.
        shown: the arguments of its expression, if not just the stages.
        again: makes the same of other stages.
    """
    have, needs, optional = set(bound), [], []
    for argument in arguments:
        needs += argument.needs
        optional += argument.optional
    for part in stages:
        needs += [name for name in (*part.needs, *_undo_needs(part)) if name not in have]
        optional += [name for name in part.optional if name not in have]
        if not apart:
            have.update(part.gives)
    gives = [*bound, *(name for part in stages for name in part.gives)] if certain else []
    return Stage(
        name=kind,
        kind=kind,
        needs=tuple(dict.fromkeys(needs)),
        optional=tuple(dict.fromkeys(name for name in optional if name not in needs)),
        gives=tuple(dict.fromkeys(gives)),
        run=run,
        host=any(part.host for part in stages),
        parts=tuple(stages),
        settings=settings or {},
        again=again,
        expression=f"{kind}({', '.join(map(str, stages if shown is None else shown))})",
    )


def host_only(combinator: str, stage: Stage) -> None:
    """Refuse a stage of which a part runs on the device."""
    for leaf in leaves(only_stages(combinator, (stage,))):
        if not leaf.host:
            raise ValueError(
                f"{combinator} is for host stages, but {leaf.name!r} runs on the device. If it "
                "touches the world outside JAX, declare it so: @stage(..., host=True)."
            )


def only_stages(combinator: str, stages: Sequence[Any]) -> Sequence[Stage]:
    """The same stages, if that is what they are."""
    for part in stages:
        if not isinstance(part, Stage):
            raise TypeError(
                f"{combinator} takes stages, not {part!r}. Decorate a function with "
                "@kitchen.stage('what_it_gives')."
            )
    return stages
