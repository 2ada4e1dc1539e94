"""The ledger of a run: what every stage cost, and what was compiled, when and why.

A run makes its ledger the current one; stages and programs write into it. Without one, nothing is
measured. Threads that a combinator starts write into the ledger of the run that started them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax

from crucible import telemetry

__all__ = [
    "Compilation",
    "Cost",
    "Ledger",
    "compiling",
    "current",
    "timed",
    "unbooked",
    "waited",
    "waiting",
]


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One XLA compilation.

    Attributes:
        stage: the stage or program in which it happened.
        function: the name of the function compiled.
        seconds: what tracing, lowering and compiling took.
        changed: for a program that was compiled before, what made it do so again: the leaves that
            changed, as `slot.path was float32[4], is float32[5]`.
    """

    stage: str
    function: str
    seconds: float
    changed: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Cost:
    """What a stage has cost the host.

    Attributes:
        calls: how often it ran; a chunk of K steps is one call.
        seconds: host time within it, all included.
        waited: of these, seconds that it waited for data, the device or telemetry.
        compiling: of these, seconds of tracing and compiling.
        tokens: tokens in the batches it was given, padding counted.
    """

    calls: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    compiling: float = 0.0
    tokens: int = 0


class Ledger:
    """Costs by stage, and compilations, of one run.

    Example:
        >>> from crucible.kitchen import Context, stage
        >>> with Ledger().recording() as ledger:
        ...     _ = stage("y")(lambda x: x + 1)(Context(x=1))
        >>> ledger.costs["<lambda>"].calls
        1
    """

    def __init__(self, run_id: str = ""):
        self.run_id = run_id
        self.costs: dict[str, Cost] = {}
        self.compiles: list[Compilation] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def recording(self) -> Iterator[Ledger]:
        """Make it the current ledger."""
        token = _current.set(self)
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(self._heard)
            _current.reset(token)

    def time(
        self, name: str, fn: Callable[..., Any], values: tuple | Mapping[str, Any], batch: Any
    ) -> Any:
        """Call a stage's function, and book it."""
        call, outer = _Call(self, name), getattr(_active, "call", None)
        _active.call = call
        began = time.perf_counter()
        try:
            if telemetry.wanted("stage.run"):
                about = {
                    "stage": name,
                    "module": getattr(fn, "__module__", ""),
                    "run_id": self.run_id,
                }
                with telemetry.span("stage.run", about):
                    return _call(fn, values)
            return _call(fn, values)
        finally:
            seconds = time.perf_counter() - began
            _active.call = outer
            tokens = _tokens(batch)
            with self._lock:
                cost = self.costs.get(name)
                if cost is None:
                    cost = self.costs[name] = Cost()
                cost.calls += 1
                cost.seconds += seconds
                cost.waited += call.waited
                cost.compiling += call.compiling
                cost.tokens += tokens

    def _heard(self, event: str, duration_secs: float, **about: Any) -> None:
        call: _Call | None = getattr(_active, "call", None)
        if call is None or call.ledger is not self:
            return
        function = str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event == _TRACED:  # of a function within another it is part of that one's
            call.traced = {**call.traced, function: duration_secs}
        elif event == _LOWERED:
            call.lowered = duration_secs
        elif event == _COMPILED:
            total = duration_secs + call.lowered + call.traced.get(function, 0.0)
            call.traced, call.lowered = _NOTHING, 0.0
            call.compiling += total
            changed = call.changed.get(function, ())
            call.changed = {k: v for k, v in call.changed.items() if k != function}
            compilation = Compilation(
                stage=call.name, function=function, seconds=total, changed=changed
            )
            with self._lock:
                self.compiles.append(compilation)

    def table(self) -> list[dict[str, Any]]:
        """A row a stage, the most expensive first."""
        rows = [{"stage": name, **vars(cost)} for name, cost in self.costs.items()]
        return sorted(rows, key=lambda row: -row["seconds"])


_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"

_current: ContextVar[Ledger | None] = ContextVar("ledger", default=None)
_active = threading.local()  # .call: what this thread is doing


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class _Call:
    """A stage at work."""

    __slots__ = ("changed", "compiling", "idle", "ledger", "lowered", "name", "traced", "waited")

    def __init__(self, ledger: Ledger, name: str):
        self.ledger, self.name = ledger, name
        self.waited = self.compiling = self.lowered = 0.0
        self.idle = False  # within `waiting`
        self.traced = self.changed = _NOTHING  # of their own once there is something to keep


def timed(
    name: str, fn: Callable[..., Any], values: tuple | Mapping[str, Any], batch: Any = None
) -> Any:
    """Call a stage's function; the current ledger, if there is one, books it.

    Args:
        name: the stage's.
        fn: its function.
        values: what to call it with, by position or by name.
        batch: of what it is given the batch, whose tokens are counted.
    """
    ledger = _current.get()
    return _call(fn, values) if ledger is None else ledger.time(name, fn, values, batch)


def _call(fn: Callable[..., Any], values: tuple | Mapping[str, Any]) -> Any:
    return fn(*values) if isinstance(values, tuple) else fn(**values)


def current() -> Ledger | None:
    """The ledger of the run that this thread works for."""
    return _current.get()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Book the block's time as waiting, once, within the stage that is at work."""
    call: _Call | None = getattr(_active, "call", None)
    if call is None or call.idle:
        yield
        return
    began, call.idle = time.perf_counter(), True
    try:
        yield
    finally:
        call.idle = False
        waited(time.perf_counter() - began)


def waited(seconds: float) -> None:
    """Book seconds as waiting, within the stage that is at work, unless `waiting` books them."""
    call: _Call | None = getattr(_active, "call", None)
    if call is not None and not call.idle:
        call.waited += seconds


@contextlib.contextmanager
def unbooked() -> Iterator[None]:
    """Book nothing of what the block's stages do, as it is not part of the run."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def compiling(function: str, changed: tuple[str, ...]) -> Iterator[None]:
    """Trace a program: say why, and book nothing of what its stages do meanwhile."""
    call = getattr(_active, "call", None)
    if call is not None and changed:
        call.changed = {**call.changed, function: changed}
    with unbooked():
        yield


def _tokens(batch: Any) -> int:
    if batch is None:
        return 0
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    size = getattr(tokens, "size", 0)
    return size if isinstance(size, int) else 0
