"""Combinators that run stages beside each other, in threads.

A thread cannot be stopped from outside. So a loop that ends asks its producer to stop and waits
until it has finished what it is at; only what is still busy after half a minute is left behind,
with a warning, as a daemon thread that does not keep the program alive.
"""

from __future__ import annotations

import contextvars
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import GeneratorType
from typing import Any, NamedTuple

from crucible.kitchen import ledger
from crucible.kitchen.context import Context
from crucible.kitchen.producer import Producer
from crucible.kitchen.scope import Journal, adopt, fresh_journal, in_order, reached, series, undo
from crucible.kitchen.stage import Stage
from crucible.kitchen.wiring import Argument, combine, may_give, only_stages, options
from crucible.kitchen.workflow import turn

__all__ = ["Outcome", "add_metrics", "async_loop", "branch_of", "merged", "parallel", "stream"]


def parallel(*stages: Stage, max_concurrency: int | Callable[..., int] | None = None) -> Stage:
    """Run stages at the same time, each from the same context.

    What they give is put together; trees called `metrics` add. If one fails, those that have not
    begun do not begin, those that run are waited for, and the first error, in the order of the
    stages, goes on.

    Args:
        *stages: the branches. What waits for the world (files, services) runs truly at once.
        max_concurrency: how many run at a time, or a function of the context; by default all.

    Raises:
        ValueError: two branches give the same name, or `max_concurrency` is below 1.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> left = stage("a", host=True)(lambda x: x + 1)
        >>> right = stage("b", host=True)(lambda x: x * 2)
        >>> both = parallel(left, right)(Context(x=5))
        >>> both["a"], both["b"]
        (6, 10)
    """
    if not callable(max_concurrency) and max_concurrency is not None and max_concurrency < 1:
        raise ValueError(f"parallel(max_concurrency={max_concurrency}): at least 1.")
    givers: dict[str, Stage] = {}
    for branch in only_stages("parallel", stages):
        for name in sorted(may_give(branch) - {"metrics"}):
            if name in givers:
                raise ValueError(
                    f"parallel: {givers[name]} and {branch} both give {name!r}, so one would be "
                    "lost. Rename one (a loop's number: with index=)."
                )
            givers[name] = branch
    limit = Argument(max_concurrency)

    def run(context: Context) -> Context:
        workers = limit(context)
        workers = (len(stages) or 1) if workers is None else workers
        if workers < 1:
            raise ValueError(f"parallel: max_concurrency={workers} must be at least 1.")
        failed = threading.Event()

        def branch(part: Stage) -> Outcome | None:
            if failed.is_set():
                return None
            outcome = branch_of(part, context)
            if outcome.error is not None:
                failed.set()
            return outcome

        futures, errors = [], []
        with ThreadPoolExecutor(workers, thread_name_prefix="parallel") as pool:
            try:
                for part in stages:
                    futures.append(pool.submit(contextvars.copy_context().run, branch, part))
                with ledger.waiting():
                    wait(futures)
            except BaseException as interrupt:
                failed.set()
                errors = [interrupt]
        outcomes = [outcome for future in futures if (outcome := future.result()) is not None]
        errors += [outcome.error for outcome in outcomes if outcome.error is not None]
        if errors:
            undo(in_order(outcome.journal for outcome in outcomes), 0, errors[0])
            raise errors[0]
        adopt(outcome.journal for outcome in outcomes)
        return merged(context, stages, [outcome.context for outcome in outcomes])

    shown = [*stages, *([f"max_concurrency={limit}"] if max_concurrency is not None else [])]
    return combine(
        "parallel",
        stages,
        run,
        arguments=[limit],
        apart=True,
        settings={"max_concurrency": limit},
        shown=shown,
        again=lambda *parts: parallel(*parts, max_concurrency=max_concurrency),
    )


class Outcome(NamedTuple):
    """How a branch in a thread of its own has ended."""

    context: Context
    journal: Journal
    error: BaseException | None


def branch_of(part: Stage, context: Context) -> Outcome:
    """Run a stage for a thread of its own, with a journal of its own."""
    journal, end = fresh_journal()
    try:
        return Outcome(series((part,))(context), journal, None)
    except BaseException as error:
        return Outcome(context, journal, error)
    finally:
        end()


def merged(context: Context, stages: Iterable[Stage], made: Iterable[Context]) -> Context:
    """The context that branches started from, with what they gave."""
    values: dict[str, Any] = {}
    alone: dict[str, Any] = {}  # in memory of its own, as it came out of a branch's program
    for part, after in zip(stages, made, strict=True):
        for name in sorted(may_give(part)):
            if name not in after:
                context = context.without(name)  # it never left the branch's program
            elif not after.same(name, context):
                new = after[name]
                if name in values or name in alone:
                    values[name] = add_metrics({**values, **alone}[name], new)
                    alone.pop(name, None)
                elif name in after.cells and after.cells[name].fresh:
                    alone[name] = new
                else:
                    values[name] = new
    return context.replace(**values).became(alone, (), ())


def add_metrics(left: Any, right: Any) -> Any:
    """Add metrics trees, of which each may have names that the other has not."""
    if isinstance(left, dict) and isinstance(right, dict):
        both = {name: add_metrics(left[name], right[name]) for name in left.keys() & right.keys()}
        return {**left, **right, **both}
    from crucible.metrics import merge

    return merge(left, right)


def stream(
    source: Iterable[Any] | Callable[..., Iterable[Any]],
    *stages: Stage,
    item: str = "item",
    index: str = "index",
    prefetch: int = 2,
) -> Stage:
    """Run stages for each item of something lazy, possibly endless, made ahead in a thread.

    Args:
        source: an iterable, or a function of the context that returns one. What it raises is
            raised where its next item would have come. A generator is closed in the end.
        *stages: the body.
        item: the name under which the body finds the item.
        index: the name of its number.
        prefetch: how many items may lie ready, or be in the making.

    Raises:
        TypeError: the source is an iterator, which could be gone through only once, or nothing that
            one can go through.
        ValueError: `prefetch` is below 1.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> add = stage("total", host=True)(lambda total, item: total + item)
        >>> stream(lambda n: (i * i for i in range(n)), add)(Context(n=4, total=0))["total"]
        14
    """
    if isinstance(source, Iterator):
        raise TypeError(
            f"stream: a {type(source).__name__} can be gone through only once. Give a function "
            "that makes it: stream(lambda: ..., ...)."
        )
    argument = Argument(source)
    if not callable(source) and not isinstance(source, Iterable):
        raise TypeError(
            f"stream: one cannot go through {source!r}. Give a collection or a function."
        )
    if prefetch < 1:
        raise ValueError(f"stream(prefetch={prefetch}): at least 1.")
    body = series(only_stages("stream", stages), commit=True)

    def run(context: Context) -> Context:
        number, source = 0, argument(context)
        iterator = iter(source)
        close = iterator.close if isinstance(iterator, GeneratorType) else None
        where = f"In the source of stream({argument}, ...)."
        try:
            with Producer(lambda: next(iterator), prefetch, f"stream {argument}", close) as items:
                while (given := items.take(context, where, index, number)) is not None:
                    entry = context.replace(**{index: number, item: given[0]})
                    context = turn(body, entry, index, number, None)
                    number += 1
        except BaseException as error:
            reached(error, context)
            raise
        return context

    return combine(
        "stream",
        stages,
        run,
        arguments=[argument],
        bound=(index, item),
        certain=False,
        settings={"source": argument, "index": index, "item": item, "prefetch": prefetch},
        shown=[
            argument,
            *stages,
            *options(
                {"item": item, "index": index, "prefetch": prefetch},
                {"item": "item", "index": "index", "prefetch": 2},
            ),
        ],
        again=lambda *parts: stream(source, *parts, item=item, index=index, prefetch=prefetch),
    )


def async_loop(
    producer: Stage,
    *stages: Stage,
    stop_when: Callable[..., Any],
    buffer_size: int = 4,
    index: str = "step",
    version: str = "version",
    start: int | Callable[..., int] = 0,
) -> Stage:
    """Let a producer work in a thread while the stages consume what it gives: off-policy training.

    The producer runs again and again. Each time it sees the context that the loop began with, but
    with the *latest published* values of whatever it needs and the stages give (the weights), and
    with `version`, the number of the turn before which these were published. The stages find what
    it gave, and the `version` that it saw: `step - version` is how stale it is, at most
    `buffer_size`. After each turn the stages' values are published. A producer that raises
    StopIteration has no more to give: the loop ends when the buffer is empty.

    Args:
        producer: gives the items. It also finds `index`, the number of the turn that its item is
            for.
        *stages: the consumer, run for each item.
        stop_when: asked before each turn, of the context; true ends the loop.
        buffer_size: items that may lie ready or be in the making; the producer waits while there
            are so many.
        index: the name of the turn's number.
        version: the name of the version.
        start: the first number.

    Raises:
        ValueError: `buffer_size` is below 1, or the producer gives nothing.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> sample = stage("sample", host=True)(lambda weight, version: (weight, version))
        >>> learn = stage("weight", host=True)(lambda weight, sample: weight + 1)
        >>> loop = async_loop(sample, learn, stop_when=lambda step: step >= 3, buffer_size=1)
        >>> loop(Context(weight=0))["weight"]
        3
    """
    only_stages("async_loop", (producer, *stages))
    if buffer_size < 1:
        raise ValueError(f"async_loop(buffer_size={buffer_size}): at least 1.")
    if not producer.gives:
        raise ValueError(f"async_loop: the producer {producer} gives nothing to consume.")
    body, make = series(stages, commit=True), series((producer,), commit=True)
    stop, first = Argument(stop_when), Argument(start)
    consumer_gives = set().union(*(may_give(part) for part in stages))
    publishes = tuple(name for name in producer.reads if name in consumer_gives)

    def ends(context: Context, number: int) -> Any:
        try:
            return stop(context.replace(**{index: number}))
        except Exception as error:
            error.add_note(f"At {index} {number}.")
            raise

    def run(context: Context) -> Context:
        number = made = operator.index(first(context))
        entry, latest = context, (number, {})  # what is published: one tuple, swapped whole

        def produce():
            nonlocal made
            seen, values = latest
            after = make(entry.replace(**values, **{version: seen, index: made}))
            made += 1
            return {**{name: after[name] for name in producer.gives}, version: seen}

        try:
            with Producer(produce, buffer_size, f"async_loop {producer}") as items:
                while not ends(context, number):
                    if (given := items.take(context, "", index, number)) is None:
                        break
                    values = {**given[0], index: number}
                    context = turn(body, context.replace(**values), index, number, None)
                    number += 1
                    latest = number, {n: context[n] for n in publishes if n in context}
        except BaseException as error:
            reached(error, context)
            raise
        return context

    bound = (index, version)
    settings = {
        "stop_when": stop,
        "start": first,
        "index": index,
        "version": version,
        "buffer_size": buffer_size,
        "publishes": publishes,
    }
    usual = {"buffer_size": 4, "index": "step", "version": "version", "start": 0}
    return combine(
        "async_loop",
        (producer, *stages),
        run,
        arguments=[stop.but(index), first],
        bound=bound,
        certain=False,
        settings=settings,
        shown=[producer, *stages, f"stop_when={stop}", *options(settings, usual)],
        again=lambda *parts: async_loop(
            *parts,
            stop_when=stop_when,
            buffer_size=buffer_size,
            index=index,
            version=version,
            start=start,
        ),
    )
