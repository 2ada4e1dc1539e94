"""Laws of the stream: order, lateness, no waiting, nothing lost, nothing doubled."""

import contextlib
import gc
import math
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crucible.metrics import Mean
from crucible.telemetry import ConsoleSink, JsonlStore, Record, Stream, read_metrics, reader


class Kept:
    """A handler that keeps what it is given; `gate`, when set, must open before it takes one."""

    def __init__(self, gate=None):
        self.records, self.flushes, self.closes, self.gate = [], 0, 0, gate

    def __call__(self, record):
        if self.gate is not None:
            assert self.gate.wait(10)
        self.records.append(record)

    def flush(self):
        self.flushes += 1

    def close(self):
        self.closes += 1

    @property
    def steps(self):
        return [record.step for record in self.records]


class Broken(Kept):
    """A handler that raises at every record of the given steps."""

    def __init__(self, *steps, required=False):
        super().__init__()
        self.bad, self.required = steps, required

    def __call__(self, record):
        if record.step in self.bad:
            raise OSError("No space left on device")
        super().__call__(record)


class Pending:
    """Stands for a value on the device: only a host read waits for it, and says who waited."""

    def __init__(self):
        self.ready, self.read_by = threading.Event(), None

    def __array__(self, dtype=None, copy=None):
        self.read_by = threading.current_thread()
        assert self.ready.wait(10)
        return np.asarray(1.5)


def wait_until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def test_every_record_reaches_every_handler_once_and_in_order():
    first, second = Kept(), Kept()
    with Stream("run", [first, second], attempt=3) as stream:
        for step in range(500):
            stream.push(step, {"loss": float(step)})
    assert first.steps == second.steps == list(range(500))
    assert [record.values["loss"] for record in first.records] == [float(n) for n in range(500)]
    assert {(record.run_id, record.attempt) for record in first.records} == {("run", 3)}


def test_a_record_is_read_when_the_next_one_is_pushed():
    kept = Kept()
    with Stream("run", [kept]) as stream:
        stream.push(1, {"loss": 1.0})
        time.sleep(0.05)
        assert kept.steps == []
        stream.push(2, {"loss": 1.0})
        wait_until(lambda: kept.steps == [1])
        time.sleep(0.05)
        assert kept.steps == [1]
        stream.flush()
        assert kept.steps == [1, 2]
    assert kept.steps == [1, 2]


def test_a_push_returns_before_the_value_is_ready_and_never_reads_it_itself():
    kept, pending = Kept(), Pending()
    stream = Stream("run", [kept])
    start = time.monotonic()
    for step in range(4):  # as many as may be pending
        stream.push(step, {"loss": pending})
    assert time.monotonic() - start < 1.0
    wait_until(lambda: pending.read_by is not None)
    assert pending.read_by is not threading.current_thread()
    assert kept.steps == []
    pending.ready.set()
    stream.close()
    assert kept.steps == list(range(4))


def test_a_push_makes_no_transfer():
    kept = Kept()
    metrics = jax.jit(lambda x: {"loss": Mean(x.sum(), x.size), "tokens": x.sum()})(jnp.ones(4))
    with jax.transfer_guard("disallow"), Stream("run", [kept]) as stream:
        for _ in range(3):
            stream.push(7, metrics)
        stream.flush()
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.add(jnp.ones(2), np.ones(2))  # the caller's guard still stands
    assert kept.records[-1].values == {"loss": 1.0, "tokens": 4.0}


def test_names_are_joined_and_a_mean_is_divided_once():
    kept = Kept()
    metrics = {
        "eval": {"loss": Mean(jnp.float32(6.0), jnp.float32(4.0)), "deep": {"er": 1}},
        "tokens": jnp.int32(2**24 + 1),
        "learning_rate": np.float32(0.5),
        "half": jnp.bfloat16(0.25),
        "absent": None,
    }
    with Stream("run", [kept]) as stream:
        stream.push(jnp.int32(7), metrics)
    (record,) = kept.records
    assert record.values == {
        "eval/deep/er": 1.0,
        "eval/loss": 1.5,
        "half": 0.25,
        "learning_rate": 0.5,
        "tokens": 2.0**24 + 1,
    }
    assert all(type(value) is float for value in record.values.values())
    assert type(record.step) is int


def test_an_accelerators_record_is_fetched_in_one_call(monkeypatch):
    kept, fetched, fetch = Kept(), [], jax.device_get
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or fetch(tree))
    with Stream("run", [kept]) as stream:
        for step in (1, 2):
            stream.push(step, {"loss": Mean(jnp.float32(6.0), 4), "tokens": jnp.int32(4)})
    assert [record.values for record in kept.records] == [{"loss": 1.5, "tokens": 4.0}] * 2
    assert len(fetched) == 2


def test_what_was_not_measured_is_absent_and_what_was_measured_survives():
    kept = Kept()
    metrics = {
        "nothing": Mean(jnp.float32(0.0), jnp.float32(0.0)),
        "nothing_nan": Mean(jnp.float32(jnp.nan), jnp.float32(0.0)),
        "nan": Mean(jnp.float32(jnp.nan), jnp.float32(2.0)),
        "inf": Mean(jnp.float32(-jnp.inf), jnp.float32(2.0)),
        "zero": Mean(jnp.float32(0.0), jnp.float32(2.0)),
        "sum": jnp.float32(0.0),
    }
    with Stream("run", [kept]) as stream:
        stream.push(1, metrics)
    values = kept.records[0].values
    assert sorted(values) == ["inf", "nan", "sum", "zero"]
    assert math.isnan(values["nan"])
    assert (values["inf"], values["sum"], values["zero"]) == (-math.inf, 0.0, 0.0)


def test_the_structure_may_change_from_record_to_record():
    kept = Kept()
    with Stream("run", [kept]) as stream:
        for step in range(4):
            stream.push(step, {"loss": 1.0} if step % 2 else {"loss": 1.0, "eval": {"loss": 2.0}})
    assert [sorted(record.values) for record in kept.records] == [
        ["eval/loss", "loss"],
        ["loss"],
    ] * 2


def test_a_pushed_dict_may_be_changed_afterwards():
    kept, metrics = Kept(), {"loss": 1.0}
    with Stream("run", [kept]) as stream:
        for step in range(3):
            metrics["loss"] = float(step)
            stream.push(step, metrics)
    assert [record.values["loss"] for record in kept.records] == [0.0, 1.0, 2.0]


def test_the_timestamp_is_when_the_value_was_there_not_when_it_was_pushed():
    kept, pending = Kept(), Pending()
    pending.block_until_ready = pending.ready.wait  # as a device array has it
    with Stream("run", [kept]) as stream:
        stream.push(1, {"loss": pending})
        time.sleep(0.05)
        ready = time.time()
        pending.ready.set()
    assert ready <= kept.records[0].timestamp <= time.time()


def test_a_push_waits_once_max_pending_records_are_outstanding():
    gate = threading.Event()
    kept = Kept(gate)
    stream = Stream("run", [kept], max_pending=4)
    pushed = []

    def loop():
        for step in range(6):
            stream.push(step, {"loss": 1.0})
            pushed.append(step)

    thread = threading.Thread(target=loop)
    thread.start()
    wait_until(lambda: len(pushed) == 4)
    time.sleep(0.05)
    assert pushed == [0, 1, 2, 3]
    gate.set()
    thread.join(10)
    stream.close()
    assert pushed == kept.steps == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("quick", "ahead"), [(60.0, 64), (0.0, 4)], ids=["quick", "slow"])
def test_a_loop_of_quick_steps_may_run_further_ahead(quick, ahead, monkeypatch):
    monkeypatch.setattr("crucible.telemetry.reader.QUICK", quick)  # seconds a step
    gate = threading.Event()
    gate.set()
    kept = Kept(gate)
    stream = Stream("run", [kept], max_pending=4)
    for step in range(200):
        stream.push(step, {"loss": 1.0})
    stream.flush()
    gate.clear()
    pushed = []

    def loop():
        for step in range(200, 300):
            stream.push(step, {"loss": 1.0})
            pushed.append(step)

    thread = threading.Thread(target=loop)
    thread.start()
    wait_until(lambda: len(pushed) >= ahead)
    time.sleep(0.05)
    outstanding = len(pushed)
    gate.set()
    thread.join(10)
    stream.close()
    assert outstanding == ahead
    assert kept.steps == list(range(300))


def test_the_smallest_bound_still_makes_progress():
    kept = Kept()
    with Stream("run", [kept], max_pending=2) as stream:
        for step in range(100):
            stream.push(step, {"loss": 1.0})
    assert kept.steps == list(range(100))
    with pytest.raises(ValueError, match="max_pending=1 leaves no room"):
        Stream("run", [], max_pending=1)


def test_a_push_that_waited_goes_on_once_half_the_bound_is_free():
    turns, pushed = threading.Semaphore(0), []

    class InTurn(Kept):
        def __call__(self, record):
            assert turns.acquire(timeout=10)
            super().__call__(record)

    kept = InTurn()
    stream = Stream("run", [kept], max_pending=6)

    def loop():
        for step in range(10):
            stream.push(step, {"loss": 1.0})
            pushed.append(step)

    thread = threading.Thread(target=loop)
    thread.start()
    for handled, expected in ((0, 6), (1, 6), (2, 6), (3, 9), (4, 9), (5, 9), (6, 10)):
        wait_until(lambda handled=handled: len(kept.steps) == handled)
        time.sleep(0.02)
        wait_until(lambda expected=expected: len(pushed) == expected)
        turns.release()
    turns.release(10)
    thread.join(10)
    stream.close()
    assert kept.steps == list(range(10))


def test_the_seconds_that_pushes_waited_for_the_reader_are_counted():
    gate = threading.Event()
    stream = Stream("run", [Kept(gate)], max_pending=2)
    stream.push(1, {"loss": 1.0})
    stream.push(2, {"loss": 1.0})
    assert stream.waited == 0.0
    timer = threading.Timer(0.1, gate.set)
    timer.start()
    began = time.perf_counter()
    stream.push_many(range(3, 5), {"loss": np.ones(2)})
    assert 0.05 < stream.waited <= time.perf_counter() - began
    timer.join()
    once = stream.waited
    stream.flush()  # is no push
    assert stream.waited == once
    gate.clear()
    stream.push(5, {"loss": 1.0})
    stream.push(6, {"loss": 1.0})
    with pytest.raises(KeyboardInterrupt), ctrl_c():
        stream.push(7, {"loss": 1.0})
    assert stream.waited > once + 0.02
    gate.set()
    stream.close()


def chunk(steps, longer=0):
    """The metrics of some steps, stacked, and after them what no step computed."""
    n = np.arange(len(steps) + longer, dtype=np.float32)
    return {
        "loss": Mean(jnp.asarray(n * 3), jnp.asarray(n % 4)),  # every fourth weighs nothing
        "eval": {"tokens": jnp.asarray(n.astype(np.int32) + 2**24 + 1)},
        "half": jnp.asarray(n, jnp.bfloat16),
        "nan": np.where(n == 1, np.nan, n),
    }


def test_a_chunk_gives_what_pushing_its_steps_one_by_one_gives():
    whole, single = Kept(), Kept()
    with Stream("run", [whole], attempt=2) as many, Stream("run", [single], attempt=2) as one:
        for steps in (range(0, 8), range(8, 9), range(9, 12), range(12, 20, 2)):
            metrics = chunk(steps, longer=steps.start % 3)
            many.push_many(steps, metrics)
            for i, step in enumerate(steps):
                one.push(step, jax.tree.map(lambda leaf, i=i: leaf[i], metrics))
    assert whole.steps == single.steps == [*range(12), *range(12, 20, 2)]
    for a, b in zip(whole.records, single.records, strict=True):
        assert (a.run_id, a.attempt) == (b.run_id, b.attempt)
        assert list(a.values) == list(b.values)
        np.testing.assert_array_equal(list(a.values.values()), list(b.values.values()))
        assert {type(value) for value in a.values.values()} == {float}
        assert type(a.step) is int
    assert "loss" not in whole.records[4].values


def test_records_and_chunks_come_in_the_order_they_were_pushed():
    kept = Kept()
    with Stream("run", [kept]) as stream:
        stream.push(0, {"loss": 1.0})
        stream.push_many(range(1, 4), {"loss": np.ones(3)})
        stream.push(3, {"eval/loss": 1.0})
        stream.push_many(range(4, 6), {"loss": np.ones(3)})
        time.sleep(0.05)
        assert kept.steps == [0, 1, 2, 3, 3]  # the newest is read when the next one comes
    assert kept.steps == [0, 1, 2, 3, 3, 4, 5]


def test_a_chunk_makes_no_transfer_and_no_sync_and_is_fetched_in_one_call(monkeypatch):
    kept, fetched, fetch = Kept(), [], jax.device_get
    metrics, pending = chunk(range(8)), Pending()
    pending.shape = (8,)  # pyright: ignore[reportAttributeAccessIssue]
    with Stream("run", [Kept()]) as stream, jax.transfer_guard("disallow"):
        stream.push_many(range(8), {**metrics, "pending": pending})
        assert pending.read_by is not threading.current_thread()
        pending.ready.set()
        with pytest.raises(IndexError):  # it stands for one number only
            stream.flush()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or fetch(tree))
    with Stream("run", [kept]) as stream:
        stream.push_many(range(8), metrics)
    assert (kept.steps, len(fetched)) == (list(range(8)), 1)


def test_a_chunk_counts_as_one_against_the_bound():
    gate = threading.Event()
    kept = Kept(gate)
    stream = Stream("run", [kept], max_pending=4)
    for first in range(0, 40, 10):
        stream.push_many(range(first, first + 10), {"loss": np.ones(10)})
    assert stream.waited == 0.0
    gate.set()
    stream.close()
    assert kept.steps == list(range(40))


def ready_at(monkeypatch, *times):
    """Have the pushes' values ready at these times."""
    times = iter(times)
    monkeypatch.setattr(reader, "time", SimpleNamespace(time=lambda: next(times)))


def test_the_times_of_a_chunk_are_spread_from_the_record_before_to_its_own(monkeypatch):
    kept = Kept()
    ready_at(monkeypatch, 100.0, 108.0, 109.0, 119.0)
    with Stream("run", [kept]) as stream:
        stream.push_many(range(4), {"loss": np.ones(4)})
        stream.push_many(range(4, 8), {"loss": np.ones(4)})
        stream.push(8, {"loss": 1.0})
        stream.push_many(range(9, 11), {"loss": np.ones(8)})
    assert [record.timestamp for record in kept.records] == [
        *(100.0, 100.0, 100.0, 100.0),  # nothing is known of the time before
        *(102.0, 104.0, 106.0, 108.0),
        109.0,
        *(114.0, 119.0),
    ]


def test_the_rate_over_chunks_is_that_of_the_dispatches(monkeypatch, capsys):
    ready_at(monkeypatch, 100.0, 101.0, 102.0)
    with Stream("run", [ConsoleSink(1000, every=1)]) as stream:
        for first in range(0, 30, 10):
            stream.push_many(range(first, first + 10), {"tokens": np.full(10, 50.0)})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert not [line for line in lines[:10] if "tokens/s" in line]  # one moment is no rate
    assert {line.split("tokens/s ")[1].split()[0] for line in lines[10:]} == {"500"}


@pytest.mark.parametrize(
    ("steps", "metrics", "error", "message"),
    [
        (
            range(16, 24),
            {"eval": {"loss": Mean(np.ones(8), np.ones(7))}},
            ValueError,
            r"metric 'eval/loss' has 7 entries for the 8 steps range\(16, 24\)",
        ),
        (range(2), {"loss": jnp.float32(1.0)}, ValueError, r"metric 'loss' has shape \(\); push_m"),
        (range(2), {"loss": 1.0}, ValueError, r"metric 'loss' has shape \(\)"),
        (range(2), {"loss": jnp.ones((2, 3))}, ValueError, r"metric 'loss' has shape \(2, 3\)"),
        (range(2), np.ones(2), ValueError, "a metric needs a name"),
        (3, {"loss": np.ones(3)}, TypeError, "steps=3: it takes a range of optimizer steps"),
        ([0, 1], {"loss": np.ones(3)}, TypeError, "Send a single step with push"),
    ],
)
def test_a_chunk_that_does_not_fit_its_steps_is_refused_by_the_push_itself(
    steps, metrics, error, message
):
    kept = Kept()
    with Stream("run", [kept]) as stream:
        with pytest.raises(error, match=message):
            stream.push_many(steps, metrics)
        stream.push(1, {"loss": 1.0})
    assert kept.steps == [1]


@pytest.mark.parametrize("dtype", ["<U3", "complex64", "object"])
def test_a_chunk_of_what_is_not_a_number_is_named(dtype):
    stream = Stream("run", [])
    stream.push_many(range(2), {"loss": np.ones(2).astype(dtype)})
    with pytest.raises(TypeError, match=r"metric 'loss' is array.*; a metric is a number"):
        stream.close()


def test_a_chunk_of_no_steps_is_nothing():
    kept = Kept()
    stream = Stream("run", [kept], max_pending=2)
    for _ in range(5):
        stream.push_many(range(3, 3), {"loss": np.ones(0)})
    stream.close()
    assert (kept.steps, stream.waited) == ([], 0.0)
    with pytest.raises(RuntimeError, match=r"steps range\(3, 5\) was pushed to the closed stream"):
        stream.push_many(range(3, 5), {"loss": np.ones(2)})


def test_a_chunk_that_cannot_be_read_is_lost_as_a_whole_and_named():
    kept, lost = Kept(), jnp.ones(3) + 1
    lost.delete()
    stream = Stream("run", [kept])
    stream.push_many(range(4, 7), {"loss": lost})
    with pytest.raises(RuntimeError, match="deleted") as caught:
        stream.flush()
    assert "pushed at steps 4 to 6 could not be read" in caught.value.__notes__[0]
    stream.push(7, {"loss": 1.0})
    stream.close()
    assert kept.steps == [7]


def test_a_handler_that_fails_within_a_chunk_misses_the_rest_of_it():
    broken, kept = Broken(5), Kept()
    stream = Stream("run", [broken, kept])
    stream.push_many(range(4, 8), {"loss": np.ones(4)})
    with pytest.warns(RuntimeWarning, match="Broken failed at step 5 of run 'run'"):
        stream.close()
    assert (broken.steps, kept.steps) == ([4], [4, 5, 6, 7])


def test_flush_returns_when_all_is_handled_and_flushed():
    kept = Kept()
    with Stream("run", [kept]) as stream:
        for step in range(20):
            stream.push(step, {"loss": 1.0})
        stream.flush()
        assert kept.steps == list(range(20))
        assert kept.flushes == 1
        stream.flush()
        assert (len(kept.steps), kept.flushes) == (20, 2)


def test_close_may_be_repeated_and_a_later_push_says_so():
    kept = Kept()
    stream = Stream("run", [kept])
    stream.push(1, {"loss": 1.0})
    stream.close()
    stream.close()
    stream.flush()
    assert (kept.steps, kept.closes) == ([1], 1)
    with pytest.raises(RuntimeError, match=r"step 2 was pushed to the closed stream of run 'run'"):
        stream.push(2, {"loss": 1.0})


def test_a_handler_that_fails_is_dropped_with_one_warning_and_the_run_goes_on():
    broken, kept = Broken(2, 3), Kept()
    stream = Stream("run", [broken, kept])
    for step in (1, 2, 3):
        stream.push(step, {"loss": 1.0})
    with pytest.warns(RuntimeWarning) as caught:
        stream.flush()
    (warning,) = caught
    assert "telemetry handler Broken failed at step 2 of run 'run'" in str(warning.message)
    assert "No space left on device" in str(warning.message)
    assert 'raise OSError("No space left' in str(warning.message)  # the traceback's text
    assert warning.filename == __file__
    stream.push(4, {"loss": 1.0})
    stream.close()
    assert (broken.steps, broken.closes) == ([1], 1)
    assert kept.steps == [1, 2, 3, 4]


def test_a_handler_that_fails_to_flush_or_close_is_reported_too():
    class Stuck(Kept):
        def flush(self):
            raise OSError("stuck flushing")

        def close(self):
            raise OSError("stuck closing")

    stream = Stream("run", [Stuck()])
    with pytest.warns(RuntimeWarning, match="Stuck could not flush"):
        stream.flush()
    stream.close()
    stream = Stream("run", [Stuck()])
    with pytest.warns(RuntimeWarning, match="Stuck could not close"):
        stream.close()


def test_a_required_handler_that_fails_stops_the_loop_and_keeps_its_place():
    store, kept = Broken(2, required=True), Kept()
    stream = Stream("run", [store, kept])
    for step in (1, 2):
        stream.push(step, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left on device") as caught:
        stream.flush()
    assert caught.value.__notes__ == ["Handler Broken failed at step 2 of run 'run'."]
    stream.push(3, {"loss": 1.0})  # the error was said once
    stream.close()
    assert store.steps == [1, 3]
    assert kept.steps == [1, 2, 3]


def test_an_error_surfaces_at_the_next_push_which_is_not_lost():
    store = Broken(1, required=True)
    stream = Stream("run", [store])
    stream.push(1, {"loss": 1.0})
    stream.push(2, {"loss": 1.0})
    wait_until(lambda: stream._reader.failures)
    with pytest.raises(OSError, match="No space left"):
        stream.push(3, {"loss": 1.0})
    stream.close()
    assert store.steps == [2, 3]


def test_many_failures_raise_the_first_and_count_the_others():
    stream = Stream("run", [Broken(1, 2, 3, required=True)])
    for step in (1, 2, 3):
        with contextlib.suppress(OSError):
            stream.push(step, {"loss": 1.0})
    stream._reader.failures.clear()
    with pytest.raises(OSError, match="No space left"):
        stream.close()
    stream.close()

    gate = threading.Event()
    stream = Stream("run", [Kept(gate), Broken(1, 2, 3, required=True)])
    for step in (1, 2, 3):
        stream.push(step, {"loss": 1.0})
    gate.set()
    with pytest.raises(OSError, match="No space left") as caught:
        stream.flush()
    assert caught.value.__notes__ == [
        "Handler Broken failed at step 1 of run 'run'.",
        "So did 2 more since the last push.",
    ]
    stream.close()


def test_where_warnings_are_errors_a_warning_hides_no_error():
    stream = Stream("run", [Broken(1), Broken(1, required=True)])
    stream.push(1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left") as caught:
        stream.close()
    assert isinstance(caught.value.__context__, RuntimeWarning)


def test_a_failure_at_the_end_hides_neither_an_interrupt_nor_itself():
    def run(error):
        with Stream("run", [Broken(1, required=True)]) as stream:
            stream.push(1, {"loss": 1.0})
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt) as caught:
        run(KeyboardInterrupt())
    (note,) = caught.value.__notes__
    assert "Telemetry of run 'run' failed too: OSError('No space left on device')" in note
    with pytest.raises(OSError, match="No space left"):
        run(None)


def test_an_array_that_was_deleted_is_an_error_on_the_callers_thread():
    kept = Kept()
    stream = Stream("run", [kept])
    lost, step = jnp.float32(1.0) + 1, jnp.int32(5) + 1
    lost.delete()
    step.delete()
    stream.push(1, {"loss": lost})
    with pytest.raises(RuntimeError, match="deleted") as caught:
        stream.flush()
    assert "pushed at step 1 could not be read" in caught.value.__notes__[0]
    stream.push(step, {"loss": 1.0})
    with pytest.raises(RuntimeError, match="deleted"):
        stream.flush()
    stream.push(2, {"loss": 1.0})
    stream.close()
    assert kept.steps == [2]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": jnp.ones(3)}, r"metric 'loss' has shape \(3,\); a metric is a scalar"),
        ({"loss": Mean(jnp.ones(3), 1.0)}, r"metric 'loss' has shape \(3,\)"),
        ({"loss": "low"}, "metric 'loss' is .*low.*; a metric is a number"),
    ],
)
def test_what_is_not_a_number_is_named(metrics, message):
    stream = Stream("run", [])
    stream.push(1, metrics)
    with pytest.raises((TypeError, ValueError), match=message):
        stream.close()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (1.0, "a metric needs a name"),
        (Mean(1.0, 1.0), "a metric needs a name"),
        ({"a": {"b": 1.0}, "a/b": 2.0}, "two metrics are named 'a/b'"),
        ({"grads": Mean({"w": 1.0}, 1.0)}, "metric 'grads' is a Mean of a tree"),
    ],
)
def test_a_tree_that_cannot_be_named_is_refused_by_the_push_itself(metrics, message):
    with Stream("run", []) as stream, pytest.raises(ValueError, match=message):
        stream.push(1, metrics)


def test_what_is_no_handler_is_refused():
    with pytest.raises(TypeError, match=r"lacks flush, close"):
        Stream("run", [print])  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def ctrl_c(after=0.05):
    """A Ctrl-C that reaches the main thread in the midst of what it waits for."""
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(after, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("call", ["push", "flush", "close"])
def test_an_interrupt_loses_and_doubles_nothing(call):
    gate = threading.Event()
    kept = Kept(gate)
    stream = Stream("run", [kept], max_pending=3)
    for step in range(3):
        stream.push(step, {"loss": 1.0})
    with pytest.raises(KeyboardInterrupt), ctrl_c():
        stream.push(3, {"loss": 1.0}) if call == "push" else getattr(stream, call)()
    assert kept.steps == []
    gate.set()
    if call == "close":
        with pytest.raises(RuntimeError, match="closed"):
            stream.push(3, {"loss": 1.0})
    else:
        stream.push(3, {"loss": 1.0})
        stream.flush()
        assert kept.steps == [0, 1, 2, 3]
    stream.close()
    assert kept.steps == [0, 1, 2, 3][: 3 if call == "close" else 4]
    assert kept.closes == 1


def test_a_storm_of_interrupts_leaves_the_records_in_order():
    kept, attempted, armed = Kept(), 0, False
    interrupted = 0

    def interrupt(*_):
        nonlocal armed, interrupted
        if armed:
            armed, interrupted = False, interrupted + 1
            raise KeyboardInterrupt

    stream = Stream("run", [kept])
    old = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # an interrupt inside JAX's collection callback is only printed
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.0003)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        with contextlib.suppress(KeyboardInterrupt):
            attempted, armed = attempted + 1, True
            stream.push(attempted, {"loss": 1.0})
            if attempted % 20 == 0:
                stream.flush()
            armed = False
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, old)
    gc.enable()
    stream.close()
    assert interrupted > 20
    assert kept.steps == sorted(set(kept.steps))
    assert attempted - interrupted <= len(kept.steps) <= attempted


def test_a_forgotten_stream_closes_itself():
    kept = Kept()
    stream = Stream("run", [kept])
    thread = stream._reader.thread
    stream.push(1, {"loss": 1.0})
    del stream
    gc.collect()
    assert (kept.steps, kept.closes) == ([1], 1)
    assert not thread.is_alive()


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_a_program_that_ends_without_close_has_written_everything(tmp_path, ending):
    path = tmp_path / "metrics.jsonl"
    program = f"""
import sys, jax, jax.numpy as jnp
from crucible.telemetry import JsonlStore, Stream
stream = Stream("run", [JsonlStore({str(path)!r})])
for step in range(5):
    stream.push(step, {{"loss": jnp.float32(step) * 2}})
{ending}
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, stderr=subprocess.DEVNULL)
    assert [(entry.step, entry.value) for entry in read_metrics(path)] == [
        (step, 2.0 * step) for step in range(5)
    ]


def test_a_full_disk_surfaces_in_the_loop_and_costs_only_the_records_it_refused(
    tmp_path, monkeypatch
):
    path, full = tmp_path / "metrics.jsonl", threading.Event()
    write = JsonlStore._append

    def append(store, data):
        if full.is_set():
            raise OSError(28, "No space left on device")
        write(store, data)

    monkeypatch.setattr(JsonlStore, "_append", append)
    stream = Stream("run", [JsonlStore(path)])
    stream.push(1, {"loss": 1.0})
    stream.flush()
    full.set()
    stream.push(2, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left") as caught:
        stream.flush()
    assert "Handler JsonlStore failed at step 2" in caught.value.__notes__[0]
    full.clear()
    stream.push(3, {"loss": 1.0})
    stream.close()
    assert [entry.step for entry in read_metrics(path)] == [1, 3]


def test_a_record_is_a_value():
    record = Record("run", 1, 0.0, {"loss": 1.0}, 0)
    assert record == Record("run", 1, 0.0, {"loss": 1.0}, 0)
    with pytest.raises(AttributeError):
        record.step = 2  # pyright: ignore[reportAttributeAccessIssue]
