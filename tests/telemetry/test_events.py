"""Laws of events: none undeclared, none lost, none to the wrong listener, no failure that stops."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import timeit
from datetime import datetime
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from crucible.telemetry import (
    EVENTS,
    Event,
    JsonlEvents,
    attach,
    attached,
    detach,
    emit,
    events,
    span,
    wanted,
)

SPANS = [
    "stage.run",
    "training.checkpoint",
    "training.epoch",
    "training.eval",
    "training.step",
    "workflow.run",
]
SINGLE = ["eval.complete", "stage.retry", "training.metrics"]


@pytest.fixture(autouse=True)
def nobody_listens_afterwards():
    yield
    left = events._subscriptions
    events._set(())
    events._dropped.clear()
    assert left == ()


def name_of(event):
    return event.name


def refuse(event):
    raise OSError("No space left on device")


def in_threads(work, *arguments):
    """Call `work` with each argument, all at once."""
    threads = [threading.Thread(target=work, args=(each,)) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def fail(error, context):
    """Raise within a context."""
    with context:
        raise error


def test_what_is_declared_can_be_heard_and_everything_is_described():
    assert list(EVENTS) == sorted(SPANS + SINGLE)
    assert all(text and "\n" not in text for text in EVENTS.values())
    with pytest.raises(TypeError):
        EVENTS["made.up"] = "anything"  # pyright: ignore[reportIndexIssue]
    heard = []
    with attached("test", "*", heard.append):
        for name in SINGLE:
            emit(name)
        for name in SPANS:
            with span(name):
                pass
    assert list(map(name_of, heard)) == [
        *SINGLE,
        *(f"{name}.{end}" for name in SPANS for end in ("start", "stop")),
    ]


@pytest.mark.parametrize("heard_by_somebody", [False, True])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: emit("training.metric"), "Did you mean 'training.metrics'"),
        (lambda: emit("stage.run.stopped"), "Did you mean 'stage.run.stop'"),
        (lambda: emit("zzz"), "There are: eval.complete, stage.retry, stage.run, "),
        (lambda: emit("stage.run"), r"is a span: wrap the work in span\('stage.run'\)"),
        (lambda: emit("training.metrics.stop"), "there is no event 'training.metrics.stop'"),
        (lambda: span("stage.runs"), "Did you mean 'stage.run'"),
        (lambda: span("eval.complete"), "is a single event, not a span: emit"),
        (lambda: span("stage.run.stop"), r"one event of a span: use span\('stage.run'\)"),
        (lambda: wanted("workflow.runs"), "Did you mean 'workflow.run'"),
        (lambda: attach("x", "training.metric", print), "Did you mean 'training.metrics'"),
        (lambda: attach("x", ["stage.run", "stage.*"], print), r"there is no event 'stage.\*'"),
        (lambda: attach("x", [], print), "'x' listens to nothing"),
    ],
)
def test_what_is_not_declared_is_refused_with_an_answer(call, message, heard_by_somebody):
    if not heard_by_somebody:
        with pytest.raises(ValueError, match=message):
            call()
        return
    with attached("test", "*", print), pytest.raises(ValueError, match=message):
        call()


def test_an_event_carries_what_was_given_and_when():
    heard, measurements, metadata = [], {"loss": 2.0}, {"step": 7}
    before = time.time()
    with attached("test", "training.metrics", heard.append):
        emit("training.metrics", measurements, metadata)
        emit("training.metrics")
        measurements["loss"], metadata["step"] = 0.0, 0  # too late to change what was told
    first, second = heard
    assert first == Event("training.metrics", {"loss": 2.0}, {"step": 7}, first.timestamp)
    assert (second.measurements, second.metadata) == ({}, {})
    assert before <= first.timestamp <= second.timestamp <= time.time()
    with pytest.raises(AttributeError):
        first.name = "other"


def test_a_full_name_a_base_name_and_a_star_select_once_each():
    heard = {"full": [], "base": [], "all": [], "both": []}
    attach("full", "stage.run.stop", heard["full"].append)
    attach("base", "stage.run", heard["base"].append)
    attach("all", "*", heard["all"].append)
    attach("both", ["stage.run.stop", "stage.run", "eval.complete"], heard["both"].append)
    with span("stage.run"):
        emit("eval.complete")
    emit("stage.retry")
    for handler_id in heard:
        detach(handler_id)
    emit("stage.retry")
    run = ["stage.run.start", "stage.run.stop"]
    assert {key: list(map(name_of, value)) for key, value in heard.items()} == {
        "full": run[1:],
        "base": run,
        "all": [run[0], "eval.complete", run[1], "stage.retry"],
        "both": [run[0], "eval.complete", run[1]],
    }


def test_handlers_are_called_in_the_order_of_attaching():
    order = []
    with (
        attached("b", "*", lambda _: order.append("b")),
        attached("a", "stage.retry", lambda _: order.append("a")),
    ):
        emit("stage.retry")
    assert order == ["b", "a"]


def test_two_runs_in_one_process_do_not_mix():
    heard = {"x": [], "y": [], "odd": []}
    barrier = threading.Barrier(2)

    def run(run_id):
        barrier.wait(10)
        for step in range(200):
            emit("training.metrics", {}, {"run_id": run_id, "step": step})
            with span("stage.run", {"run_id": run_id}) as more:
                more["path"] = run_id

    with (
        attached("x", "*", heard["x"].append, where={"run_id": "x"}),
        attached("y", "*", heard["y"].append, where={"run_id": "y"}),
        attached("odd", "*", heard["odd"].append, where=lambda e: e.metadata.get("step", 0) % 2),
    ):
        in_threads(run, "x", "y")
        emit("training.metrics")  # of no run
    for run_id in "xy":
        assert {event.metadata["run_id"] for event in heard[run_id]} == {run_id}
        assert len(heard[run_id]) == 600
    assert len(heard["odd"]) == 200


def test_a_value_of_none_is_not_an_absent_one():
    heard = []
    with attached("test", "*", heard.append, where={"run_id": None}):
        emit("stage.retry")
        emit("stage.retry", metadata={"run_id": None, "stage": "load"})
    assert [event.metadata["stage"] for event in heard] == ["load"]


def test_an_id_is_taken_until_it_is_detached():
    attach("console", "*", print)
    with pytest.raises(ValueError, match=r"'console' is attached already. Call detach\('console'"):
        attach("console", "stage.run", print)
    with pytest.raises(ValueError, match="attached already"), attached("console", "*", print):
        raise AssertionError("it never gets here")
    assert wanted("eval.complete")  # the first one still listens
    with pytest.raises(
        ValueError, match=r"no handler 'consol' is attached. Did you mean 'console'"
    ):
        detach("consol")
    detach("console")
    with pytest.raises(ValueError, match="no handler 'console' is attached"):
        detach("console")
    attach("console", "*", print)
    detach("console")


@pytest.mark.parametrize(
    ("handler", "where", "message"),
    [(None, None, "handler None is not callable"), (print, "run", "where='run' selects nothing")],
)
def test_what_cannot_listen_is_refused(handler, where, message):
    with pytest.raises(TypeError, match=message):
        attach("test", "*", handler, where=where)


def test_attached_gives_the_handler_and_lets_go_however_the_block_ends():
    handler = print
    with attached("test", "*", handler) as given:
        assert given is handler
    assert not wanted("stage.run")
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError(), attached("test", "*", handler))
    assert not wanted("stage.run")
    with attached("test", "*", print):
        detach("test")
        attach("test", "stage.retry", print)  # another's, which the block's end leaves alone
    assert wanted("stage.retry")
    detach("test")


def test_wanted_says_whether_anybody_listens():
    assert not any(map(wanted, [*EVENTS, "stage.run.stop"]))
    for end in ("start", "stop", "exception"):
        with attached("test", f"stage.run.{end}", print):
            assert wanted("stage.run")
            assert [e for e in ("start", "stop", "exception") if wanted(f"stage.run.{e}")] == [end]
            assert not wanted("training.step")
            assert not wanted("eval.complete")
    with attached("test", "eval.complete", print):
        assert wanted("eval.complete")
        assert not wanted("stage.run")


def test_a_span_tells_its_start_and_its_stop_with_the_seconds_between():
    heard = []
    given = {"stage": "load"}
    with attached("test", "stage.run", heard.append):
        before = time.time()
        with span("stage.run", given) as more:
            assert more == given
            more["path"] = "a/b"
            time.sleep(0.02)
    start, stop = heard
    assert (start.name, start.metadata) == ("stage.run.start", {"stage": "load"})
    assert list(start.measurements) == ["system_time"]
    assert before <= start.measurements["system_time"] <= start.timestamp
    assert (stop.name, stop.metadata) == ("stage.run.stop", {"stage": "load", "path": "a/b"})
    assert list(stop.measurements) == ["duration"]
    assert 0.02 <= stop.measurements["duration"] < 2.0
    assert given == {"stage": "load"}


def test_a_duration_does_not_follow_the_wall_clock(monkeypatch):
    heard = []
    with attached("test", "stage.run.stop", heard.append), span("stage.run"):
        monkeypatch.setattr(time, "time", lambda: 0.0)  # as when it is set back
    assert 0.0 <= heard[0].measurements["duration"] < 1.0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_span_that_fails_ends_as_exception_and_never_as_stop(kind):
    heard, error = [], kind("it broke")

    def work():
        with span("stage.run", {"stage": "load"}) as more:
            more["path"] = "a/b"
            raise error

    with attached("test", "*", heard.append), pytest.raises(kind) as caught:
        work()
    assert caught.value is error
    assert list(map(name_of, heard)) == ["stage.run.start", "stage.run.exception"]
    assert heard[1].metadata == {
        "stage": "load",
        "path": "a/b",
        "error_type": kind.__name__,
        "error_message": "it broke",
    }
    assert 0.0 <= heard[1].measurements["duration"] < 1.0
    assert not hasattr(error, "__notes__")


def test_an_error_without_words_is_still_told():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    heard = []
    with attached("test", "*", heard.append), pytest.raises(Mute), span("stage.run"):
        raise Mute
    assert heard[1].metadata["error_message"] == "<its str raised RuntimeError>"


def test_spans_nest_and_an_error_caught_between_them_fails_only_the_inner_one():
    heard = []
    with attached("test", "*", heard.append), span("workflow.run"):
        for fails in (True, False):
            try:
                with span("stage.run", {"fails": fails}):
                    assert not fails
            except AssertionError:
                emit("stage.retry", {"attempt": 1})
    assert list(map(name_of, heard)) == [
        "workflow.run.start",
        "stage.run.start",
        "stage.run.exception",
        "stage.retry",
        "stage.run.start",
        "stage.run.stop",
        "workflow.run.stop",
    ]


def test_spans_of_many_threads_each_keep_their_own_time_and_metadata():
    heard = []

    def work(n):
        with span("stage.run", {"n": n}) as more:
            time.sleep(0.01 * (n + 1))
            more["again"] = n

    with attached("test", "stage.run.stop", heard.append):
        in_threads(work, *range(8))
    assert sorted(event.metadata["n"] for event in heard) == list(range(8))
    for event in heard:
        assert event.metadata["again"] == event.metadata["n"]
        assert event.measurements["duration"] >= 0.01 * (event.metadata["n"] + 1)


def test_a_handler_that_raises_is_detached_reported_once_and_the_run_goes_on():
    heard = []
    attach("broken", "*", refuse)
    attach("whole", "*", heard.append)
    with pytest.warns(RuntimeWarning) as caught:
        emit("stage.retry")
    emit("stage.retry")  # a second warning would be an error
    emit("stage.retry")
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(
        "event handler 'broken' failed at 'stage.retry' and is detached; the run"
    )
    assert 'raise OSError("No space left' in text  # the traceback's text
    assert warning.filename == __file__
    assert len(heard) == 3
    detach("whole")
    assert not wanted("stage.retry")
    detach("broken")  # said once already, so that a `finally: detach(...)` breaks nothing
    with pytest.raises(ValueError, match="no handler 'broken'"):
        detach("broken")


def test_the_id_of_a_handler_that_raised_can_be_taken_again():
    attach("test", "*", refuse)
    with pytest.warns(RuntimeWarning, match="is detached"):
        emit("stage.retry")
    attach("test", "*", print)
    detach("test")
    with pytest.raises(ValueError, match="no handler 'test'"):  # the second one never raised
        detach("test")


def test_a_handler_that_raises_in_many_threads_is_reported_once():
    barrier = threading.Barrier(8)

    def refuse_together(event):
        barrier.wait(10)
        raise OSError("No space left on device")

    attach("broken", "*", refuse_together)
    with pytest.warns(RuntimeWarning) as caught:
        in_threads(emit, *["stage.retry"] * 8)
    assert len(caught) == 1


def test_the_failure_of_one_does_not_detach_another_of_its_id():
    def replace(event):
        detach("test")
        attach("test", "*", print)
        raise OSError("after it was replaced")

    attach("test", "stage.retry", replace)
    emit("stage.retry")  # without a warning: it is not attached any more
    assert wanted("eval.complete")
    detach("test")


def test_a_predicate_that_raises_is_reported_as_its_handler():
    attach("test", "*", print, where=lambda event: event.metadata["run_id"] == "x")
    with pytest.warns(RuntimeWarning, match="'test' failed at 'stage.retry'"):
        emit("stage.retry")
    assert not wanted("stage.retry")


def test_where_warnings_are_errors_all_hear_it_and_no_error_is_hidden():
    heard = []
    attach("broken", "stage.run.exception", refuse)
    attach("whole", "*", heard.append)
    with pytest.raises(ZeroDivisionError) as caught, span("stage.run"):
        raise ZeroDivisionError
    (note,) = caught.value.__notes__
    assert note.startswith("Telling it to 'stage.run.exception' failed too: event handler 'broken'")
    attach("broken", "stage.run.start", refuse)
    with pytest.raises(RuntimeWarning, match="'broken' failed"), span("stage.run"):
        raise AssertionError("it never gets here")
    detach("whole")
    assert list(map(name_of, heard)) == ["stage.run.start", "stage.run.exception"] * 2


def test_an_interrupt_in_a_handler_is_not_the_handlers_failure():
    def interrupted(event):
        raise KeyboardInterrupt

    with attached("test", "stage.retry", interrupted):
        with pytest.raises(KeyboardInterrupt):
            emit("stage.retry")
        assert wanted("stage.retry")


def test_a_handler_may_attach_and_detach():
    heard = []

    def once(event):
        detach("once")
        attach("next", "*", heard.append)

    attach("once", "*", once)
    emit("stage.retry")
    emit("eval.complete")
    detach("next")
    assert list(map(name_of, heard)) == ["eval.complete"]


def test_attaching_while_others_emit_loses_nothing_and_leaves_nothing():
    heard, done = [], threading.Event()

    def churn(n):
        while not done.is_set():
            with attached(f"churn {n}", "*", lambda event: None):
                pass

    threads = [threading.Thread(target=churn, args=(n,)) for n in range(3)]
    with attached("test", "training.metrics", heard.append):
        for thread in threads:
            thread.start()
        for step in range(5000):
            emit("training.metrics", {}, {"step": step})
        done.set()
        for thread in threads:
            thread.join(10)
    assert [event.metadata["step"] for event in heard] == list(range(5000))


def test_what_nobody_hears_costs_well_under_half_a_microsecond():
    number = 20_000
    measurements, metadata = {"loss": 1.0}, {"step": 1}
    with attached("test", "stage.run", print):  # somebody hears something else
        for call in (
            lambda: emit("training.metrics", measurements, metadata),
            lambda: wanted("training.metrics"),
            lambda: wanted("training.step"),
        ):
            assert min(timeit.repeat(call, number=number, repeat=20)) / number < 0.5e-6


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")


def strictly(line):
    def refuse_constant(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse_constant)


def test_a_line_is_one_event_with_its_time_and_all_it_carried(tmp_path):
    path = tmp_path / "deep" / "er" / "events.jsonl"
    log = JsonlEvents(path)
    with attached("log", "*", log):
        emit("eval.complete", {"loss": 2.0, "perplexity": 7.4}, {"step": 3})
        with span("stage.run", {"stage": "load"}):
            pass
    log.close()
    lines = [strictly(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == [
        "eval.complete",
        "stage.run.start",
        "stage.run.stop",
    ]
    assert list(lines[0]) == ["timestamp", "event", "measurements", "metadata"]
    assert lines[0]["measurements"] == {"loss": 2.0, "perplexity": 7.4}
    assert lines[0]["metadata"] == {"step": 3}
    for line in lines:
        assert line["timestamp"].endswith("+00:00")
        assert abs(datetime.fromisoformat(line["timestamp"]).timestamp() - time.time()) < 60


cycle: list = [1]
cycle.append(cycle)
deep: list = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        ({"a": [1, (2.5, None)], 3: True}, {"a": [1, [2.5, None]], "3": True}),
        (Path("runs/a"), "runs/a"),
        (ValueError("bad"), "ValueError('bad')"),
        ({"b"}, "{'b'}"),
        (b"\xff", "b'\\xff'"),
        (len, "<built-in function len>"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.float64("nan"), "NaN"),
        (np.longdouble(1.5), "np.longdouble('1.5')"),
        (jnp.float32(jnp.inf), "Infinity"),
        (jnp.int32(7), 7),
        (np.array([1, 2]), "array([1, 2])"),
        ("\ud800 é\n", "\ud800 é\n"),
        (10**5000, hex(10**5000)),
        (cycle, [1, "[1, [...]]"]),
        ({Unspeakable(): 1}, None),
        (Unspeakable(), "<Unspeakable: its repr raised RuntimeError>"),
        (deep, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_can_be_metadata_or_a_measurement(tmp_path, value, kept):
    path = tmp_path / "events.jsonl"
    log = JsonlEvents(path)
    with attached("log", "*", log):
        emit("stage.retry", {"value": value}, {"value": value, "after": 1})
        emit("stage.retry")
    log.close()
    first, _ = (strictly(line) for line in path.read_text().splitlines())
    assert first["metadata"]["after"] == 1
    if kept is not None:
        assert first["metadata"]["value"] == first["measurements"]["value"] == kept


def test_a_scalar_that_has_no_plain_form_is_asked_for_it_once(tmp_path):
    asked = []

    class Odd:
        shape = ()

        def item(self):
            asked.append(self)
            return self

    log = JsonlEvents(tmp_path / "events.jsonl")
    log(Event("stage.retry", {}, {"value": Odd()}, 0.0))
    log.close()
    assert len(asked) == 1


def test_a_line_is_one_write_that_needs_no_flush(tmp_path, monkeypatch):
    writes, write_ = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or write_(fd, data))
    log = JsonlEvents(tmp_path / "events.jsonl")
    for n in range(3):
        log(Event("stage.retry", {"attempt": n}, {}, 0.0))
        assert len(writes) == n + 1
        assert writes[-1].endswith(b"}\n")
        assert (tmp_path / "events.jsonl").read_bytes() == b"".join(writes)
    log.close()


def test_a_killed_program_loses_no_event(tmp_path):
    path = tmp_path / "events.jsonl"
    program = f"""
import os, signal
from crucible.telemetry import JsonlEvents, attach, emit
attach("log", "*", JsonlEvents({str(path)!r}))
for step in range(50):
    emit("training.metrics", {{"loss": 1.0}}, {{"step": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60).returncode
    assert ended == -signal.SIGKILL
    steps = [strictly(line)["metadata"]["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(50))


def test_the_lines_of_many_threads_and_of_two_logs_are_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    logs = [JsonlEvents(path), JsonlEvents(path)]

    def work(n):
        for step in range(200):
            emit("training.metrics", {}, {"n": n, "step": step, "text": "x" * (step * 7)})

    with attached("one", "*", logs[0]), attached("two", "*", logs[1]):
        in_threads(work, *range(4))
    for log in logs:
        log.close()
    seen = [strictly(line)["metadata"] for line in path.read_text().splitlines()]
    assert len(seen) == 1600
    assert {(m["n"], m["step"]) for m in seen} == {(n, s) for n in range(4) for s in range(200)}


def test_a_second_log_appends_and_a_torn_last_line_is_set_aside(tmp_path):
    path, aside = tmp_path / "events.jsonl", tmp_path / "events.jsonl.torn"
    for attempt in range(2):
        log = JsonlEvents(path)  # a warning would be an error
        log(Event("stage.retry", {"attempt": attempt}, {}, 0.0))
        log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"timestamp": "19')
    with pytest.warns(UserWarning, match=r"moved to .*events\.jsonl\.torn") as caught:
        log = JsonlEvents(path)
    assert caught[0].filename == __file__
    log.close()
    assert (path.read_bytes(), aside.read_bytes()) == (whole, b'{"timestamp": "19')
    assert [strictly(line)["measurements"]["attempt"] for line in whole.splitlines()] == [0, 1]


def test_a_closed_log_says_so_and_closes_again(tmp_path):
    log = JsonlEvents(tmp_path / "events.jsonl")
    log.close()
    log.close()
    with pytest.raises(ValueError, match=r"events\.jsonl is closed"):
        log(Event("stage.retry", {}, {}, 0.0))
