import itertools
import signal
import threading
import time

import jax.numpy as jnp
import pytest

from crucible.kitchen import (
    Context,
    Ledger,
    async_loop,
    parallel,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    timeout,
    when,
)
from crucible.kitchen import producer as producers
from crucible.metrics import Mean

SOON = 10.0  # seconds within which what must happen has happened


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    assert left == []


def interrupt():
    """A real Ctrl-C, for the main thread."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@stage(host=True)
def nothing():
    pass


def give(name, value=None):
    return stage(name, host=True)(lambda: name if value is None else value)


def in_notes(error, text):
    return [note for note in getattr(error, "__notes__", ()) if text in note]


# parallel


def test_branches_run_at_the_same_time():
    barrier = threading.Barrier(3, timeout=SOON)
    meet = [stage(name, host=True)(lambda: barrier.wait() * 0 + 1) for name in "abc"]
    after = parallel(*meet)(Context())
    assert [after[name] for name in "abc"] == [1, 1, 1]


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("form", [lambda n: n, lambda n: lambda limit: limit])
def test_no_more_branches_run_at_a_time_than_are_allowed(limit, form):
    running, most, lock = 0, 0, threading.Lock()
    full = threading.Barrier(limit, timeout=SOON)

    @stage(host=True)
    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        full.wait()  # six are a multiple of 1, 2 and 3
        time.sleep(0.005)
        with lock:
            running -= 1

    parallel(*[work] * 6, max_concurrency=form(limit))(Context(limit=limit))
    assert most == limit


def test_a_limit_below_one_is_refused():
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            parallel(nothing, max_concurrency=wrong)
        with pytest.raises(ValueError, match=f"max_concurrency={wrong} must be at least 1"):
            parallel(nothing, max_concurrency=lambda n: n)(Context(n=wrong))
    assert parallel(nothing, max_concurrency=lambda: None)(Context(x=1))["x"] == 1
    assert dict(parallel()(Context(x=1))) == {"x": 1}


def test_every_branch_starts_from_the_same_context():
    found = []

    @stage("a", "shared", host=True)
    def change(shared):
        shared_before = shared
        return shared_before + 1, shared_before + 1

    @stage("b", host=True)
    def look(shared, a=None):
        found.append((shared, a))
        return 0

    both = parallel(change, look, max_concurrency=1)
    assert (both.needs, both.gives) == (("shared",), ("a", "shared", "b"))
    after = both(Context(shared=1, other="kept"))
    assert found == [(1, None)]
    assert dict(after) == {"a": 2, "shared": 2, "b": 0, "other": "kept"}


def test_only_what_is_declared_is_put_together():
    """A branch that did not run its condition leaves what there was."""
    maybe = when(lambda on: on, give("x", "new"))
    for on, x in ((True, "new"), (False, "old")):
        both = parallel(maybe, give("y"))
        assert parallel(both)(Context(on=on, x="old"))["x"] == x
    assert both.gives == ("y",)
    assert "x" not in both(Context(on=False))


def test_two_givers_of_a_name_are_refused():
    clash = give("x")
    with pytest.raises(ValueError, match=r"<lambda> and sequence\(.*both give 'x'.*Rename one"):
        parallel(give("x"), give("y"), sequence(give("x")))
    with pytest.raises(ValueError, match="both give 'x'"):
        parallel(give("x"), when(lambda on: on, give("x")))
    assert parallel(give("x"), when(False, clash))(Context())["x"] == "x"


@pytest.mark.parametrize(
    ("loop", "name"),
    [
        (lambda **names: repeat(2, nothing, **names), "step"),
        (lambda **names: repeat(lambda n: n, nothing, **names), "step"),
        (lambda **names: repeat(nothing, over=[1], item=f"{names}", **names), "index"),
        (lambda **names: repeat(nothing, over=[1], index=f"{names}"), "item"),
        (lambda **names: stream([1], nothing, item=f"{names}", **names), "index"),
        (lambda **names: stream([1], nothing, index=f"{names}"), "item"),
    ],
)
def test_two_loops_of_one_name_are_refused(loop, name):
    with pytest.raises(ValueError, match=f"both give '{name}'.*with index="):
        parallel(loop(), sequence(loop()))
    if name in ("step", "index"):
        after = parallel(loop(), loop(index="other"))(Context(n=2))
        assert {name, "other"} <= set(after)
    parallel(repeat(0, nothing), repeat(2, nothing))  # the first does not run


def test_two_asynchronous_loops_of_one_version_are_refused():
    def loop(i, version):
        return async_loop(
            give(f"s{i}"), nothing, stop_when=lambda: True, index=f"i{i}", version=version
        )

    with pytest.raises(ValueError, match="both give 'version'"):
        parallel(loop(0, "version"), loop(1, "version"))
    parallel(loop(0, "version"), loop(1, "other"))


def test_metrics_of_branches_add():
    left = {"loss": Mean(jnp.float32(1), jnp.float32(2)), "only": {"left": 3, "same": 1}}
    right = {"loss": Mean(jnp.float32(10), jnp.float32(20)), "only": {"same": 5}, "right": 7}
    after = parallel(give("metrics", left), give("metrics", right), nothing)(Context(metrics={}))
    metrics = after["metrics"]
    assert (float(metrics["loss"].total), float(metrics["loss"].weight)) == (11, 22)
    assert metrics["only"] == {"left": 3, "same": 6}
    assert metrics["right"] == 7
    third = parallel(*[give("metrics", {"n": n}) for n in (1, 10, 100)])
    assert third(Context())["metrics"] == {"n": 111}
    quiet = parallel(nothing, when(lambda: False, give("metrics", {"n": 1})))
    assert quiet(Context(metrics={"n": 5}))["metrics"] == {"n": 5}


def test_the_first_error_in_the_order_of_the_branches_goes_on():
    second_failed = threading.Event()

    @stage(host=True)
    def first():
        assert second_failed.wait(SOON)
        raise ValueError("first")

    @stage(host=True)
    def second():
        second_failed.set()
        raise OSError("second")

    with pytest.raises(ValueError, match="first") as caught:
        repeat(1, parallel(nothing, first, second))(Context())
    assert caught.value.__notes__ == ["In stage 'first'.", "At step 0 of 1."]


def test_branches_that_have_not_begun_do_not_begin():
    ran = []

    @stage(host=True)
    def bad():
        raise OSError("broken")

    for limit in (1, 2):
        others = [stage(host=True)(lambda i=i: ran.append(i)) for i in range(50)]
        first = bad if limit == 1 else sequence(bad)
        with pytest.raises(OSError, match="broken"):
            parallel(*[first] * limit, *others, max_concurrency=limit)(Context())
        assert ran == []


def test_those_that_run_are_waited_for():
    ended, both_began = [], threading.Barrier(2, timeout=SOON)

    @stage(host=True)
    def bad():
        both_began.wait()
        raise OSError("broken")

    @stage(host=True)
    def slow():
        both_began.wait()
        time.sleep(0.05)
        ended.append(1)

    with pytest.raises(OSError, match="broken"):
        parallel(bad, slow)(Context())
    assert ended == [1]


def test_completed_branches_are_rolled_back():
    undone, done = [], threading.Event()

    @stage(host=True)
    def bad():
        assert done.wait(SOON)
        raise OSError("broken")

    good = stage("x", host=True, rollback=lambda x, error: undone.append((x, str(error))))(
        lambda: 1
    )
    told = stage(host=True)(done.set)
    with pytest.raises(OSError, match="broken"):
        parallel(bad, sequence(good, told))(Context())
    assert undone == [(1, "broken")]


def test_ctrl_c_stops_branches_and_rolls_back_those_that_were_completed():
    undone, ran, done = [], [], threading.Event()
    good = stage("x", host=True, rollback=lambda x: undone.append(x))(lambda: 1)

    @stage(host=True)
    def waits():
        assert done.wait(SOON)
        time.sleep(0.02)  # until the other worker has begun the third branch
        interrupt()
        time.sleep(0.05)
        ran.append("waits")

    third = stage(host=True)(lambda: time.sleep(0.1))
    last = stage(host=True)(lambda: ran.append("last"))
    told = stage(host=True)(done.set)
    branches = (waits, sequence(good, told), third, last)
    with pytest.raises(KeyboardInterrupt) as caught:
        repeat(1, parallel(*branches, max_concurrency=2))(Context())
    assert (undone, ran) == ([1], ["waits"])
    assert caught.value.__notes__ == ["At step 0 of 1."]


def test_branches_book_their_costs_to_the_run_that_started_them():
    with Ledger().recording() as ledger:
        parallel(nothing, nothing)(Context())
        stream([1, 2], nothing)(Context())
        timeout(nothing, SOON)(Context())
    assert ledger.costs["nothing"].calls == 5


# stream


def consume(into):
    return stage(host=True)(lambda index, item: into.append((index, item)))


def test_a_stream_is_lazy_and_may_be_endless():
    made, used = [], []

    def count():
        for number in itertools.count():
            made.append(number)
            yield number * number

    stop = when(lambda index: index == 3, stage(host=True)(lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError) as caught:
        stream(count, consume(used), stop)(Context())
    assert used == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert caught.value.__notes__ == ["In stage '<lambda>'.", "At index 3."]
    assert len(made) <= 3 + 1 + 2


def test_a_stream_ends_with_its_source_and_gives_its_last_item():
    used = []
    after = stream([5, 6], consume(used), item="item")(Context())
    assert used == [(0, 5), (1, 6)]
    assert (after["index"], after["item"]) == (1, 6)
    assert dict(stream([], nothing)(Context(x=1))) == {"x": 1}
    renamed = stage("seen")(lambda seen, number, line: (*seen, (number, line)))
    loop = stream(lambda lines: iter(lines), renamed, item="line", index="number")
    assert loop.needs == ("lines", "seen")
    assert loop(Context(seen=(), lines=["a"]))["seen"] == ((0, "a"),)


def test_a_stream_can_be_run_again():
    used = []
    loop = stream(lambda: (i for i in range(2)), consume(used))
    loop(Context())
    loop(Context())
    assert used == [(0, 0), (1, 1)] * 2


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_no_more_items_are_made_ahead_than_are_wanted(prefetch):
    begun, ahead = 0, []
    enough = threading.Semaphore(0)

    def source():
        nonlocal begun
        for number in range(12):
            begun += 1
            enough.release()
            yield number

    @stage(host=True)
    def work(index):
        for _ in range(1 if index else prefetch + 1):  # as far ahead as it may
            if begun < 12:
                assert enough.acquire(timeout=SOON)
        time.sleep(0.01)
        ahead.append(begun - (index + 1))

    stream(source, work, prefetch=prefetch)(Context())
    assert len(ahead) == 12
    assert max(ahead) == prefetch


def test_items_are_made_while_the_body_runs():
    second_began = threading.Event()

    def source():
        yield 0
        second_began.set()
        yield 1

    @stage(host=True)
    def work(item):
        assert second_began.wait(SOON)

    stream(source, work, prefetch=1)(Context())


def test_the_items_are_made_in_another_thread():
    threads = set()

    def source():
        threads.add(threading.current_thread().name)
        yield 1

    stream(source, nothing)(Context())
    assert len(threads) == 1
    assert threads.pop().startswith("stream source")


def test_an_error_of_the_source_is_raised_where_its_item_would_have_come():
    used = []

    def source():
        yield "a"
        yield "b"
        raise OSError("torn")

    with pytest.raises(OSError, match="torn") as caught:
        repeat(1, stream(source, consume(used), prefetch=9))(Context())
    assert used == [(0, "a"), (1, "b")]
    notes = ["In the source of stream(source, ...).", "At index 2.", "At step 0 of 1."]
    assert caught.value.__notes__ == notes
    assert str(caught.value) == "torn"


def test_a_source_that_cannot_be_gone_through_is_refused():
    for iterator in (iter([1]), (i for i in [1])):
        with pytest.raises(TypeError, match=r"gone through only once.*stream\(lambda: \.\.\., "):
            stream(iterator, nothing)
    with pytest.raises(TypeError, match="stream: one cannot go through 5"):
        stream(5, nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not iterable"):
        stream(lambda: 5, nothing)(Context())  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"prefetch=0.*at least 1"):
        stream([1], nothing, prefetch=0)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_stream_that_is_cut_short_closes_its_source(error):
    closed = []

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.append(threading.current_thread().name)

    @stage(host=True)
    def bad(index):
        if index == 1:
            raise error

    with pytest.raises(error) as caught:
        stream(source, bad)(Context())
    assert closed == ["stream source"]
    assert bool(in_notes(caught.value, "At index 1.")) == (error is not SystemExit)


def test_an_iterator_that_is_not_the_streams_own_stays_open():
    class Lines:
        closed = False

        def __iter__(self):
            return iter([1, 2, 3])

        def close(self):
            self.closed = True

    lines = Lines()
    stream(lambda: lines, nothing)(Context())
    assert not lines.closed


@pytest.mark.parametrize("kind", ["stream", "async_loop"])
def test_ctrl_c_while_waiting_for_an_item_says_where(kind):
    used = threading.Event()

    def source():
        yield 0
        assert used.wait(SOON)
        time.sleep(0.02)
        interrupt()
        time.sleep(0.05)

    items = source()
    sample = stage("sample", host=True)(lambda: next(items))
    use = stage(host=True)(used.set)
    loops = {
        "stream": stream(source, use, index="step"),
        "async_loop": async_loop(sample, use, stop_when=at(9)),
    }
    with pytest.raises(KeyboardInterrupt) as caught:
        loops[kind](Context())
    assert caught.value.__notes__ == ["At step 1."]


def test_ctrl_c_while_the_thread_begins_leaves_none(monkeypatch):
    begun = threading.Event()

    def start_then_interrupt(thread, start=threading.Thread.start):
        start(thread)
        begun.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream(itertools.count, nothing)(Context())
    assert begun.is_set()


def test_a_stop_iteration_in_the_body_is_an_error():
    @stage(host=True)
    def bad():
        raise StopIteration

    for loop in (
        stream([1], bad),
        async_loop(give("x"), bad, stop_when=lambda: False),
        parallel(bad),
        repeat(1, bad),
        timeout(bad, SOON),
    ):
        with pytest.raises(StopIteration):
            loop(Context())


def test_a_producer_that_does_not_end_is_left_behind_with_a_warning(monkeypatch):
    monkeypatch.setattr(producers, "PATIENCE", 0.05)
    release = threading.Event()

    def source():
        yield 1
        release.wait(SOON)

    @stage(host=True)
    def bad():
        raise OSError("broken")

    with (
        pytest.warns(RuntimeWarning, match=r"stream source is still busy after 0\.05 s"),
        pytest.raises(OSError, match="broken"),
    ):
        stream(source, bad)(Context())
    left = [t for t in threading.enumerate() if t.name == "stream source"]
    assert [t.daemon for t in left] == [True]
    release.set()
    left[0].join(SOON)


# async_loop


@stage("weight", host=True)
def learn(weight, sample):
    return weight + 1


def learner(seen):
    @stage("weight", host=True)
    def learn(weight, sample, version, step):
        seen.append((step, version, sample))
        return weight + 1

    return learn


def at(number):
    return lambda step: step >= number


def test_the_producer_sees_the_latest_published_weights_and_their_version():
    """The predecessor's saw the first weights for ever."""
    seen = []

    @stage("sample", host=True)
    def sample(weight, version, other, step):
        time.sleep(0.005 * (step % 3 == 0))  # a turn may end meanwhile
        return weight, version, other

    @stage("weight", host=True)
    def learn(weight, sample, version, step):
        seen.append((step, version, sample))
        time.sleep(0.002)
        return weight + 1

    loop = async_loop(sample, learn, stop_when=at(20), buffer_size=2)
    after = loop(Context(weight=100, other="o"))
    assert after["weight"] == 120
    assert [step for step, _, _ in seen] == list(range(20))
    for step, version, item in seen:
        assert item == (100 + version, version, "o")
        assert 0 <= step - version <= 2
    versions = [version for _, version, _ in seen]
    assert versions == sorted(versions)
    assert versions[-1] >= 17


@pytest.mark.parametrize("size", [1, 3])
def test_a_sample_is_as_stale_as_the_buffer_is_long_and_no_staler(size):
    """With a producer that is always ready, each sample is as stale as it may be."""
    seen, made = [], threading.Semaphore(0)

    @stage("sample", host=True)
    def sample(weight, step):
        made.release()
        return weight

    @stage("weight", host=True)
    def learn(weight, version, step):
        for _ in range(1 if step else size + 1):
            assert made.acquire(timeout=SOON)
        time.sleep(0.002)  # until what was begun lies in the buffer
        seen.append(step - version)
        return weight + 1

    async_loop(sample, learn, stop_when=at(8), buffer_size=size)(Context(weight=0))
    assert seen[: size + 1] == list(range(size + 1))
    assert set(seen[size:]) == {size}


def test_the_producer_waits_while_the_buffer_is_full():
    made, ahead = [], []

    @stage("sample", host=True)
    def sample():
        made.append(1)
        return 0

    @stage(host=True)
    def slow(step):
        time.sleep(0.01)
        ahead.append(len(made) - (step + 1))

    async_loop(sample, slow, stop_when=at(6), buffer_size=2)(Context())
    assert max(ahead) == 2


def test_the_producer_and_the_consumer_work_at_the_same_time():
    barrier = threading.Barrier(2, timeout=SOON)

    @stage("sample", host=True)
    def sample(step):
        if step == 1:
            barrier.wait()
        return 0

    @stage(host=True)
    def use(step):
        if step == 0:
            barrier.wait()

    async_loop(sample, use, stop_when=at(2), buffer_size=1)(Context())


def test_numbers_go_on_from_the_start():
    seen = []
    sample = stage("sample", host=True)(lambda step, version: (step, version))
    loop = async_loop(sample, learner(seen), stop_when=at(8), start=lambda first: first)
    assert loop.needs == ("first", "weight")
    after = loop(Context(weight=0, first=5))
    assert (after["step"], after["weight"]) == (7, 3)
    assert [step for step, _, _ in seen] == [5, 6, 7]
    for step, version, item in seen:
        assert item == (step, version)  # the producer's step is that of the turn its item is for
        assert 5 <= version <= step


def test_the_loop_ends_when_it_is_told_to():
    def stop_when(weight, limit, step, early=99):
        return weight >= limit or step >= early

    loop = async_loop(give("sample"), learn, stop_when=stop_when)
    assert (set(loop.needs), loop.optional) == ({"weight", "limit"}, ("early",))
    assert loop(Context(weight=0, limit=3, early=2))["weight"] == 2
    assert loop.gives == ()
    assert loop(Context(weight=0, limit=3))["weight"] == 3
    assert dict(loop(Context(weight=5, limit=3))) == {"weight": 5, "limit": 3}


def test_stop_iteration_ends_the_loop_when_the_buffer_is_empty():
    seen = []

    @stage("sample", host=True)
    def sample(step):
        if step == 3:
            raise StopIteration
        return step

    slow = stage(host=True)(lambda: time.sleep(0.002))
    after = async_loop(sample, slow, learner(seen), stop_when=at(99), buffer_size=9)(
        Context(weight=0)
    )
    assert [item for _, _, item in seen] == [0, 1, 2]
    assert (after["weight"], after["step"]) == (3, 2)


def test_an_error_of_the_producer_is_raised_in_the_loop():
    seen = []

    @stage("sample", host=True)
    def sample(step):
        if step == 2:
            raise ConnectionError("lost")
        return step

    loop = async_loop(sample, learner(seen), stop_when=at(99), buffer_size=9)
    with pytest.raises(ConnectionError, match="lost") as caught:
        repeat(1, loop, index="epoch")(Context(weight=0))
    assert [item for _, _, item in seen] == [0, 1]
    notes = ["In stage 'sample'.", "At step 2.", "At epoch 0 of 1."]
    assert caught.value.__notes__ == notes


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_of_the_consumer_stops_the_producer(error):
    made = []

    @stage("sample", host=True)
    def sample():
        made.append(1)
        return 0

    @stage(host=True)
    def bad(step):
        if step == 1:
            time.sleep(0.02)  # until the buffer is full and the producer waits
            raise error("broken")

    with pytest.raises(error, match="broken") as caught:
        async_loop(sample, bad, stop_when=at(99), buffer_size=2)(Context())
    assert caught.value.__notes__ == ["In stage 'bad'.", "At step 1."]
    assert len(made) == 4


def test_an_error_of_the_condition_stops_the_producer():
    loop = async_loop(give("sample"), nothing, stop_when=lambda step: step == 2 and 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        loop(Context())
    assert caught.value.__notes__ == ["At step 2."]


def test_what_the_consumer_gives_besides_is_kept_from_the_producer():
    """It sees what it reads, as published, and else the context that the loop began with."""
    found = set()

    @stage("sample", host=True)
    def sample(fixed, weight=None, extra=None):
        found.add((fixed, extra is None or weight is not None))
        return 0

    both = stage("weight", "extra", host=True)(lambda step: (step, step))
    loop = async_loop(sample, both, stop_when=at(5), buffer_size=1)
    assert loop.settings["publishes"] == ("weight", "extra")
    loop(Context(fixed=1))
    assert found == {(1, True)}


def test_an_asynchronous_loop_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"buffer_size=0.*at least 1"):
        async_loop(give("sample"), nothing, stop_when=at(1), buffer_size=0)
    with pytest.raises(ValueError, match="producer nothing gives nothing to consume"):
        async_loop(nothing, nothing, stop_when=at(1))


# timeout


def test_a_stage_in_time_gives_what_it_gives():
    after = timeout(sequence(give("x"), give("y")), SOON)(Context(z=0))
    assert dict(after) == {"x": "x", "y": "y", "z": 0}


def test_a_late_stage_is_an_error_and_what_it_gives_is_thrown_away():
    release, late = threading.Event(), []

    @stage("x", host=True)
    def slow():
        late.append(threading.current_thread())
        release.wait(SOON)
        return "late"

    context = Context(x="old")
    with pytest.raises(TimeoutError, match=r"'slow' took longer than 0\.05 s") as caught:
        repeat(1, timeout(slow, 0.05))(context)
    assert caught.value.__notes__ == ["In stage 'slow'.", "At step 0 of 1."]
    release.set()
    late[0].join(SOON)
    assert context["x"] == "old"
    assert late[0].daemon


def test_an_error_in_time_passes_through():
    bad = stage("x", host=True)(lambda: {}["key"])
    with pytest.raises(KeyError, match="key") as caught:
        timeout(bad, SOON)(Context())
    assert caught.value.__notes__ == ["In stage '<lambda>'."]


def test_a_late_stage_can_be_tried_again():
    calls = []

    @stage("x", host=True)
    def slow_once():
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.2)
        return len(calls)

    assert retry(timeout(slow_once, 0.05), backoff=0.1)(Context())["x"] == 2
    time.sleep(0.2)


def test_timeout_takes_host_stages_and_positive_times():
    with pytest.raises(ValueError, match="timeout is for host stages, but '<lambda>' runs on the"):
        timeout(sequence(nothing, stage("x")(lambda: 1)), 1.0)
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be positive and finite"):
            timeout(nothing, wrong)
