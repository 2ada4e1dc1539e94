import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crucible import train
from crucible.kitchen import (
    Context,
    Ledger,
    chunks,
    compile,
    ensure,
    every,
    programs,
    repeat,
    sequence,
    stage,
    stream,
    when,
)
from crucible.metrics import Mean


@stage("x")
def increment(x):
    return x + 1


@stage("x")
def add(x, batch):
    return x + batch


@stage("y")
def tenfold(x):
    return 10 * x


def host(*gives, **options):
    return stage(*gives, host=True, **options)


def refused(*body, count=8, chunk=4, **options):
    with pytest.raises(ValueError, match="chunk") as caught:
        compile(repeat(count, *body, chunk=chunk, **options))
    return str(caught.value)


# Training


def loss_fn(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["in"] + jax.random.normal(key, (4, 1)) * 0.01)
    return Mean.of((hidden @ params["out"] - batch["y"]) ** 2), {"largest": Mean.of(hidden.max())}


def training(*, jit, chunk, num_steps, more=()):
    """A small network, trained by Adam on batches that are a function of the step."""
    steps = train.make_steps(loss_fn, optax.adam(1e-2), jit=jit)
    key = jax.random.key(0)
    params = {
        "in": jax.random.normal(key, (3, 8)),
        "out": jax.random.normal(jax.random.fold_in(key, 1), (8, 1)),
    }

    @host("batch")
    def next_batch(step):
        rng = np.random.default_rng(step)
        x = rng.normal(size=(4, 3)).astype(np.float32)
        return {"x": x, "y": x.sum(axis=1, keepdims=True)}

    @stage("state", "metrics")
    def train_step(state, batch):
        return steps.train_step(state, batch)

    loop = repeat(
        lambda stop: stop, next_batch, train_step, *more, start=lambda first: first, chunk=chunk
    )
    return compile(loop), Context(state=steps.init(params, key), first=0, stop=num_steps)


def bits(tree):
    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key_data(leaf)
        return np.asarray(leaf)

    return [raw(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("jit", [False, True])
def test_scanning_200_equals_four_times_50(jit):
    losses, seen = [], []

    @host()
    def note(step, metrics):
        losses.append((step, bits(metrics)))
        seen.append(float(metrics["loss"].total))

    once, context = training(jit=jit, chunk=50, num_steps=200, more=[note])
    whole = once(context)
    unbroken, losses[:] = list(losses), []
    assert [step for step, _ in unbroken] == list(range(200))

    again, context = training(jit=jit, chunk=50, num_steps=0, more=[note])
    state = context["state"]
    for first in range(0, 200, 50):
        state = again(Context(state=state, first=first, stop=first + 50))["state"]
    assert bits(state) == bits(whole["state"])
    assert losses == unbroken
    assert max(seen[190:200]) < 0.2 * seen[0]


@pytest.mark.parametrize("chunk", [8, 7])
def test_a_run_that_is_cut_anywhere_equals_the_unbroken_one(chunk):
    compiled, context = training(jit=True, chunk=chunk, num_steps=24)
    again, _ = training(jit=True, chunk=chunk, num_steps=24)
    whole = bits(compiled(context)["state"])
    for cut in (1, 5, 8, 9, 23):
        _, context = training(jit=True, chunk=chunk, num_steps=cut)
        state = compiled(context)["state"]
        assert bits(again(Context(state=state, first=cut, stop=24))["state"]) == whole, cut


def test_one_program_serves_every_length_of_a_chunk():
    compiled, context = training(jit=True, chunk=8, num_steps=21)
    context = context.replace(first=3)
    with Ledger().recording() as ledger:
        compiled(context)
    mine = [c for c in ledger.compiles if c.function == "train_step"]
    assert len(mine) == 1
    assert mine[0].changed == ()


# How a chunk runs


def test_feeders_run_ahead_boundaries_at_their_step_and_followers_follow():
    said = []
    say = lambda what: lambda step: said.append(f"{what}{step}")  # noqa: E731
    feed = host("batch")(lambda step: said.append(f"f{step}") or step)
    loop = repeat(
        6, every(4, host()(say("b"))), feed, add, tenfold, host()(say("a")), start=2, chunk=4
    )
    last = compile(loop)(Context(x=jnp.asarray(0)))
    assert said == ["f2", "f3", "a2", "a3", "b4", "f4", "f5", "a4", "a5"]
    assert (int(last["x"]), int(last["y"]), last["step"]) == (14, 140, 5)


def test_a_boundary_sees_and_changes_the_state_of_its_step():
    seen = []

    @host("x")
    def double(x, y):
        seen.append((int(x), int(y)))
        return x * 2

    loop = repeat(6, every(2, double), increment, tenfold, chunk=2)
    last = compile(loop)(Context(x=jnp.asarray(0), y=jnp.asarray(-1)))
    assert seen == [(0, -1), (2, 20), (6, 60)]
    assert int(last["x"]) == 14


def test_a_boundary_may_have_device_stages():
    seen = []
    look = host()(lambda z: seen.append(int(z)))
    evaluate = stage("z")(lambda x: x + 100)
    compiled = compile(repeat(8, every(4, evaluate, look), increment, chunk=4))
    compiled(Context(x=jnp.asarray(0)))
    assert seen == [100, 104]
    assert [p.name for p in programs(compiled)] == ["<lambda>", "increment"]


def test_the_program_of_a_loop_has_the_size_of_the_chunk():
    feed = host("batch")(lambda step: step)
    (program,) = programs(compile(repeat(8, feed, add, chunk=3)))
    made = program.settings["chunks"]
    context = Context(x=jax.ShapeDtypeStruct((), jnp.int32), batch=jnp.asarray(1))
    feeds, first, count = made.abstract(context)
    assert feeds["batch"].shape == (3,)
    assert (first, count) == (0, 1)
    text = program.settings["program"].lower(context, feeds, first, count).as_text()
    assert "tensor<3xi32>" in text
    assert program.settings["donates"] == ("x",)


def test_a_chunk_of_one_is_the_loop_itself():
    compiled = compile(repeat(3, increment, host()(lambda x: None), chunk=1))
    assert "chunks" not in compiled.settings
    assert int(compiled(Context(x=jnp.asarray(0)))["x"]) == 3
    asked = []
    loop = repeat(5, increment, chunk=lambda k: asked.append(k) or k)
    assert "k" in loop.needs
    compiled = compile(loop)
    for size in (1, 3):
        assert int(compiled(Context(x=jnp.asarray(0), k=size))["x"]) == 5
    assert asked == [1, 3]
    with pytest.raises(ValueError, match="chunk=0 must be"):
        compiled(Context(x=jnp.asarray(0), k=0))


def test_no_steps_are_no_steps():
    said = []
    feed = host("batch")(lambda step: said.append(step) or step)
    for chunk in (2, "auto"):
        compiled = compile(repeat(lambda stop: stop, feed, add, start=3, chunk=chunk))
        last = compiled(Context(x=jnp.asarray(7), stop=2))
        assert (int(last["x"]), said, "step" in last) == (7, [], False)


def test_a_follower_that_takes_all_steps_at_once_gets_as_many_as_there_are():
    seen = []

    def push(step, y, batch, note="none"):
        raise AssertionError("one by one")

    def push_all(step, y, batch, note="none"):
        seen.append((step, np.asarray(y).tolist(), np.asarray(batch["b"]).tolist(), note))

    feed = host("batch")(lambda step: {"b": np.full(2, step)})
    take = stage("x")(lambda x, batch: x + batch["b"].sum())
    loop = repeat(5, feed, take, tenfold, host(many=push_all)(push), chunk=3)
    compile(loop)(Context(x=jnp.asarray(0), note="constant"))
    assert seen == [
        (range(0, 3), [0, 20, 60], [[0, 0], [1, 1], [2, 2]], "constant"),
        (range(3, 5), [120, 200], [[3, 3], [4, 4]], "constant"),
    ]


def test_a_follower_is_asked_for_each_step_if_it_cannot_take_all_at_once():
    seen = []

    def one(step, y, text="", total=0):
        seen.append((step, int(y), text, total))

    def many(step, y, text="", total=0):
        raise AssertionError("all at once")

    texts = host("text")(lambda step: f"text {step}")
    count = host("total")(lambda total, y: total + 1)
    gives = host("sum", many=many)(lambda y, sum=0: sum + int(y))
    for body, expected in (
        ((texts, increment, tenfold, host(many=many)(one)), [(0, 10, "text 0", 0)]),
        ((increment, tenfold, host(many=many)(one), count), [(0, 10, "", 0), (1, 20, "", 1)]),
    ):
        seen.clear()
        compile(repeat(2, *body, chunk=2))(Context(x=jnp.asarray(0), total=0))
        assert seen[: len(expected)] == expected
    last = compile(repeat(3, increment, tenfold, gives, chunk=3))(Context(x=jnp.asarray(0)))
    assert last["sum"] == 60


def test_what_a_follower_learns_goes_on_to_its_next_step():
    seen = []
    first = host()(lambda total, y: seen.append((total, int(y))))
    second = host("total")(lambda total, y: total + int(y))
    loop = repeat(5, increment, tenfold, first, second, chunk=2)
    last = compile(loop)(Context(x=jnp.asarray(0), total=0))
    assert seen == [(0, 10), (10, 20), (30, 30), (60, 40), (100, 50)]
    assert last["total"] == 150


def test_what_is_fed_and_given_is_the_given_one_after_the_step():
    seen = []
    feed = host("batch")(lambda step: np.float32(step))
    clean = stage("batch")(lambda batch: batch * 2)
    look = host()(lambda batch: seen.append(float(batch)))
    last = compile(repeat(4, feed, clean, add, look, chunk=2))(Context(x=jnp.zeros(())))
    assert (seen, float(last["x"]), float(last["batch"])) == ([0, 2, 4, 6], 12, 6)


def test_what_is_sometimes_given_on_top_of_what_is_fed():
    feed = host("batch")(lambda step: step)
    clean = when(lambda x: x % 2 == 1, stage("batch")(lambda x: x * 100 % 1009))
    loop, chunked = (repeat(5, feed, clean, add, chunk=k) for k in (1, 3))
    plain, last = loop(Context(x=1)), compile(chunked)(Context(x=1))
    assert int(plain["x"]) == int(last["x"])
    only = [repeat(5, feed, clean, increment, chunk=k) for k in (1, 3)]
    plain, last = only[0](Context(x=1)), compile(only[1])(Context(x=1))
    assert int(plain["batch"]) == int(last["batch"]) == 500


def test_a_chain_of_feeders_may_go_on_from_what_the_steps_give_too():
    load = host("batch")(lambda step: step)
    further = host("batch")(lambda batch: batch + 1)
    clean = stage("batch")(lambda batch: batch * 2)
    last = compile(repeat(4, load, further, clean, add, chunk=2))(Context(x=jnp.asarray(0)))
    assert int(last["x"]) == 20


def test_numbers_that_are_fed_stay_weak():
    rate = host("rate")(lambda step: 0.5 if step else 1)
    move = stage("x")(lambda x, rate: x + rate)
    last = compile(repeat(4, rate, move, chunk=4))(Context(x=jnp.zeros((), jnp.bfloat16)))
    assert (float(last["x"]), last["x"].dtype) == (2.5, jnp.bfloat16)


def test_what_a_step_sometimes_gives_keeps_its_value():
    look = []
    feed = host()(lambda step: look.append(step))
    sometimes = repeat(7, feed, increment, every(3, tenfold), chunk=4)
    last = compile(sometimes)(Context(x=jnp.asarray(0), y=-1))
    assert (int(last["y"]), look) == (70, list(range(7)))
    with pytest.raises(ValueError, match=r"every\(3, tenfold\) gives 'y' only if"):
        compile(sometimes)(Context(x=jnp.asarray(0)))


def test_what_a_step_reads_of_the_one_before_needs_a_first_value():
    total = stage("total")(lambda x, total=0: total + x)
    loop = repeat(4, increment, total, chunk=2)
    assert int(compile(loop)(Context(x=jnp.asarray(0), total=0))["total"]) == 10
    with pytest.raises(ValueError, match=r"'total', which the step before gives.*in the context"):
        compile(loop)(Context(x=jnp.asarray(0)))


@pytest.mark.parametrize(
    ("first", "change"),
    [
        (lambda: jax.random.key(0), lambda v: jax.random.split(v)[0]),
        (lambda: jnp.ones(3, jnp.bfloat16), lambda v: v * 1.5),
        (lambda: jnp.ones((2, 2), bool), lambda v: ~v),
        (lambda: jnp.zeros((0, 4)), lambda v: v + 1),
        (lambda: None, lambda v: v),
    ],
)
def test_all_kinds_of_arrays_flow(first, change):
    turn, copy = stage("v")(change), stage("w")(lambda v: {"of": v, "none": None})
    seen = []
    look = host()(lambda w: seen.append(w["of"]))
    feed = host("fed")(lambda: {"key": first()})
    take = stage("z")(lambda fed: fed)
    chunked = repeat(5, feed, turn, take, copy, look, chunk=4)
    plain = repeat(5, feed, turn, take, copy, look)(Context(v=first()))
    one_by_one, seen[:] = bits(seen), []
    last = compile(chunked)(Context(v=first()))
    assert bits(seen) == one_by_one
    for name in ("v", "w", "z"):
        assert jax.tree.structure(last[name]) == jax.tree.structure(plain[name])
        assert bits(last[name]) == bits(plain[name])


def test_donation_is_refused_where_the_first_context_is_to_stay():
    x = jnp.zeros(1000)
    compile(repeat(4, increment, chunk=2), donate=False)(Context(x=x))
    assert not x.is_deleted()
    compile(repeat(4, increment, chunk=2))(Context(x=x))
    assert x.is_deleted()


def test_one_feed_for_all_steps_is_not_overwritten():
    batch = jnp.ones(())
    feed = host("batch")(lambda: batch)
    clean = stage("batch")(lambda batch: batch * 2)
    for chunk in (1, 2, "auto"):
        last = compile(repeat(40, feed, clean, add, chunk=chunk))(Context(x=jnp.zeros(())))
        assert float(last["x"]) == 80
    assert float(batch) == 1


def test_tokens_of_a_chunk_are_counted():
    feed = host("batch")(lambda step: {"tokens": np.ones((2, 5), np.int32)})
    take = stage("x")(lambda x, batch: x + batch["tokens"].sum())
    with Ledger().recording() as ledger:
        compile(repeat(4, feed, take, chunk=2))(Context(x=jnp.asarray(0)))
    assert (ledger.costs["<lambda>"].tokens, ledger.costs["<lambda>"].calls) == (40, 6)


# Errors


def test_an_error_says_which_steps():
    @host("batch")
    def feed(step):
        return 1 // (5 - step)

    with pytest.raises(ZeroDivisionError) as caught:
        compile(repeat(8, feed, add, chunk=3))(Context(x=jnp.asarray(0)))
    assert caught.value.__notes__ == ["In stage 'feed'.", "At steps 3 to 5 of 8."]

    wrong = stage("x")(lambda x: x + jnp.ones(7))
    with pytest.raises(
        ValueError, match=r"x is float32\[\] before a turn and float32\[7\]"
    ) as caught:
        compile(repeat(8, wrong, chunk=3))(Context(x=jnp.zeros(())))
    assert caught.value.__notes__[-2:] == ["In stage '<lambda>'.", "At steps 0 to 2 of 8."]


def test_a_cleanup_sees_the_last_whole_chunk():
    seen = []
    follow = host()(lambda y, step: 1 // (4 - step))
    cleanup = host()(lambda x, step=None: seen.append(int(x)))
    with pytest.raises(ZeroDivisionError):
        compile(ensure(repeat(8, increment, tenfold, follow, chunk=3), cleanup))(
            Context(x=jnp.asarray(0))
        )
    assert seen == [6]


def test_what_is_not_an_array_cannot_leave_a_step():
    talk = stage("y")(lambda x: "text")
    for body in ((talk,), (every(2, talk),), (repeat(2, talk, index="i"),)):
        with pytest.raises(TypeError, match=r"gives 'y', a str, but.*host=True"):
            compile(repeat(4, *body, chunk=2))(Context(x=jnp.asarray(0), y=0))


def test_what_is_fed_must_be_arrays_of_one_shape():
    text = host("batch")(lambda step: "text")
    with pytest.raises(TypeError, match=r"'batch' is a str.*arrays only"):
        compile(repeat(4, text, add, chunk=2))(Context(x=jnp.asarray(0)))
    grows = host("batch")(lambda step: {"a": np.zeros(step, np.float32)})
    take = stage("x")(lambda x, batch: x + batch["a"].sum())
    said = r"batch\['a'\] is float32\[0\] and float32\[1\] within one chunk.*pad it"
    with pytest.raises(ValueError, match=said):
        compile(repeat(4, grows, take, chunk=2))(Context(x=jnp.zeros(())))


# Refusals


def test_a_chunk_must_divide_the_periods_of_host_stages():
    look = every(10, host()(lambda x: None))
    message = refused(look, increment, chunk=4)
    assert re.search(r"chunk=4 does not divide the period of every\(10, <lambda>\)", message)
    assert "Choose a chunk of 1, 2, 5, 10, or a period of 8 or 12." in message
    assert refused(look, increment, chunk=32).endswith(", or a period of 32.")
    assert refused(look, increment, chunk=10 * 7).endswith(", or a period of 70.")
    for chunk in (1, 2, 5, 10):
        assert compile(repeat(20, look, increment, chunk=chunk))
    compiled = compile(repeat(20, look, increment, chunk=lambda k: k))
    with pytest.raises(ValueError, match="chunk=3 does not divide"):
        compiled(Context(x=jnp.asarray(0), k=3))


def test_what_cannot_run_in_chunks_is_refused():
    look = host()(lambda x: None)
    undo = stage("x", rollback=lambda x: None)(lambda x: x + 1)
    batch = host("batch")(lambda x: x)
    lies_between = refused(increment, look, tenfold)
    assert "the host stage <lambda> lies between device stages" in lies_between
    assert "lies between" in refused(increment, stream([1], tenfold), tenfold)
    assert "reads 'x', which the steps change. Put it in every(n, ...)" in refused(batch, add)
    assert "reads 'x' after each step" in refused(increment, look)
    assert "Put it before the device stages, in an every(n, ...)" in refused(increment, look)
    assert "gives 'x' to the next step" in refused(increment, host("x")(lambda: 1))
    assert "with a rollback cannot run in chunks" in refused(increment, undo)
    assert "with a rollback" in refused(host("z", rollback=lambda z: 0)(lambda: 1), increment)
    assert "no stage of its body runs on the device" in refused(look)
    with pytest.raises(ValueError, match="counted steps, not for over="):
        compile(repeat(increment, over=[1, 2], chunk=2))
    assert "reads 'y' after each step" in refused(increment, every(2, tenfold), host()(lambda y: 1))
    assert "gives 'y' to the next" in refused(increment, every(2, tenfold), host("y")(lambda: 1))


def test_feeders_do_not_run_ahead_of_what_they_depend_on():
    rate = host("rate")(lambda loss=0: loss)
    move = stage("x", "y")(lambda x, rate: (x + rate, x))
    follow = host("loss")(lambda y: float(y))
    assert "reads 'loss', which the steps change" in refused(rate, move, follow)
    sometimes = when(lambda step: step % 2 == 0, host("batch")(lambda: 1))
    clean = stage("batch")(lambda batch: batch * 2)
    assert "gives 'batch' at some steps only" in refused(sometimes, clean, add)
    note = host("note")(lambda step: step)
    seen = host("note")(lambda note, y: note)
    assert "gives 'note' at some steps only" in refused(
        when(lambda step: step > 2, note), increment, tenfold, seen
    )


def test_the_number_of_an_inner_loop_needs_a_name_of_its_own():
    message = refused(repeat(2, increment))
    assert "repeat(2, increment) gives 'step' too" in message
    assert compile(repeat(8, repeat(2, increment, index="i"), chunk=4))


# chunk="auto"


def auto(monkeypatch, faster, *, count=40, first=None, more=(), start=0, **values):
    """A loop that feeds from an iterator, with the forms' times decided."""
    times = iter([1.0, 2.0] if faster == "chunks" else [2.0, 1.0])
    real = chunks.Chunks._time

    def timed(self, form, context):
        assert real(self, form, context) > 0
        return next(times)

    monkeypatch.setattr(chunks.Chunks, "_time", timed)
    items, used, followed = iter(range(start, 1000)), [], []

    @host("batch")
    def feed(step):
        used.append(next(items))
        assert used[-1] == step
        return jnp.asarray(used[-1])

    follow = host()(lambda step, y, batch: followed.append((step, int(y), int(batch))))
    loop = repeat(count, feed, add, tenfold, *more, follow, start=start, chunk="auto")
    last = compile(loop)(Context(x=jnp.asarray(0), **values))
    sums = np.cumsum(range(start, count)).tolist()
    assert used == list(range(start, count))
    assert followed == [(n, 10 * s, n) for n, s in zip(used, sums, strict=True)]
    assert int(last["x"]) == sums[-1]
    return last


@pytest.mark.parametrize(("faster", "picked"), [("chunks", 16), ("steps", 1)])
@pytest.mark.parametrize("start", [0, 3])
def test_auto_picks_the_faster_form_says_so_and_feeds_each_item_once(
    monkeypatch, capsys, faster, picked, start
):
    last = auto(monkeypatch, faster, start=start)
    assert last["chunk"] == picked
    said = capsys.readouterr().out
    assert re.fullmatch(
        rf"chunk: {picked} steps? per dispatch \(\S+ ms a step in chunks of 16, \S+ ms one by one\)"
        r"\.\n",
        said,
    )


def test_auto_takes_chunks_only_if_they_are_clearly_faster(monkeypatch):
    for chunk_time, picked in ((0.96, 16), (0.98, 1)):
        times = iter([chunk_time, 1.0])
        monkeypatch.setattr(chunks.Chunks, "_time", lambda *_, times=times: next(times))
        last = compile(repeat(20, increment, chunk="auto"))(Context(x=jnp.asarray(0)))
        assert (last["chunk"], int(last["x"])) == (picked, 20)


def test_auto_keeps_the_choice_of_an_earlier_attempt_without_timing(monkeypatch, capsys):
    monkeypatch.setattr(chunks.Chunks, "_time", None)
    for size in (1, 4):
        context = Context(x=jnp.asarray(0), chunk=size)
        last = compile(repeat(20, increment, start=3, chunk="auto"))(context)
        assert (int(last["x"]), last["chunk"]) == (17, size)
    assert capsys.readouterr().out == ""
    look = every(10, host()(lambda x: None))
    with pytest.raises(ValueError, match="chunk=4 does not divide"):
        compile(repeat(20, look, increment, chunk="auto"))(Context(x=jnp.asarray(0), chunk=4))


def test_auto_takes_single_steps_for_a_run_shorter_than_a_chunk(capsys):
    last = compile(repeat(15, increment, chunk="auto"))(Context(x=jnp.asarray(0)))
    assert int(last["x"]) == 15
    assert "chunk: 1 step per dispatch (chunks of 16 do not fit)." in capsys.readouterr().out
    assert "chunk" not in last  # nothing was measured, so a resumed run may still choose


@pytest.mark.parametrize(
    ("periods", "size"), [((), 16), ((100,), 25), ((100, 40), 20), ((64,), 32), ((7,), 7)]
)
def test_auto_tries_the_largest_chunk_that_fits_all_periods(periods, size, capsys):
    looks = [every(period, host()(lambda x: None)) for period in periods]
    compile(repeat(size - 1, *looks, increment, chunk="auto"))(Context(x=jnp.asarray(0)))
    assert f"(chunks of {size} do not fit)" in capsys.readouterr().out


def test_auto_says_that_no_chunk_fits_periods_with_nothing_in_common(capsys):
    looks = [every(period, host()(lambda x: None)) for period in (7, 2)]
    last = compile(repeat(3, *looks, increment, chunk="auto"))(Context(x=jnp.asarray(0)))
    assert (int(last["x"]), last["chunk"]) == (3, 1)
    assert "(no larger chunk divides the periods of its host stages)" in capsys.readouterr().out


def test_auto_leaves_the_state_whole_while_it_measures(monkeypatch):
    real, seen = chunks.Chunks._time, []

    def timed(self, form, context):
        seen.append(context["x"])
        return real(self, form, context)

    monkeypatch.setattr(chunks.Chunks, "_time", timed)
    last = compile(repeat(40, increment, chunk="auto"))(Context(x=jnp.zeros(100)))
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert float(last["x"][0]) == 40


def test_auto_books_its_measuring_apart():
    with Ledger().recording() as ledger:
        compile(repeat(32, increment, chunk="auto"))(Context(x=jnp.asarray(0)))
    assert ledger.costs["chunk='auto'"].calls == 2
    assert ledger.costs["increment"].calls in (2, 32)


def test_an_error_while_auto_measures_says_which_steps():
    wrong = stage("x")(lambda x, step: jnp.concatenate([x, x]))
    with pytest.raises(ValueError, match="before a turn") as caught:
        compile(repeat(32, wrong, chunk="auto"))(Context(x=jnp.zeros(2)))
    assert "At steps 0 to 15 of 32." in caught.value.__notes__


def test_a_chunked_loop_within_a_loop():
    inner = repeat(4, host("batch")(lambda step, epoch: step * epoch), add, tenfold, chunk=2)
    loop = repeat(3, inner, host()(lambda y: None), index="epoch")
    plain, last = (form(Context(x=jnp.asarray(0))) for form in (loop, compile(loop)))
    assert int(plain["x"]) == int(last["x"]) == 18
    assert int(plain["y"]) == int(last["y"])


def test_what_comes_after_the_loop_keeps_what_the_steps_gave():
    workflow = sequence(repeat(4, increment, tenfold, chunk=2), host("z")(lambda y: int(y)))
    assert compile(workflow)(Context(x=jnp.asarray(0)))["z"] == 40
    used = stage("x")(lambda y: y)
    dropped = compile(repeat(4, tenfold, used, chunk=2))(Context(x=jnp.asarray(1)))
    assert "y" not in dropped
    kept = compile(repeat(4, tenfold, used, chunk=2), keep=["y"])(Context(x=jnp.asarray(1)))
    assert int(kept["y"]) == 10_000
