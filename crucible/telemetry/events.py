"""Named events: what happens in a run besides its metrics, told to whoever listens.

The code that does the work calls `emit`, or wraps it in a `span`; who wants to know calls `attach`.
An event reaches its handlers on the thread that emits it, before `emit` returns. Where nobody
listens, emitting costs a dictionary look-up.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

__all__ = [
    "EVENTS",
    "Event",
    "attach",
    "attached",
    "detach",
    "emit",
    "span",
    "wanted",
]

_SPANS = {
    "stage.run": "one run of a stage",
    "training.checkpoint": "one checkpoint saved",
    "training.epoch": "one pass over the data",
    "training.eval": "one evaluation",
    "training.step": "one call of the step function, on the host's clock",
    "workflow.run": "a whole workflow, from its first stage to its last",
}
_SINGLE = {
    "eval.complete": "an evaluation's result: loss (nats), perplexity; metadata step",
    "stage.retry": "a stage failed and is tried again: attempt; metadata stage, error",
    "training.metrics": "a step's numbers: loss, learning_rate, grad_norm; metadata step, "
    "total_steps",
}

EVENTS: Mapping[str, str] = MappingProxyType(dict(sorted((_SPANS | _SINGLE).items())))
"""Every event there is, by base name. A span's are NAME.start, NAME.stop and NAME.exception."""

_ENDINGS = {name: (f"{name}.start", f"{name}.stop", f"{name}.exception") for name in _SPANS}
_ALL = frozenset(_SINGLE) | {full for names in _ENDINGS.values() for full in names}
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        name: its full name, such as "stage.run.stop".
        measurements: numbers by name; a `duration` is in seconds.
        metadata: what else is known, such as `{"stage": "train_step"}`.
        timestamp: when it was emitted, in seconds since 1970 (UTC).
    """

    name: str
    measurements: Mapping[str, Any]
    metadata: Mapping[str, Any]
    timestamp: float


class _Subscription(NamedTuple):
    handler_id: str
    names: frozenset[str]
    handler: Callable[[Event], Any]
    where: Callable[[Event], Any] | None


# Changed under the lock by putting new objects in place of the old; read without it.
_lock = threading.RLock()
_subscriptions: tuple[_Subscription, ...] = ()
_routes: Mapping[str, tuple[_Subscription, ...]] = dict.fromkeys(_ALL, ())
_dropped: set[str] = set()  # ids whose handler raised


def emit(
    name: str,
    measurements: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Tell those who listen that something happened.

    A handler that raises is detached and reported in a `RuntimeWarning`; the run goes on.

    Args:
        name: a full name: a single event of `EVENTS`, or a span's with its ending.
        measurements: numbers by name.
        metadata: what else is known.

    Raises:
        ValueError: there is no such event.

    Example:
        >>> emit("eval.complete", {"loss": 2.0})  # nobody listens
        >>> with attached("demo", "eval.complete", lambda event: print(event.measurements)):
        ...     emit("eval.complete", {"loss": 2.0}, {"step": 100})
        {'loss': 2.0}
    """
    try:
        listeners = _routes[name]
    except KeyError:
        raise ValueError(_no_such_event(name)) from None
    if listeners:  # they get copies, as the caller may go on to change what it gave
        event = Event(name, dict(measurements or ()), dict(metadata or ()), time.time())
        _deliver(listeners, event)


def span(name: str, metadata: Mapping[str, Any] | None = None) -> _Span:
    """Emit when a block of work starts, and when it stops or fails.

    NAME.start measures `system_time`, in seconds since 1970; NAME.stop measures `duration`, in
    seconds of the monotonic clock. A block that raises anything, an interrupt too, ends with
    NAME.exception instead, whose metadata adds `error_type` and `error_message`; the error goes on.

    Args:
        name: a span of `EVENTS`, by its base name.
        metadata: what is known at the start. The block gets a copy and may add to it.

    Raises:
        ValueError: there is no such span.

    Example:
        >>> with attached("demo", "training.checkpoint.stop", lambda event: print(event.metadata)):
        ...     with span("training.checkpoint", {"step": 100}) as more:
        ...         more["path"] = "runs/demo/100"
        {'step': 100, 'path': 'runs/demo/100'}
    """
    if name not in _SPANS:
        raise ValueError(_no_such_span(name))
    return _Span(_ENDINGS[name], dict(metadata or ()))


def wanted(name: str) -> bool:
    """Whether anybody listens, so that what is costly to measure can be left out.

    Args:
        name: a full name, or a base name for any event of a span. `where` is not looked at.

    Raises:
        ValueError: there is no such event.
    """
    routes = _routes
    listeners = routes.get(name)
    if listeners is not None:
        return listeners != ()
    if name not in _SPANS:
        raise ValueError(_no_such_event(name))
    start, stop, exception = _ENDINGS[name]
    return bool(routes[start] or routes[stop] or routes[exception])


def attach(
    handler_id: str,
    events: str | Iterable[str],
    handler: Callable[[Event], Any],
    *,
    where: Mapping[str, Any] | Callable[[Event], Any] | None = None,
) -> None:
    """Have a handler called with each event of some names, in the order of attaching.

    It is called on whichever thread emits, also on several at once. If it raises, it is detached
    and reported once, in a `RuntimeWarning` with its traceback, and the run goes on. A handler
    may attach and detach others, which counts from the next event on.

    Args:
        handler_id: what `detach` will call it by.
        events: full names, base names ("stage.run" is all three of its events) or "*".
        handler: any callable of an `Event`.
        where: metadata the event must have, such as `{"run_id": "x"}`, or a predicate of the
            event; None takes every event.

    Raises:
        TypeError: the handler, or `where`, is not what it has to be.
        ValueError: the id is taken, there is no such event, or no event is named.
    """
    _subscribe(handler_id, events, handler, where)


@contextlib.contextmanager
def attached(
    handler_id: str,
    events: str | Iterable[str],
    handler: Callable[[Event], Any],
    *,
    where: Mapping[str, Any] | Callable[[Event], Any] | None = None,
) -> Iterator[Any]:
    """`attach` for the length of a block, which gets the handler; else as there."""
    subscription = _subscribe(handler_id, events, handler, where)
    try:
        yield handler
    finally:
        _remove(subscription)


def detach(handler_id: str) -> None:
    """Let a handler hear no more; another thread may be telling it a last event at this moment.

    One that was detached because it raised has been reported, and is let go without a word.

    Raises:
        ValueError: nothing is attached by that id.
    """
    with _lock:
        for subscription in _subscriptions:
            if subscription.handler_id == handler_id:
                _remove(subscription)
                return
        if handler_id in _dropped:
            _dropped.remove(handler_id)
            return
        ids = [subscription.handler_id for subscription in _subscriptions]
    raise ValueError(f"no handler {handler_id!r} is attached.{_did_you_mean(handler_id, ids)}")


class _Span:
    """What `span` returns, for one `with`."""

    __slots__ = ("_began", "_metadata", "_names")

    def __init__(self, names: tuple[str, str, str], metadata: dict[str, Any]) -> None:
        self._names, self._metadata = names, metadata
        self._began = 0.0

    def __enter__(self) -> dict[str, Any]:
        self._began = time.monotonic()
        try:
            emit(self._names[0], {"system_time": time.time()}, self._metadata)
        except BaseException as error:  # an interrupt, or a warning where they are errors
            self.__exit__(type(error), error, None)
            raise
        return self._metadata

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        measured = {"duration": time.monotonic() - self._began}
        _, stop, exception = self._names
        if error is None:
            emit(stop, measured, self._metadata)
        elif _routes[exception]:
            told = {"error_type": type(error).__name__, "error_message": _message(error)}
            try:
                emit(exception, measured, {**self._metadata, **told})
            except Exception as also:  # a warning where they are errors must not hide the error
                error.add_note(f"Telling it to {exception!r} failed too: {also}")


def _subscribe(handler_id: str, events: Any, handler: Any, where: Any) -> _Subscription:
    if not callable(handler):
        raise TypeError(f"handler {handler!r} is not callable; it takes an Event.")
    if isinstance(where, Mapping):
        where = _has(where)
    elif where is not None and not callable(where):
        raise TypeError(
            f"where={where!r} selects nothing: give metadata, such as {{'run_id': 'x'}}, or a "
            "function of the event."
        )
    names = [events] if isinstance(events, str) else list(events)
    if not names:
        raise ValueError(f"handler {handler_id!r} listens to nothing: name events, or '*' for all.")
    full: set[str] = set()
    for name in names:
        if name != "*" and name not in _SPANS and name not in _ALL:
            raise ValueError(_no_such_event(name))
        full.update(_ALL if name == "*" else _ENDINGS.get(name, (name,)))
    subscription = _Subscription(handler_id, frozenset(full), handler, where)
    with _lock:
        if any(other.handler_id == handler_id for other in _subscriptions):
            raise ValueError(
                f"a handler {handler_id!r} is attached already. Call detach({handler_id!r}) first, "
                "or choose another id."
            )
        _dropped.discard(handler_id)
        _set((*_subscriptions, subscription))
    return subscription


def _remove(subscription: _Subscription) -> bool:
    """Whether it was still attached; another of the same id stays."""
    with _lock:
        rest = tuple(other for other in _subscriptions if other is not subscription)
        was_attached = len(rest) < len(_subscriptions)
        _set(rest)
    return was_attached


def _set(subscriptions: tuple[_Subscription, ...]) -> None:
    global _routes, _subscriptions
    _subscriptions = subscriptions
    _routes = {name: tuple(s for s in subscriptions if name in s.names) for name in _ALL}


def _deliver(listeners: tuple[_Subscription, ...], event: Event) -> None:
    complaints = []
    for subscription in listeners:
        handler_id, _, handler, where = subscription
        try:
            if where is None or where(event):
                handler(event)
        except Exception as error:
            with _lock:
                first = _remove(subscription)  # of the threads in which it may have raised
                if first:
                    _dropped.add(handler_id)
            if first:
                complaints.append(
                    f"event handler {handler_id!r} failed at {event.name!r} and is detached; the "
                    f"run goes on.\n{''.join(traceback.format_exception(error))}"
                )
    if complaints:
        warnings.warn("\n".join(complaints), RuntimeWarning, stacklevel=3)


def _has(required: Mapping[str, Any]) -> Callable[[Event], bool]:
    items = tuple(required.items())
    return lambda event: all(event.metadata.get(key, _ABSENT) == value for key, value in items)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as also:
        return f"<its str raised {type(also).__name__}>"


def _no_such_event(name: str) -> str:
    if name in _SPANS:
        return f"{name!r} is a span: wrap the work in span({name!r}), or emit {name + '.start'!r}."
    return f"there is no event {name!r}.{_did_you_mean(name, _ALL | set(_SPANS))}"


def _no_such_span(name: str) -> str:
    if name in _SINGLE:
        return f"{name!r} is a single event, not a span: emit({name!r}, ...)."
    base = str(name).rpartition(".")[0]
    if base in _SPANS and name in _ALL:
        return f"{name!r} is one event of a span: use span({base!r})."
    return f"there is no span {name!r}.{_did_you_mean(name, _SPANS)}"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), known := sorted(known), n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" There are: {', '.join(known)}." if known else ""
