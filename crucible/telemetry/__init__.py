"""Where numbers go: a stream that never makes the device wait, stores, and sinks to watch.

A training loop pushes each step's metrics into a `Stream`. A reader thread brings them to the host
one record late and hands them to handlers: `JsonlStore` keeps them, `ConsoleSink` and
`TensorBoardSink` show them. `read_metrics` and `history` read a kept run back.
"""

from crucible.telemetry.sinks import ConsoleSink, TensorBoardSink
from crucible.telemetry.stores import Entry, History, JsonlStore, history, read_metrics
from crucible.telemetry.stream import Handler, Record, Stream

__all__ = [
    "ConsoleSink",
    "Entry",
    "Handler",
    "History",
    "JsonlStore",
    "Record",
    "Stream",
    "TensorBoardSink",
    "history",
    "read_metrics",
]
