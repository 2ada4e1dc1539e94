"""Where numbers go: a stream that never makes the device wait, stores, and sinks to watch.

A training loop pushes each step's metrics into a `Stream`. A reader thread brings them to the host
one record late and hands them to handlers: `JsonlStore` keeps them, `ConsoleSink` and
`TensorBoardSink` show them. `read_metrics` and `history` read a kept run back.

What else happens in a run is told in events: `emit` and `span` where the work is done, `attach` to
listen, `JsonlEvents` to keep them; `EVENTS` lists all there are.
"""

from crucible.telemetry.events import (
    EVENTS,
    Event,
    attach,
    attached,
    detach,
    emit,
    span,
    wanted,
)
from crucible.telemetry.reader import Handler, Record
from crucible.telemetry.sinks import ConsoleSink, TensorBoardSink
from crucible.telemetry.stores import (
    Entry,
    History,
    JsonlEvents,
    JsonlStore,
    history,
    read_metrics,
)
from crucible.telemetry.stream import Stream

__all__ = [
    "EVENTS",
    "ConsoleSink",
    "Entry",
    "Event",
    "Handler",
    "History",
    "JsonlEvents",
    "JsonlStore",
    "Record",
    "Stream",
    "TensorBoardSink",
    "attach",
    "attached",
    "detach",
    "emit",
    "history",
    "read_metrics",
    "span",
    "wanted",
]
