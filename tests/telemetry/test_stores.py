"""The metrics file: what is written is read back, and a kill costs at most the last line."""

import json
import math
import os
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pytest

from crucible.telemetry import Entry, JsonlStore, Record, history, read_metrics


def record(step, attempt=0, run_id="run", **values):
    return Record(run_id, step, 1_700_000_000.25 + step, values, attempt)


def write(path, *records):
    store = JsonlStore(path)
    for each in records:
        store(each)
    store.close()


def test_a_line_is_one_number_with_its_run_step_time_and_attempt(tmp_path):
    path = tmp_path / "deep" / "er" / "metrics.jsonl"
    write(path, record(3, attempt=2, run_id='a "run"', loss=1.5, tokens=64.0))
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "run_id": 'a "run"',
            "metric": name,
            "value": value,
            "step": 3,
            "timestamp": "2023-11-14T22:13:23.250000+00:00",
            "metadata": {"attempt": 2},
        }
        for name, value in (("loss", 1.5), ("tokens", 64.0))
    ]
    assert list(json.loads(lines[0])) == [
        "run_id",
        "metric",
        "value",
        "step",
        "timestamp",
        "metadata",
    ]


def test_what_is_written_is_read_back_in_order_and_to_the_last_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = [0.1 + 0.2, 1e-300, -0.0, float(np.float32(0.1)), 2.0**60]
    write(path, *(record(step, loss=value) for step, value in enumerate(values)))
    entries = read_metrics(path)
    assert [entry.value for entry in entries] == values
    assert entries[2] == Entry("run", "loss", -0.0, 2, 1_700_000_002.25, {"attempt": 0})
    assert all(type(entry.value) is float for entry in entries)


def test_nan_and_infinity_survive_and_the_file_stays_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1, a=math.nan, b=math.inf, c=-math.inf, d=1.0))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [(row["value"], row["metadata"].get("special")) for row in rows] == [
        (None, "nan"),
        (None, "inf"),
        (None, "-inf"),
        (1.0, None),
    ]
    a, *others = read_metrics(path)
    assert math.isnan(a.value)
    assert [entry.value for entry in others] == [math.inf, -math.inf, 1.0]
    assert a.metadata == {"attempt": 0}


def test_numpy_scalars_in_a_hand_made_record_are_written_as_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1, a=np.float64(0.5), b=np.float32(0.25), c=3))
    assert [entry.value for entry in read_metrics(path)] == [0.5, 0.25, 3.0]


@pytest.mark.parametrize("seconds", [0, 59, 1_700_000_000, 951_782_399, 4_102_444_799, -1])
@pytest.mark.parametrize("part", [0.0, 0.25, 0.1234565, 0.0000004, 0.0000006, 0.9999994, 0.9999999])
def test_a_time_is_written_as_datetime_has_it(tmp_path, seconds, part):
    path, timestamp = tmp_path / "metrics.jsonl", seconds + part
    write(path, Record("run", 1, timestamp, {"loss": 1.0}, 0))
    written = json.loads(path.read_text())["timestamp"]
    assert written == datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="microseconds")


def test_an_empty_record_writes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1))
    assert path.read_bytes() == b""
    assert read_metrics(path) == []


def test_a_record_is_one_write_and_is_in_the_file_without_a_flush(tmp_path, monkeypatch):
    writes, write_ = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or write_(fd, data))
    store = JsonlStore(tmp_path / "metrics.jsonl")
    store(record(1, a=1.0, b=2.0, c=3.0))
    assert len(writes) == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    store.close()


def test_a_killed_program_loses_no_handled_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = f"""
import os, signal
from crucible.telemetry import JsonlStore, Record
store = JsonlStore({str(path)!r})
for step in range(50):
    store(Record("run", step, 0.0, {{"loss": 1.0}}, 0))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    assert [entry.step for entry in read_metrics(path)] == list(range(50))


def test_a_second_store_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1, loss=1.0))
    write(path, record(2, attempt=1, loss=2.0))
    assert [(entry.step, entry.metadata) for entry in read_metrics(path)] == [
        (1, {"attempt": 0}),
        (2, {"attempt": 1}),
    ]


def test_a_closed_store_says_so_and_closes_again(tmp_path):
    store = JsonlStore(tmp_path / "metrics.jsonl")
    store.close()
    store.close()
    store.flush()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is closed"):
        store(record(1, loss=1.0))


@pytest.mark.parametrize(
    "torn",
    [
        b'{"run_id": "run", "metr',
        b'{"run_id": "run", "metr\n',
        b"\0" * 100,
        b"\0" * 100 + b"\n",
        b'{"run_id": "run"}\n',
        b'{"run_id": "run", "metric": "loss", "value": NaN, "step": 1, "timestamp": '
        b'"2023-11-14T22:13:23+00:00", "metadata": {}}\n',
        b"[" * 200_000,
    ],
)
def test_a_torn_last_line_is_set_aside_and_never_appended_to(tmp_path, torn):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.torn"
    write(path, record(1, loss=1.0), record(2, loss=2.0))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: skipped its torn last line"):
        assert [entry.step for entry in read_metrics(path)] == [1, 2]
    assert path.read_bytes() == whole + torn  # reading changes nothing
    with pytest.warns(UserWarning, match=r"moved to .*metrics\.jsonl\.torn"):
        store = JsonlStore(path)
    assert (path.read_bytes(), aside.read_bytes()) == (whole, torn)
    store(record(3, loss=3.0))
    store.close()
    assert [entry.step for entry in read_metrics(path)] == [1, 2, 3]


def test_a_torn_line_is_found_at_the_end_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *(record(step, loss=1.0) for step in range(2000)))
    whole = path.read_bytes()
    for torn in (b"{torn", b"{" * 100_000, b"{" * 65_535, b"{" * 65_536 + b"\n", b"{" * 65_537):
        path.write_bytes(whole + torn)
        with pytest.warns(UserWarning, match="torn"):
            JsonlStore(path).close()
        assert path.read_bytes() == whole


def test_torn_pieces_add_up_and_a_file_of_one_torn_line_is_emptied(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.torn"
    for piece in (b"{one", b"{two"):
        path.write_bytes(piece)
        with pytest.warns(UserWarning, match="torn"):
            JsonlStore(path).close()
        assert path.read_bytes() == b""
    assert aside.read_bytes() == b"{one{two"


def test_a_whole_file_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        write(path, record(step, loss=1.0))  # each opening would warn, and a warning is an error
    assert len(read_metrics(path)) == 3
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *(record(step, loss=1.0) for step in range(3)))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:40] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged .*Repair or remove"):
        read_metrics(path)
    lines[1] = b"\n"
    path.write_bytes(b"".join(lines))
    assert [entry.step for entry in read_metrics(path)] == [0, 2]


def test_a_damaged_line_before_a_torn_one_is_still_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{damaged\n{torn")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_metrics(path)


def test_a_write_that_fails_half_way_leaves_no_half_line(tmp_path, monkeypatch):
    path, write_ = tmp_path / "metrics.jsonl", os.write
    store = JsonlStore(path)
    store(record(1, loss=1.0))
    calls = []

    def full(fd, data):
        calls.append(data)
        if len(calls) == 1:
            return write_(fd, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        store(record(2, loss=2.0))
    monkeypatch.undo()
    store(record(3, loss=3.0))
    store.close()
    assert [entry.step for entry in read_metrics(path)] == [1, 3]


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    path, write_ = tmp_path / "metrics.jsonl", os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write_(fd, data[:7]))
    write(path, record(1, loss=1.0, tokens=2.0))
    assert [entry.value for entry in read_metrics(path)] == [1.0, 2.0]


def test_one_run_can_be_read_from_a_file_of_several(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1, run_id="a", loss=1.0), record(1, run_id="b", loss=2.0))
    assert [entry.value for entry in read_metrics(path, "b")] == [2.0]
    assert history(path, "a")["loss"].values.tolist() == [1.0]
    with pytest.raises(ValueError, match="2 runs are mixed here: a, b"):
        history(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_history_is_sorted_and_the_last_attempt_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        *(record(step, loss=float(step)) for step in (1, 2, 3, 4)),
        *(record(step, attempt=1, loss=10.0 + step) for step in (3, 4, 5)),
        record(4, attempt=0, loss=99.0),  # a straggler of the first attempt
        record(5, attempt=1, loss=50.0),
        Record("run", 2, 0.0, {"eval/loss": math.nan}, attempt=1),
    )
    for source in (path, str(path), read_metrics(path)):
        curves = history(source)
        assert sorted(curves) == ["eval/loss", "loss"]
        assert curves["loss"].steps.tolist() == [1, 2, 3, 4, 5]
        assert curves["loss"].values.tolist() == [1.0, 2.0, 13.0, 14.0, 50.0]
        assert (curves["loss"].steps.dtype, curves["loss"].values.dtype) == (np.int64, np.float64)
        assert math.isnan(curves["eval/loss"].values[0])


def test_a_number_without_a_step_is_read_but_has_no_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = '{"run_id": "run", "metric": "final", "value": 1, "step": null, '
    path.write_text(line + '"timestamp": "2023-11-14T22:13:23+00:00", "metadata": {}}\n')
    assert read_metrics(path)[0].step is None
    assert history(path) == {}
