"""From the training loop to the handlers: pushed at once, read one record late.

A push costs the loop a few microseconds and never waits for the device. A reader thread fetches
record n once record n+1 has been pushed, when the device is busy with the next step anyway.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import jax

from crucible.telemetry.reader import (
    Handler,
    Metric,
    Pushed,
    Reader,
    Record,
    close_forgotten,
    make_plan,
)

__all__ = ["Handler", "Record", "Stream"]


AHEAD = 16  # times max_pending, for steps of less than a millisecond


class Stream:
    """Carries a run's metrics to its handlers without ever making the device wait.

    Use it from one thread, as a context manager or with `close`. A stream that is forgotten closes
    itself when it is collected or the program ends; what `os._exit` or a kill cuts off is lost,
    which is the newest record and those still pending.

    Args:
        run_id: identifies the run in every record.
        handlers: called in this order with each record; the stream closes them.
        attempt: number of times this run was resumed.
        max_pending: pushes that may be outstanding before the next one waits, until at most half
            are; at least 2, as the newest one always is. It bounds how many steps, each with its
            batch, the loop runs ahead of the device; a few keep the device busy. Sixteen times as
            many while records come in less than a millisecond each: threads that take turns would
            cost more than such steps.

    Attributes:
        waited: seconds that pushes have spent waiting for the reader, so far.

    Raises:
        TypeError: a handler lacks `__call__`, `flush` or `close`.
        ValueError: `max_pending` is below 2.

    Example:
        >>> from crucible.metrics import Mean
        >>> class Printer:
        ...     def __call__(self, record):
        ...         print(record.step, record.values)
        ...     def flush(self): pass
        ...     def close(self): print("closed")
        >>> with Stream("demo", [Printer()]) as stream:
        ...     stream.push(1, {"loss": Mean(6.0, 3.0), "eval": {"loss": Mean(0.0, 0.0)}})
        ...     stream.push(2, {"loss": Mean(5.0, 4.0), "eval": {"loss": Mean(9.0, 6.0)}})
        1 {'loss': 2.0}
        2 {'eval/loss': 1.5, 'loss': 1.25}
        closed
    """

    def __init__(
        self,
        run_id: str,
        handlers: Sequence[Handler],
        *,
        attempt: int = 0,
        max_pending: int = 4,
    ) -> None:
        if max_pending < 2:
            raise ValueError(
                f"max_pending={max_pending} leaves no room: a record is read only once the next "
                "one has been pushed. Choose 2 or more."
            )
        for handler in handlers:
            lacks = [n for n in ("__call__", "flush", "close") if not hasattr(handler, n)]
            if lacks:
                raise TypeError(f"handler {handler!r} lacks {', '.join(lacks)}; see Handler.")
        self.waited = 0.0
        self._closed = False
        self._max_pending = max_pending
        self._pushed = 0  # an interrupt may leave it one short, which only widens the bound
        self._plans: dict[Any, tuple[Metric, ...]] = {}
        self._reader = Reader(run_id, list(handlers), attempt)
        self._forgotten = weakref.finalize(self, close_forgotten, self._reader)

    def push(self, step: Any, metrics: Any) -> None:
        """Send one step's metrics on their way; returns before their values are known.

        Waits only once `max_pending` pushes are outstanding.

        Args:
            step: optimizer steps taken before it, an int or a device scalar.
            metrics: nested dicts of `Mean`s and scalar sums, on the device or not; nested names
                are joined with "/". No later step may donate these arrays.

        Raises:
            RuntimeError: the stream is closed.
            ValueError: two metrics have one name, or a metric has none.
            Exception: an earlier record could not be read, or a required handler failed. This
                record is on its way all the same.
        """
        if self._closed:
            raise self._is_closed(f"step {step}")
        leaves, treedef = jax.tree.flatten(metrics)
        self._send(Pushed(step, self._plan(treedef), leaves))
        self._report()

    def push_many(self, steps: range, metrics: Any) -> None:
        """Send the metrics of several steps that one dispatch computed; else as `push`.

        The chunk counts as one against `max_pending` and is fetched at once; handlers get one
        record a step, in order. All its values are ready at one moment, so the records' times are
        spread evenly from the record before to that moment: step `j` of `K` comes at `j / K` of
        the way. A stream that begins with a chunk knows no time before, and gives all that one.

        Args:
            steps: optimizer steps taken before each; an empty range sends nothing.
            metrics: as in `push`, but every array is `[K]` with `K >= len(steps)`, one entry a
                step; what lies past `len(steps)` is ignored.

        Raises:
            RuntimeError: the stream is closed.
            TypeError: `steps` is not a range.
            ValueError: an array is not `[K]`, or has fewer entries than there are steps; or two
                metrics have one name, or a metric has none.
            Exception: as in `push`.

        Example:
            >>> class Printer:
            ...     def __call__(self, record):
            ...         print(record.step, record.values)
            ...     def flush(self): pass
            ...     def close(self): pass
            >>> import numpy as np
            >>> from crucible.metrics import Mean
            >>> losses = Mean(np.array([6.0, 4.0, 0.0]), np.array([2.0, 2.0, 0.0]))
            >>> with Stream("demo", [Printer()]) as stream:
            ...     stream.push_many(range(8, 10), {"loss": losses})  # the last of 3 was not run
            8 {'loss': 3.0}
            9 {'loss': 2.0}
        """
        if self._closed:
            raise self._is_closed(f"steps {steps}")
        if not isinstance(steps, range):
            raise TypeError(
                f"push_many got steps={steps!r}: it takes a range of optimizer steps, such as "
                "range(8, 16). Send a single step with push."
            )
        leaves, treedef = jax.tree.flatten(metrics)
        plan = self._plan(treedef)
        if not steps:
            return
        for name, *places in plan:
            for place in places:
                if place is not None:
                    _check_chunk(name, getattr(leaves[place], "shape", ()), steps)
        self._send(Pushed(steps, plan, leaves))
        self._report()

    def _plan(self, treedef: Any) -> tuple[Metric, ...]:
        plan = self._plans.get(treedef)
        if plan is None:
            plan = self._plans[treedef] = make_plan(treedef)
        return plan

    def _send(self, pushed: Pushed) -> None:
        """Hand it to the reader, after waiting for room where there is none."""
        reader = self._reader
        limit = self._max_pending * (AHEAD if reader.quick else 1)
        if reader.handled <= self._pushed - limit:
            began = time.perf_counter()
            try:  # half, as each wait costs two switches between threads, which few can share
                reader.wait_for(self._pushed - limit // 2)
            finally:
                self.waited += time.perf_counter() - began
        reader.inbox.put(pushed)
        self._pushed += 1

    def _is_closed(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{what} was pushed to the closed stream of run {self._reader.run_id!r}. "
            "Push inside its `with` block, or open a new Stream."
        )

    def flush(self) -> None:
        """Wait until every handler has taken and flushed all that was pushed so far.

        Raises:
            Exception: a record could not be read, or a required handler failed.
        """
        self._reader.ask(end=False)
        self._report()

    def close(self) -> None:
        """Flush, close the handlers and end the reader thread. Harmless when repeated.

        After an interrupt (Ctrl-C) it can be called again, and goes on where it was.

        Raises:
            Exception: a record could not be read, or a required handler failed.
        """
        self._closed = True
        self._reader.ask(end=True)
        self._reader.thread.join()
        self._forgotten.detach()
        self._report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as also:
            if error is None:
                raise
            error.add_note(f"Telemetry of run {self._reader.run_id!r} failed too: {also!r}")

    def _report(self) -> None:
        """Say on the caller's thread what went wrong on the reader's."""
        failures, complaints = self._reader.failures, self._reader.complaints
        if not failures and not complaints:
            return
        failed = [failures.popleft() for _ in range(len(failures))]
        try:
            while complaints:
                warnings.warn(complaints.popleft(), RuntimeWarning, stacklevel=3)
        finally:  # where warnings are errors, neither hides the other
            if failed:
                if len(failed) > 1:
                    failed[0].add_note(f"So did {len(failed) - 1} more since the last push.")
                raise failed[0]


def _check_chunk(name: str, shape: tuple[int, ...], steps: range) -> None:
    """Refuse an array without one scalar for each step."""
    if len(shape) != 1:
        raise ValueError(
            f"metric {name!r} has shape {shape}; push_many takes `[K]` arrays, one scalar for each "
            f"of the {len(steps)} steps. Stack the steps along the first axis, as lax.scan does, "
            "and sum over the others."
        )
    if shape[0] < len(steps):
        raise ValueError(
            f"metric {name!r} has {shape[0]} entries for the {len(steps)} steps {steps}. Push a "
            f"range of {shape[0]}, or an array with an entry for each step."
        )
