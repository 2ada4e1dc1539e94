import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import jax.numpy as jnp
import pytest

from crucible import telemetry
from crucible.kitchen import (
    Context,
    async_loop,
    check,
    compile,
    ensure,
    every,
    parallel,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    timeout,
    when,
)


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def undone():
    return []


@pytest.fixture
def step(undone):
    """Makes a stage that can be undone: it gives its name."""

    def make(name, **options):
        def fn():
            return name

        fn.__name__ = name
        return stage(name, host=True, rollback=lambda: undone.append(name), **options)(fn)

    return make


@stage(host=True)
def fail():
    raise OSError("broken")


def noted(error, text):
    return [note for note in error.__notes__ if text in note]


def test_what_was_completed_is_rolled_back_last_first(step, undone):
    with pytest.raises(OSError, match="broken"):
        sequence(step("a"), step("b"), step("c"), fail, step("d"))(Context())
    assert undone == ["c", "b", "a"]


def test_nothing_is_rolled_back_on_success(step, undone):
    assert sequence(step("a"), repeat(2, step("b")), ensure(step("c"), step("d")))(Context())
    parallel(step("e"), step("f"))(Context())
    timeout(step("g"), 10)(Context())
    assert undone == []


def test_the_stage_that_failed_is_not_rolled_back_itself(undone):
    half = stage("x", host=True, rollback=lambda: undone.append("half"))(lambda: 1 / 0)
    wrong = stage("x", "y", host=True, rollback=lambda: undone.append("wrong"))(lambda: 1)
    with pytest.raises(ZeroDivisionError):
        sequence(half)(Context())
    with pytest.raises(TypeError, match="gives x, y, but returned"):
        sequence(wrong)(Context())
    assert undone == []


def test_a_nested_scope_is_rolled_back_with_the_one_around_it(step, undone):
    inner = sequence(step("b"), when(True, step("c")), every(1, step("d")))
    with pytest.raises(OSError, match="broken"):
        sequence(step("a"), inner, timeout(step("e"), 10), fail)(Context())
    assert undone == ["e", "d", "c", "b", "a"]
    undone.clear()
    with pytest.raises(OSError, match="broken"):
        sequence(sequence(every(1, step("f"))), fail)(Context())
    assert undone == ["f"]


def test_turns_that_were_completed_stay(step, undone):
    last = when(lambda step: step == 2, fail)
    with pytest.raises(OSError, match="broken"):
        sequence(step("a"), repeat(5, step("b"), last))(Context())
    assert undone == ["b", "a"]
    undone.clear()
    with pytest.raises(OSError, match="broken"):
        sequence(step("a"), repeat(2, step("b")), step("c"), fail)(Context())
    assert undone == ["c", "a"]


@pytest.mark.parametrize("kind", ["stream", "async_loop"])
def test_turns_of_lazy_loops_that_were_completed_stay(step, undone, kind):
    last = when(lambda i: i == 2, fail)
    produce = stage("item", host=True)(lambda: 0)
    loop = {
        "stream": stream(lambda: range(9), step("b"), last, index="i"),
        "async_loop": async_loop(
            produce, step("b"), last, stop_when=lambda i: i > 9, index="i", buffer_size=1
        ),
    }[kind]
    with pytest.raises(OSError, match="broken"):
        sequence(step("a"), loop)(Context())
    assert undone == ["b", "a"]


def test_what_a_producer_completed_stays(step, undone):
    make = sequence(step("b"), stage("item", host=True)(lambda index: index))
    ended = async_loop(
        make, stage(host=True)(lambda item: None), stop_when=lambda index: index == 2, index="index"
    )
    with pytest.raises(OSError, match="broken"):
        sequence(step("a"), ended, fail)(Context())
    assert undone == ["a"]
    undone.clear()
    failing = sequence(step("b"), when(lambda index: index == 1, fail), make)
    with pytest.raises(OSError, match="broken"):
        async_loop(failing, fail, stop_when=lambda index: index > 5, index="index")(Context())
    assert undone in ([], ["b"])  # the producer may not have come to its second item
    undone.clear()
    idle = stage(host=True)(lambda: None)
    with pytest.raises(OSError, match="broken"):
        async_loop(failing, idle, stop_when=lambda index: index > 5, index="index")(Context())
    assert undone == ["b"]


def test_a_rollback_finds_the_context_as_it_was_then_and_the_error():
    found = []

    def undo(x, error, y=None, z=0):
        found.append((x, error, y, z))

    give = stage("x", host=True, rollback=undo)(lambda: "then")
    later = stage("x", "y", host=True)(lambda: ("later", 1))
    with pytest.raises(OSError, match="broken") as caught:
        sequence(give, later, fail)(Context(z=3))
    assert found == [("then", caught.value, None, 3)]


def test_a_rollback_that_fails_becomes_a_note_and_the_others_still_run(undone):
    def bad(missing):
        raise AssertionError

    def worse():
        raise ValueError("worse")

    stages = [
        stage("a", host=True, rollback=lambda: undone.append("a"))(lambda: 1),
        stage("b", host=True, rollback=bad)(lambda: 1),
        stage("c", host=True, rollback=worse)(lambda: 1),
        stage("d", host=True, rollback=lambda: undone.append("d"))(lambda: 1),
    ]
    with pytest.raises(OSError, match="broken") as caught:
        sequence(*stages, fail).run(Context())
    assert undone == ["d", "a"]
    first, second = noted(caught.value, "failed too")
    assert "ValueError('worse')" in first
    assert "The rollback of '<lambda>' needs 'missing'" in second


def test_a_rollback_that_would_not_find_what_it_needs_is_refused():
    give = stage("x", host=True, rollback=lambda x, error, path, z=0: None)(lambda: 1)
    workflow = repeat(2, give)
    assert workflow.needs == ("path",)
    with pytest.raises(ValueError, match="The rollback of '<lambda>' needs 'path', which nothing"):
        check(workflow, given=())
    check(sequence(stage("path", host=True)(lambda: "p"), workflow), given=())


def test_a_stage_that_is_alone_has_no_scope_to_fail(step, undone):
    context = step("a")(Context())
    with pytest.raises(OSError, match="broken"):
        sequence(fail)(context)
    with pytest.raises(OSError, match="broken"):
        sequence(step("b"), fail)(context)
    assert undone == ["b"]  # and nothing of the run before


def test_what_was_completed_is_let_go_when_the_run_ends(step):
    class Big:
        pass

    big = Big()
    held = weakref.ref(big)
    sequence(step("a"), stage("b", host=True, rollback=lambda: None)(lambda: 1))(Context(big=big))
    step("c")(Context(big=big))
    del big
    gc.collect()
    assert held() is None


def test_scopes_in_threads_are_apart(step, undone):
    """A branch that fails rolls back its own first, then the others, in reverse of completion."""
    order = {"b": threading.Event(), "c": threading.Event()}

    def after(name, event):
        def fn(x=None):
            assert event is None or event.wait(10)
            return name

        made = stage(name, host=True, rollback=lambda: undone.append(name))(fn)
        return sequence(
            made, stage(host=True)(lambda: order[name].set() if name in order else None)
        )

    slow, quick = after("a", order["b"]), after("b", order["c"])
    branch = sequence(after("c", None), stage(host=True)(lambda: order["b"].wait(10)))
    bad = stage(host=True)(lambda: (order["b"].wait(10), time.sleep(0.05), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        sequence(step("first"), parallel(slow, quick, branch, bad))(Context())
    assert undone == ["a", "b", "c", "first"]
    undone.clear()
    for event in order.values():
        event.clear()
    with pytest.raises(OSError, match="broken"):
        sequence(step("first"), parallel(slow, quick, branch), fail)(Context())
    assert undone == ["a", "b", "c", "first"]


def test_a_device_stage_is_rolled_back_in_a_compiled_workflow_too(undone):
    double = stage("x", rollback=lambda x: undone.append(float(x)))(lambda x: 2 * x)
    with pytest.raises(OSError, match="broken"):
        compile(sequence(double, double, fail))(Context(x=jnp.float32(3)))
    assert undone == [12.0, 6.0]


def test_ctrl_c_does_not_stop_a_rollback(undone):
    def undo(name):
        if name == "b":
            signal.raise_signal(signal.SIGINT)
        undone.append(name)

    a = stage("a", host=True, rollback=lambda: undo("a"))(lambda: 1)
    b = stage("b", host=True, rollback=lambda: undo("b"))(lambda: 1)
    seen = []
    look = stage(host=True)(lambda a=None, b=None: seen.append((a, b)))
    with pytest.raises(KeyboardInterrupt):
        ensure(sequence(a, b, fail), look)(Context())
    assert undone == ["b", "a"]
    assert seen == [(1, 1)]


def test_a_cleanup_runs_after_success_and_gives():
    close = stage("file", host=True)(lambda file=None: f"{file} closed")
    work = stage("file", host=True)(lambda: "open")
    assert ensure(work, close)(Context())["file"] == "open closed"


@pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_a_cleanup_runs_whatever_happens(error):
    seen = []

    @stage(host=True)
    def bad():
        raise error

    look = stage(host=True)(lambda x=None: seen.append(x))
    with pytest.raises(type(error)):
        ensure(sequence(stage("x")(lambda: 1), bad), look)(Context())
    with pytest.raises(type(error)):
        ensure(bad, look)(Context(x=0))
    assert seen == [1, 0]


def boom(x=0):
    raise OSError("broken")


@stage("item", host=True)
def boom_stage():
    raise OSError("broken")


@pytest.mark.parametrize(
    ("bad", "last"),
    [
        (when(boom, fail), 1),
        (repeat(boom, fail), 1),
        (repeat(fail, over=boom), 1),
        (stream(boom, fail), 1),
        (parallel(fail, max_concurrency=boom), 1),
        (repeat(3, stage("x")(lambda x: x + 1), when(lambda step: step == 2 and boom(), fail)), 4),
        (stream(lambda: (3 // (2 - i) for i in range(9)), stage("x")(lambda x: x + 1)), 3),
        (async_loop(boom_stage, fail, stop_when=lambda n: False), 1),
        (timeout(stage(host=True)(lambda: time.sleep(1)), 0.01), 1),
        (parallel(sequence(stage("x")(lambda x: x + 1), fail)), 2),
        (retry(sequence(stage("x", host=True)(lambda x: x + 1), fail), backoff=0.0), 2),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_cleanup_finds_the_context_as_far_as_it_came(bad, last):
    seen = []
    look = stage(host=True)(lambda x: seen.append(x))
    with pytest.raises((OSError, ZeroDivisionError)):
        ensure(sequence(stage("x", host=True)(lambda: 1), bad), look)(Context(x=0, n=0))
    assert seen == [last]


def test_a_cleanup_after_ctrl_c_between_two_turns_finds_what_the_first_gave():
    def interrupt(event):
        if event.metadata["step"] == 2:
            raise KeyboardInterrupt

    seen = []
    look = stage(host=True)(lambda x: seen.append(x))
    loop = repeat(4, stage("x", host=True)(lambda x: x + 1))
    with (
        telemetry.attached("test", "training.step.start", interrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        ensure(loop, look)(Context(x=0))
    assert seen == [2]


def test_a_cleanup_after_an_error_of_the_producer_finds_what_the_loop_had():
    seen = []

    @stage("item", host=True)
    def make(x, step):
        if step == 2:
            raise OSError("broken")
        return step

    learn = stage("x", host=True)(lambda x, item: x + 1)
    look = stage(host=True)(lambda x, step: seen.append((x, step)))
    loop = async_loop(make, learn, stop_when=lambda step: False, buffer_size=8)
    with pytest.raises(OSError, match="broken"):
        ensure(sequence(stage("step", host=True)(lambda: -1), loop), look).run(Context(x=0))
    assert seen == [(2, 1)]


def test_a_rollback_comes_before_the_cleanup(step, undone):
    close = stage(host=True)(lambda: undone.append("close"))
    with pytest.raises(OSError, match="broken"):
        ensure(sequence(step("a"), fail), close)(Context())
    assert undone == ["a", "close"]


def test_a_cleanup_that_fails_becomes_a_note_on_the_error_before_it():
    bad = stage("x", host=True)(lambda: 1 / 0)
    with pytest.raises(OSError, match="broken") as caught:
        ensure(fail, bad)(Context())
    assert noted(caught.value, "The cleanup <lambda> failed too: ZeroDivisionError")
    with pytest.raises(ZeroDivisionError) as caught:
        ensure(stage("x")(lambda: 1), bad)(Context())
    assert caught.value.__notes__ == ["In stage '<lambda>'."]


def test_a_cleanup_runs_once_though_it_fails():
    ran = []

    @stage(host=True)
    def close():
        ran.append(1)
        raise OSError("cannot close")

    with pytest.raises(OSError, match="cannot close"):
        ensure(stage("x")(lambda: 1), close)(Context())
    assert ran == [1]


def test_ctrl_c_during_a_cleanup_waits_for_its_end():
    ran = []

    @stage(host=True)
    def close():
        signal.raise_signal(signal.SIGINT)
        ran.append("closed")

    @stage(host=True)
    def close_badly():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("cannot close")

    for body in (stage("x")(lambda: 1), fail):
        with pytest.raises(KeyboardInterrupt):
            ensure(body, close)(Context())
    assert ran == ["closed", "closed"]
    seen, give = [], stage("x", host=True)(lambda: 1)
    look = stage(host=True)(lambda x=None: seen.append(x))
    for body in (give, sequence(give, fail)):
        with pytest.raises(KeyboardInterrupt):
            ensure(sequence(ensure(body, close)), look)(Context())
    assert seen == [1, 1]
    with pytest.raises(KeyboardInterrupt) as caught:  # not lost with the cleanup's error
        ensure(fail, close_badly)(Context())
    assert noted(caught.value.__context__, "cannot close")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


PROGRAM = """
import signal, time
from crucible.kitchen import Context, ensure, repeat, sequence, stage

signal.signal(signal.SIGINT, signal.default_int_handler)
say = lambda word: print(word, flush=True)

@stage("lock", host=True)
def take():
    say("taken")
    return 1

@stage(host=True)
def work(step):
    say("working")
    time.sleep({work})

@stage(host=True)
def release(lock=None):
    say("releasing")
    time.sleep({cleanup})
    say(f"released {{lock}}")

ensure(sequence(take, repeat({turns}, work)), release)(Context())
say("not reached")
"""


@pytest.mark.parametrize(
    ("word", "turns", "work", "cleanup"), [("working", 3, 30, 0), ("releasing", 0, 0, 0.5)]
)
def test_a_real_ctrl_c_leaves_nothing_undone(word, turns, work, cleanup):
    program = PROGRAM.format(turns=turns, work=work, cleanup=cleanup)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if said[-1] == word:
                process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert said == ["taken", *["working"] * (turns > 0), "releasing", "released 1"]
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0
    assert ("At step 0 of 3." in errors) == (turns > 0)


class Flaky:
    """Fails a number of times."""

    def __init__(self, times, error=OSError):
        self.times, self.error, self.calls = times, error, 0

    def __call__(self, x=0):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error(f"no {self.calls}")
        return self.calls


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def test_a_stage_is_tried_again_after_doubling_waits(slept, capsys):
    flaky = Flaky(3)
    ask = retry(stage("answer", host=True)(flaky), attempts=4, backoff=0.5)
    assert ask(Context())["answer"] == 4
    assert slept == [0.5, 1.0, 2.0]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("Stage 'Flaky' failed: OSError: no 1. Trying again (2 of 4) in 0.5 s.")
    assert len(said) == 3


def test_the_last_error_goes_on_with_the_number_of_tries(slept):
    flaky = Flaky(5)
    with pytest.raises(OSError, match="no 3") as caught:
        repeat(1, retry(stage("answer", host=True)(flaky)))(Context())
    assert (flaky.calls, slept) == (3, [1.0, 2.0])
    notes = ["In stage 'Flaky'.", "Tried 3 times.", "At step 0 of 1."]
    assert caught.value.__notes__ == notes
    with pytest.raises(OSError, match="no 1") as caught:
        retry(stage("answer", host=True)(Flaky(1)), attempts=1)(Context())
    assert "Tried 1 time." in caught.value.__notes__
    assert slept == [1.0, 2.0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_other_errors_are_not_tried_again(slept, error):
    flaky = Flaky(1, error)
    with pytest.raises(error) as caught:
        retry(stage("answer", host=True)(flaky))(Context())
    assert (flaky.calls, slept) == (1, [])
    assert not noted(caught.value, "Tried")


def test_the_errors_to_try_again_after_are_chosen(slept):
    flaky = stage("answer", host=True)(Flaky(1, KeyError))
    assert retry(flaky, on=(ValueError, LookupError))(Context())["answer"] == 2
    flaky = stage("answer", host=True)(Flaky(1, ValueError))
    assert retry(flaky, on=ValueError)(Context())["answer"] == 2


def test_each_try_starts_from_the_same_context_after_a_rollback(slept, step, undone):
    seen, flaky = [], Flaky(2)
    look = stage(host=True)(lambda a=None, b=None: seen.append((a, b)))
    work = retry(sequence(look, step("a"), step("b"), stage("c", host=True)(flaky)))
    assert sequence(step("first"), work)(Context())["c"] == 3
    assert seen == [(None, None)] * 3
    assert undone == ["b", "a", "b", "a"]
    undone.clear()
    close = stage("c", host=True)(Flaky(1))
    assert retry(ensure(step("a"), close))(Context())["c"] == 2
    assert undone == ["a"]
    undone.clear()
    with pytest.raises(OSError, match="broken"):
        sequence(step("first"), retry(step("a")), fail)(Context())
    assert undone == ["a", "first"]


def test_every_try_is_told_to_who_listens(slept):
    told = []
    with telemetry.attached("test", "stage.retry", told.append):
        retry(stage("answer", host=True)(Flaky(2)))(Context())
    assert [event.measurements for event in told] == [{"attempt": 1}, {"attempt": 2}]
    assert [event.metadata["stage"] for event in told] == ["Flaky", "Flaky"]
    assert told[1].metadata["error"] == "OSError('no 2')"


def test_only_host_stages_can_be_tried_again():
    device = stage("x")(lambda x: x)
    with pytest.raises(
        ValueError, match=r"retry is for host stages, but '<lambda>' runs on the dev"
    ):
        retry(sequence(fail, device))


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"attempts": 1.5}, {"backoff": -1.0}])
def test_numbers_of_tries_and_seconds_are_checked(wrong):
    with pytest.raises(ValueError, match="at least 1 and 0 s"):
        retry(fail, **wrong)


@pytest.mark.parametrize("on", [KeyboardInterrupt, (OSError, SystemExit), "OSError", [OSError]])
def test_what_is_not_a_kind_of_exception_is_refused(on):
    with pytest.raises(TypeError, match="name kinds of Exception"):
        retry(fail, on=on)
