import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crucible import telemetry
from crucible.kitchen import (
    Context,
    Ledger,
    async_loop,
    compile,
    parallel,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    timeout,
    waiting,
)
from crucible.kitchen.ledger import current, unbooked, waited


@stage(host=True)
def nap():
    time.sleep(0.02)


@stage(host=True)
def nothing():
    pass


def test_calls_and_seconds_are_booked_by_stage():
    with Ledger("run").recording() as ledger:
        assert current() is ledger
        repeat(3, nothing, nap)(Context())
    assert current() is None
    assert (ledger.costs["nap"].calls, ledger.costs["nothing"].calls) == (3, 3)
    assert 0.06 <= ledger.costs["nap"].seconds < 1
    assert ledger.costs["nothing"].seconds < ledger.costs["nap"].seconds
    rows = ledger.table()
    assert [row["stage"] for row in rows] == ["nap", "nothing"]
    assert rows[0] == {
        "stage": "nap",
        "calls": 3,
        "seconds": ledger.costs["nap"].seconds,
        "waited": 0.0,
        "compiling": 0.0,
        "tokens": 0,
    }


def test_a_failed_call_is_booked_too():
    bad = stage(host=True)(lambda: 1 / 0)
    with Ledger().recording() as ledger, pytest.raises(ZeroDivisionError):
        bad(Context())
    assert ledger.costs["<lambda>"].calls == 1


def test_nothing_is_booked_without_a_ledger():
    ledger = Ledger()
    nap(Context())
    with ledger.recording():
        with unbooked():
            nap(Context())
            assert current() is None
        assert current() is ledger
    nap(Context())
    with waiting():
        pass
    waited(5.0)
    assert ledger.costs == {}


def test_waiting_is_booked_once_and_with_the_stage_that_waits():
    @stage(host=True)
    def outer():
        with waiting():
            time.sleep(0.02)
            with waiting():
                time.sleep(0.02)
            waited(100.0)  # part of it
        time.sleep(0.02)
        nap(Context())
        waited(0.001)

    @stage(host=True)
    def fails():
        with waiting():
            time.sleep(0.02)
            raise LookupError

    with Ledger().recording() as ledger:
        outer(Context())
        with pytest.raises(LookupError):
            fails(Context())
    cost = ledger.costs["outer"]
    assert 0.041 <= cost.waited <= cost.seconds - 0.039
    assert ledger.costs["nap"].waited == 0
    assert 0.02 <= ledger.costs["fails"].waited <= ledger.costs["fails"].seconds


def test_a_compilation_within_a_stage_is_booked_with_it():
    @jax.jit
    def cube(x):
        return x * x * x

    @stage("y", host=True)
    def outer(x):
        return inner(Context(x=x))["z"]

    @stage("z", host=True)
    def inner(x):
        return cube(x)

    x = jnp.arange(7.0)
    with Ledger().recording() as ledger:
        sequence(nothing, outer, outer)(Context(x=x))
        outer(Context(x=jnp.arange(8.0)))
        jax.jit(lambda x: x - 1)(x)  # by no stage
    compiled = [(c.stage, c.function) for c in ledger.compiles]
    assert compiled == [("inner", "cube"), ("inner", "cube")]
    cost = ledger.costs["inner"]
    assert 0 < cost.compiling <= cost.seconds
    assert cost.compiling == pytest.approx(sum(c.seconds for c in ledger.compiles))
    assert ledger.costs["outer"].compiling == ledger.costs["nothing"].compiling == 0
    assert all(c.changed == () for c in ledger.compiles)


def test_a_compilation_takes_its_tracing_and_lowering_too():
    @jax.jit
    def slow_to_trace(x):
        time.sleep(0.2)
        return x + 1

    call = stage("y", host=True)(lambda x: slow_to_trace(x))
    x = jnp.arange(3.0)
    with Ledger().recording() as ledger:
        call(Context(x=x))
    assert 0.2 <= ledger.compiles[0].seconds <= ledger.costs["<lambda>"].seconds


def test_a_program_says_what_made_it_compile_again():
    double = stage("x")(lambda x: 2 * x)
    workflow = compile(double)
    with Ledger().recording() as ledger:
        for size in (3, 3, 4):
            workflow(Context(x=jnp.zeros(size)))
    changes = [c.changed for c in ledger.compiles if c.stage == "<lambda>"]
    assert changes == [(), ("x was float32[3], is float32[4]",)]
    assert ledger.costs["<lambda>"].calls == 3


def test_tokens_of_batches_are_counted():
    read = stage(host=True)(lambda batch: None)
    with Ledger().recording() as ledger:
        for tokens in (np.zeros((2, 5)), jnp.zeros((3, 5)), [1, 2], None):
            read(Context(batch={"tokens": tokens}))
        read(Context(batch="text"))
    assert ledger.costs["<lambda>"].tokens == 25


def test_stages_in_threads_are_booked_to_the_run_that_started_them():
    together = threading.Barrier(8, timeout=10)
    meet = stage(host=True)(together.wait)
    make = stage("sample", host=True)(lambda: 0)
    with Ledger().recording() as ledger:
        parallel(*[meet] * 8)(Context())
        timeout(nothing, 10)(Context())
        async_loop(make, nap, stop_when=lambda step: step >= 2, buffer_size=1)(Context())
        stream(lambda: (nothing(Context()) for _ in range(2)), nap)(Context())
    assert ledger.costs["wait"].calls == 8
    assert ledger.costs["nothing"].calls == 3
    assert ledger.costs["nap"].calls == 4
    assert ledger.costs["<lambda>"].calls >= 2


def test_two_ledgers_do_not_mix():
    both = threading.Barrier(2, timeout=10)
    ledgers = [Ledger("first"), Ledger("second")]
    x = jnp.arange(5.0)

    def work(ledger, times):
        @stage("y", host=True)
        def compute(x):
            both.wait()
            return jax.jit(lambda x: x * times)(x)

        with ledger.recording():
            repeat(times, nothing)(Context())
            compute(Context(x=x))

    threads = [threading.Thread(target=work, args=(ledgers[i], i + 2)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ledger.costs["nothing"].calls for ledger in ledgers] == [2, 3]
    assert [len(ledger.compiles) for ledger in ledgers] == [1, 1]


def test_a_ledger_within_another_takes_over_until_it_ends():
    outer, inner = Ledger(), Ledger()
    with outer.recording():
        with inner.recording():
            nothing(Context())
        nap(Context())
    assert (list(outer.costs), list(inner.costs)) == (["nap"], ["nothing"])


def test_a_ledger_stops_listening_when_it_ends(monkeypatch):
    listeners = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    monkeypatch.setattr(jax.monitoring, "unregister_event_duration_listener", listeners.remove)
    with Ledger().recording():
        assert len(listeners) == 1
    assert listeners == []
    bad = stage(host=True)(lambda: {}["key"])
    with pytest.raises(KeyError), Ledger().recording():
        bad(Context())
    assert listeners == []
    assert current() is None


def test_every_run_of_a_stage_is_told_to_who_listens():
    told = []
    bad = stage(host=True)(lambda: 1 / 0)
    with telemetry.attached("test", "stage.run", told.append), Ledger("run 7").recording():
        nap(Context())
        with pytest.raises(ZeroDivisionError):
            bad(Context())
    names = [(event.name, event.metadata["stage"]) for event in told]
    assert names == [
        ("stage.run.start", "nap"),
        ("stage.run.stop", "nap"),
        ("stage.run.start", "<lambda>"),
        ("stage.run.exception", "<lambda>"),
    ]
    assert 0.02 <= told[1].measurements["duration"] < 1
    assert told[3].metadata["error_type"] == "ZeroDivisionError"
    for event in told:
        assert event.metadata["module"] == __name__
        assert event.metadata["run_id"] == "run 7"


def test_events_of_loops_and_tries_say_which_run_they_are_of():
    told = []
    answers = iter([OSError("busy"), 1])

    @stage("answer", host=True)
    def ask():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    events = ("stage.retry", "training.step.stop")
    with telemetry.attached("test", events, told.append), Ledger("run 7").recording():
        repeat(1, retry(ask, backoff=0.0))(Context())
    assert [event.name for event in told] == list(events)
    assert [event.metadata["run_id"] for event in told] == ["run 7", "run 7"]


def test_a_wait_between_tries_is_not_the_next_stages():
    flaky = iter([OSError("busy"), None])

    @stage(host=True)
    def ask():
        error = next(flaky)
        if error:
            raise error

    with Ledger().recording() as ledger:
        retry(ask, backoff=0.02)(Context())
    assert ledger.costs["ask"].waited == 0
    assert ledger.costs["ask"].calls == 2
