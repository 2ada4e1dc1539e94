"""Combinators for what can go wrong: clean up whatever happens, try again, give up in time."""

from __future__ import annotations

import contextvars
import threading
import time

from crucible import telemetry, train
from crucible.kitchen import ledger
from crucible.kitchen.concurrency import Outcome, branch_of
from crucible.kitchen.context import Context
from crucible.kitchen.scope import adopt, failed_at, reached, series
from crucible.kitchen.stage import Stage, explain
from crucible.kitchen.wiring import combine, host_only, only_stages
from crucible.kitchen.workflow import run_id

__all__ = ["ensure", "retry", "timeout"]


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


def timeout(stage: Stage, seconds: float) -> Stage:
    """Give a host stage so many seconds, and raise TimeoutError if it takes longer.

    Python cannot stop a thread: what took too long is left to finish by itself, and what it gives
    is thrown away; it is not rolled back.

    Raises:
        ValueError: a stage in it runs on the device, or the time is not positive and finite.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> quick = stage("x", host=True)(lambda: 1)
        >>> timeout(quick, 10.0)(Context())["x"]
        1
    """
    host_only("timeout", stage)
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout({stage}, {seconds}): a time must be positive and finite.")

    def run(context: Context) -> Context:
        outcome: list[Outcome] = []
        scope = contextvars.copy_context()
        thread = threading.Thread(
            target=lambda: outcome.append(scope.run(branch_of, stage, context)),
            name=f"timeout {stage}",
            daemon=True,
        )
        thread.start()
        with ledger.waiting():
            thread.join(seconds)
        if not outcome:
            late = TimeoutError(f"Stage {stage.name!r} took longer than {seconds:g} s (timeout).")
            explain(late, context, f"In stage {stage.name!r}.")
            raise late
        after, journal, error = outcome[0]
        if error is not None:
            raise error
        adopt([journal])
        return after

    return combine(
        "timeout",
        (stage,),
        run,
        settings={"seconds": seconds},
        shown=[stage, f"{seconds:g}"],
        again=lambda part: timeout(part, seconds),
    )
