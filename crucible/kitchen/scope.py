"""Scopes: a series of stages of which the completed ones are rolled back when a later one fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

from crucible import train
from crucible.kitchen.context import Context

__all__ = [
    "adopt",
    "completed",
    "failed_at",
    "fresh_journal",
    "in_order",
    "reached",
    "rolls_back",
    "series",
    "undo",
]

Journal = list[tuple[int, Any, Context]]  # of stages that can be rolled back: when, and after what
_journal: ContextVar[Journal | None] = ContextVar("journal", default=None)
_clock = itertools.count()


def series(stages: Sequence[Any], *, commit: bool = False) -> Callable[[Context], Context]:
    """A function that runs stages one after the other, as a scope.

    Args:
        stages: the stages.
        commit: completed as a whole it stays, whatever fails later: a turn of a loop.
    """
    stages = tuple(stages)

    def plain(context: Context) -> Context:
        part = None
        try:
            for part in stages:
                context = part.run(context)
        except BaseException as error:
            if part is not None:
                reached(error, context, surely=part.fn is not None)
            raise
        return context

    def scope(context: Context) -> Context:
        journal, token = _journal.get(), None
        if journal is None:
            journal = []
            token = _journal.set(journal)
        mark = len(journal)
        try:
            context = plain(context)
        except BaseException as error:
            undo(journal, mark, error)
            raise
        finally:
            if token is not None:
                _journal.reset(token)
        if commit:
            del journal[mark:]
        return context

    return scope if any(rolls_back(part) for part in stages) else plain


def rolls_back(stage: Any) -> bool:
    """Whether a stage, or one inside it, can be rolled back."""
    return stage.rollback is not None or any(rolls_back(part) for part in stage.parts)


def completed(stage: Any, context: Context) -> None:
    """Remember a completed stage, if it is in a scope."""
    journal = _journal.get()
    if journal is not None:
        journal.append((next(_clock), stage, context))


def fresh_journal() -> tuple[Journal, Callable[[], None]]:
    """A journal for a branch in a thread of its own, and how to end it."""
    journal: Journal = []
    token = _journal.set(journal)
    return journal, lambda: _journal.reset(token)


def in_order(journals: Iterable[Journal]) -> Journal:
    """Journals of branches as one, in the order in which their stages were completed."""
    return sorted(itertools.chain(*journals), key=lambda entry: entry[0])


def adopt(journals: Iterable[Journal]) -> None:
    """Remember what branches completed as completed in the scope around them, if there is one."""
    journal = _journal.get()
    if journal is not None:
        journal.extend(in_order(journals))


def undo(journal: Journal, mark: int, error: BaseException) -> None:
    """Roll back, last first, what the journal has from the mark on; trouble becomes a note."""
    if len(journal) == mark:
        return
    try:
        with train.hold_interrupts():
            while len(journal) > mark:
                _, stage, context = journal.pop()
                _roll_back(stage, context, error)
    except KeyboardInterrupt as interrupt:
        if hasattr(error, _CONTEXT):
            reached(interrupt, getattr(error, _CONTEXT))
        raise


def _roll_back(stage: Any, context: Context, error: BaseException) -> None:
    from crucible.kitchen.stage import parameters_of, take

    try:
        needs, optional = parameters_of(stage.rollback)
        context = context.replace(error=error)
        stage.rollback(**take(context, needs, optional, f"The rollback of {stage.name!r}"))
    except Exception as also:
        error.add_note(f"Rolling back stage {stage.name!r} failed too: {also!r}")


_CONTEXT = "_crucible_context"  # the attribute of an error that `failed_at` reads


def reached(error: BaseException, context: Context, *, surely: bool = False) -> None:
    """Remember on an error how far the run had come.

    Args:
        error: on its way out.
        context: the last one before it, as far as the caller knows.
        surely: nobody whom the error has passed knows better.
    """
    if surely or not hasattr(error, _CONTEXT):
        setattr(error, _CONTEXT, context)


def failed_at(error: BaseException, entry: Context) -> Context:
    """The context that an error found, the furthest that the run had come."""
    return getattr(error, _CONTEXT, entry)
