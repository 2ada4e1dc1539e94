"""The record of a run: files of JSON lines, for its numbers and for its events.

A metrics file has one number a line; `read_metrics` and `history` read it back. A line is
`{"run_id", "metric", "value", "step", "timestamp", "metadata"}`. NaN and the infinities are not
JSON: their value is null and their metadata says which one, in `"special"`.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from math import floor, isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crucible.telemetry.events import Event
from crucible.telemetry.reader import Record

__all__ = ["Entry", "History", "JsonlEvents", "JsonlStore", "history", "read_metrics"]


class Entry(NamedTuple):
    """One number of a run, as read back.

    Attributes:
        run_id: the run that measured it.
        metric: its name, such as "eval/loss".
        value: the number; NaN and the infinities are restored.
        step: optimizer steps taken, or None where it belongs to no step.
        timestamp: when the device had computed it, in seconds since 1970 (UTC).
        metadata: `{"attempt": n}`, and whatever else the writer noted.
    """

    run_id: str
    metric: str
    value: float
    step: int | None
    timestamp: float
    metadata: dict[str, Any]


class History(NamedTuple):
    """One metric over a run: `steps` `[N]` ascending, int64, and `values` `[N]`, float64."""

    steps: np.ndarray
    values: np.ndarray


class JsonlStore:
    """A handler that appends every number to a file of JSON lines.

    A record is one `write` to the operating system, so a killed program loses none that was
    handled; `flush` also makes it survive a loss of power. One writer at a time.

    Opening a file whose last line was torn by a kill moves that piece to `<name>.torn` and warns.

    Args:
        path: the file, made with its folder where missing, appended to where present.

    Raises:
        OSError: the file cannot be opened, repaired or written.
        ValueError: a record came after `close`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = JsonlStore(f"{folder}/metrics.jsonl")
        ...     store(Record("demo", 1, 0.0, {"loss": 2.5}, attempt=0))
        ...     store.close()
        ...     print(Path(folder, "metrics.jsonl").read_text())
        {"run_id": "demo", "metric": "loss", "value": 2.5, "step": 1,
         "timestamp": "1970-01-01T00:00:00.000000+00:00", "metadata": {"attempt": 0}}
    """

    required = True  # losing the record of a run is an error

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _set_torn_line_aside(self._path, _parse)
        self._fd: int | None = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._heads: dict[str, dict[str, str]] = {}  # how a line begins, by run and metric

    def __call__(self, record: Record) -> None:
        """Append one line for each number of the record."""
        tail = (
            f', "step": {record.step}, "timestamp": "{_iso_utc(record.timestamp)}", '
            f'"metadata": {{"attempt": {record.attempt}'
        )
        heads = self._heads.get(record.run_id)
        if heads is None:
            heads = self._heads[record.run_id] = {}
        lines = ""
        for name, value in record.values.items():
            head = heads.get(name)
            if head is None:
                head = heads[name] = _head(record.run_id, name)
            if isfinite(value):
                lines += f"{head}{float(value)!r}{tail}}}}}\n"
            else:
                lines += f'{head}null{tail}, "special": "{float(value)}"}}}}\n'
        self._append(lines.encode())

    def flush(self) -> None:
        """Make everything taken so far survive a loss of power."""
        if self._fd is not None:
            os.fsync(self._fd)

    def close(self) -> None:
        """Flush and close the file. Harmless when repeated."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _append(self, data: bytes) -> None:
        if self._fd is None:
            raise ValueError(f"{self._path} is closed: it takes no more records.")
        _append_whole(self._fd, data)


class JsonlEvents:
    """A handler that appends every event to a file, one JSON object a line.

    A line is `{"timestamp", "event", "measurements", "metadata"}`. NaN and the infinities, which
    are not JSON, become "NaN", "Infinity" and "-Infinity", a path its text, a scalar array its
    number, and whatever else JSON cannot hold its `repr`.

    A line is one `write` to the operating system, so a killed program loses none; `close` makes
    them survive a loss of power too. It may be called from several threads. Opening a file whose
    last line was torn moves that piece to `<name>.torn` and warns.

    Args:
        path: the file, made with its folder where missing, appended to where present.

    Raises:
        OSError: the file cannot be opened, repaired or written.
        ValueError: an event came after `close`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = JsonlEvents(f"{folder}/events.jsonl")
        ...     log(Event("stage.retry", {"attempt": 1}, {"stage": "load", "error": OSError(5)}, 0))
        ...     log.close()
        ...     print(Path(folder, "events.jsonl").read_text())
        {"timestamp": "1970-01-01T00:00:00.000000+00:00", "event": "stage.retry",
         "measurements": {"attempt": 1}, "metadata": {"stage": "load", "error": "OSError(5)"}}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _set_torn_line_aside(self._path, json.loads)
        self._fd: int | None = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.RLock()  # a write must not meet another file at a closed descriptor

    def __call__(self, event: Event) -> None:
        """Append one line."""
        fields = {
            "timestamp": _iso_utc(event.timestamp),
            "event": event.name,
            "measurements": _plain(event.measurements),
            "metadata": _plain(event.metadata),
        }
        line = f"{json.dumps(fields, allow_nan=False)}\n".encode()
        with self._lock:
            if self._fd is None:
                raise ValueError(f"{self._path} is closed: it takes no more events.")
            _append_whole(self._fd, line)

    def close(self) -> None:
        """Make everything survive a loss of power, and close the file. Harmless when repeated."""
        with self._lock:
            if self._fd is not None:
                fd, self._fd = self._fd, None
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)


def read_metrics(path: str | os.PathLike[str], run_id: str | None = None) -> list[Entry]:
    """Read a metrics file, in the order it was written.

    A torn last line, as a kill or a run still writing leaves it, is skipped with a warning.

    Args:
        path: a file written by `JsonlStore`.
        run_id: keep this run only; None keeps all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is damaged.
    """
    path = Path(path)
    *lines, rest = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(_parse(line))
        except ValueError as error:
            if number < len(lines) or rest:
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}): {_shown(line)}. Repair or remove "
                    "that line; the others are not affected."
                ) from error
            rest = line
    if rest:
        warnings.warn(f"{path}: skipped its torn last line: {_shown(rest)}", stacklevel=2)
    return [entry for entry in entries if run_id is None or entry.run_id == run_id]


def history(
    source: str | os.PathLike[str] | Iterable[Entry], run_id: str | None = None
) -> dict[str, History]:
    """Every metric over the steps of a run.

    A step measured more than once, as after a resumption, counts once: the last attempt wins, and
    within an attempt the last written.

    Args:
        source: a metrics file, or the entries read from one.
        run_id: the run; needed where the source holds several.

    Raises:
        ValueError: the source holds several runs and none was chosen.

    Example:
        >>> entries = [
        ...     Entry("demo", "loss", 3.0, 1, 0.0, {"attempt": 0}),
        ...     Entry("demo", "loss", 9.0, 2, 1.0, {"attempt": 0}),
        ...     Entry("demo", "loss", 2.0, 2, 5.0, {"attempt": 1}),
        ... ]
        >>> history(entries)["loss"]
        History(steps=array([1, 2]), values=array([3., 2.]))
    """
    entries = read_metrics(source) if isinstance(source, str | os.PathLike) else list(source)
    runs = sorted({entry.run_id for entry in entries})
    if run_id is None and len(runs) > 1:
        raise ValueError(f"{len(runs)} runs are mixed here: {', '.join(runs)}. Choose one: run_id=")
    latest: dict[str, dict[int, tuple[int, float]]] = {}
    for entry in entries:
        if entry.step is None or run_id not in (None, entry.run_id):
            continue
        attempt = entry.metadata.get("attempt", 0)
        steps = latest.setdefault(entry.metric, {})
        if attempt >= steps.get(entry.step, (attempt,))[0]:
            steps[entry.step] = (attempt, entry.value)
    return {
        metric: History(
            np.array(sorted(steps), np.int64),
            np.array([steps[step][1] for step in sorted(steps)], np.float64),
        )
        for metric, steps in latest.items()
    }


def _append_whole(fd: int, data: bytes) -> None:
    """Write all of it or none, in one go: half a line would spoil the next one."""
    written = 0
    try:
        while written < len(data):
            written += os.write(fd, data[written:])
    except OSError:
        if written:
            os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise


def _iso_utc(timestamp: float) -> str:
    """A time as `datetime.isoformat(timespec="microseconds")` has it, at a third of the cost.

    Example:
        >>> _iso_utc(0.25)
        '1970-01-01T00:00:00.250000+00:00'
    """
    second = floor(timestamp)
    microseconds = round((timestamp - second) * 1e6)
    if microseconds == 1_000_000:
        second, microseconds = second + 1, 0
    return f"{_second(second)}.{microseconds:06d}+00:00"


@lru_cache(maxsize=16)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()[:19]


def _head(run_id: str, name: str) -> str:
    return f'{{"run_id": {json.dumps(run_id)}, "metric": {json.dumps(name)}, "value": '


def _parse(line: bytes) -> Entry:
    fields = json.loads(line, parse_constant=_no_constant)
    try:
        metadata = dict(fields["metadata"])
        value = fields["value"]
        return Entry(
            run_id=fields["run_id"],
            metric=fields["metric"],
            value=float(metadata.pop("special") if value is None else value),
            step=fields["step"],
            timestamp=datetime.fromisoformat(fields["timestamp"]).timestamp(),
            metadata=metadata,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a metric: {error!r}") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _shown(line: bytes) -> str:
    return repr(line[:80].decode(errors="replace")) + ("..." if len(line) > 80 else "")


def _set_torn_line_aside(path: Path, parse: Callable[[bytes], Any]) -> None:
    """Move a last line that a kill cut short to `<name>.torn`: the next would be joined to it."""
    if not path.exists() or not (size := path.stat().st_size):
        return
    with path.open("r+b") as file:
        start = _last_line_start(file, size)
        file.seek(start)
        line = file.read()
        if line.endswith(b"\n"):
            try:
                parse(line)
                return
            except ValueError:
                pass
        aside = path.with_name(path.name + ".torn")
        with aside.open("ab") as torn:
            torn.write(line)
            torn.flush()
            os.fsync(torn.fileno())  # safe there before it leaves the file
        file.truncate(start)
    warnings.warn(f"{path} ended in a torn line, moved to {aside}: {_shown(line)}", stacklevel=3)


def _last_line_start(file: Any, size: int, block: int = 1 << 16) -> int:
    """Where the last line begins, a line ending being part of its line."""
    end = size - 1  # the last byte may be the last line's own ending
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _plain(value: Any, above: tuple[Any, ...] = ()) -> Any:
    """What JSON can hold of a value; `above` are the containers it lies in."""
    with contextlib.suppress(Exception):  # an object may raise at whatever it is asked
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):  # Python refuses to print one of more than 4300 digits
            return value if value.bit_length() < 14_000 else hex(value)
        if isinstance(value, float):
            if isfinite(value):
                return float(value)
            return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
        if isinstance(value, os.PathLike):
            return os.fsdecode(value)
        if getattr(value, "shape", None) == ():  # a scalar of NumPy or JAX
            item = value.item()
            return _repr(value) if type(item) is type(value) else _plain(item, above)
        if not any(value is container for container in above):
            above = (*above, value)
            if isinstance(value, Mapping):
                return {str(key): _plain(each, above) for key, each in value.items()}
            if isinstance(value, list | tuple):
                return [_plain(each, above) for each in value]
    return _repr(value)


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__}: its repr raised {type(error).__name__}>"
