import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crucible.kitchen import (
    Context,
    Ledger,
    async_loop,
    compile,
    ensure,
    every,
    fuse,
    parallel,
    programs,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    timeout,
    when,
)


@stage("grads")
def gradient(params, batch):
    return params * batch


@stage("params")
def update(params, grads):
    return params - grads


@stage("x")
def increment(x):
    return x + 1


@stage("y")
def tenfold(x):
    return 10 * x


@stage("x")
def times_two(x):
    return 2 * x


def host(*gives, **options):
    return stage(*gives, host=True, **options)


def outputs(program, context):
    return len(program.settings["program"].jaxpr(context).out_avals)


# Programs


def test_neighbouring_device_stages_become_one_program():
    look = host()(lambda x: None)
    workflow = repeat(
        3, increment, tenfold, look, every(2, tenfold), sequence(increment, increment)
    )
    compiled = compile(workflow)
    names = [[part.name for part in program.parts] for program in programs(compiled)]
    assert names == [["increment", "tenfold"], ["tenfold"], ["increment", "increment"]]
    assert programs(workflow) == []
    assert str(compile(sequence(increment, tenfold))) == "program(increment, tenfold)"


def test_what_is_decided_already_does_not_part_neighbours():
    workflow = sequence(
        increment, when(True, increment), every(1, tenfold, index="x"), every(0, increment)
    )
    assert [len(program.parts) for program in programs(compile(workflow))] == [3]


def test_gradients_between_two_stages_never_leave_their_program():
    context = Context(params=jnp.ones(3), batch=jnp.full(3, 0.5))
    compiled = compile(sequence(gradient, update))
    (program,) = programs(compiled)
    assert program.settings["dropped"] == ("grads",)
    assert outputs(program, context) == 1
    assert "grads" not in compiled(context)
    assert program.gives == ("params",)


def test_a_dropped_name_is_gone_even_if_it_had_a_value_before():
    context = Context(params=jnp.ones(3), batch=jnp.ones(3), grads=jnp.ones(3))
    assert "grads" not in compile(sequence(gradient, update))(context)


def test_what_is_read_later_or_next_turn_or_kept_stays():
    context = Context(params=jnp.ones(3), batch=jnp.ones(3))
    seen = []
    look = host()(lambda grads: seen.append(grads))
    compile(sequence(gradient, update, look))(context)
    assert len(seen) == 1
    kept = compile(sequence(gradient, update), keep=["grads"])
    context = Context(params=jnp.ones(3), batch=jnp.ones(3))
    assert kept(context)["grads"].tolist() == [1, 1, 1]

    remember = stage("old")(lambda grads: grads)
    again = compile(repeat(2, remember, gradient, update))
    context = Context(params=jnp.ones(3), batch=jnp.ones(3), grads=jnp.zeros(3))
    assert again(context)["old"].tolist() == [1, 1, 1]


def test_a_result_that_nobody_reads_stays():
    report = stage("metrics")(lambda grads: {"norm": grads.sum()})
    last = compile(sequence(gradient, report, update))(
        Context(params=jnp.ones(3), batch=jnp.ones(3))
    )
    assert last["metrics"]["norm"] == 3


def test_what_a_cleanup_reads_is_not_dropped():
    seen = []
    cleanup = host()(lambda grads=None, x=0: seen.append((grads, x)))
    context = Context(params=jnp.ones(3), batch=jnp.ones(3), x=0)
    boom = host()(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compile(ensure(sequence(gradient, update, increment, boom), cleanup))(context)
    assert seen[0][0].tolist() == [1, 1, 1]
    assert seen[0][1] == 1


def test_a_program_shows_its_lowering_and_jaxpr_without_running():
    (program,) = programs(compile(sequence(gradient, update)))
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    abstract = Context(params=shape, batch=shape)
    made = program.settings["program"]
    assert "donor" in made.lower(abstract).as_text() or "aliasing" in made.lower(abstract).as_text()
    assert made.jaxpr(abstract).out_avals[0].shape == (3,)


def test_compiling_what_is_compiled_changes_nothing():
    once = compile(repeat(3, increment))
    assert int(compile(sequence(once, tenfold))(Context(x=jnp.asarray(0)))["y"]) == 30


# Donation


def test_what_a_program_replaces_lends_its_memory():
    x = jnp.zeros(1000)
    context = Context(x=x)
    compiled = compile(repeat(3, increment))
    assert programs(compiled)[0].settings["donates"] == ("x",)
    assert compiled(context)["x"][0] == 3
    assert x.is_deleted()


def test_each_turn_lends_its_memory_to_the_next():
    seen = []
    look = host()(lambda x: seen.append(x))
    last = compile(repeat(3, increment, look))(Context(x=jnp.zeros(1000)))
    assert [x.is_deleted() for x in seen] == [True, True, False]
    assert last["x"] is seen[2]


def test_memory_is_lent_across_a_parallel():
    seen = []
    look = host()(lambda x: seen.append(x))
    beside = host("z")(lambda y: 1)
    workflow = repeat(3, parallel(increment, beside), look)
    compile(workflow)(Context(x=jnp.zeros(1000), y=1))
    assert [x.is_deleted() for x in seen] == [True, True, False]


def test_without_donation_the_first_context_stays_whole():
    context = Context(x=jnp.zeros(3))
    compiled = compile(repeat(3, increment), donate=False)
    assert programs(compiled)[0].settings["donates"] == ()
    assert compiled(context)["x"].tolist() == [3, 3, 3]
    assert compiled(context)["x"].tolist() == [3, 3, 3]
    assert context["x"].tolist() == [0, 0, 0]


def test_the_branch_beside_still_finds_the_old_value():
    done, seen = threading.Event(), []
    after = host("done")(lambda x, new: done.set() or 1)
    renamed = sequence(stage("x", "new")(lambda x: (x + 1, x)), after)

    @host()
    def late(x):
        assert done.wait(20)
        seen.append(x.tolist())

    last = compile(parallel(renamed, late))(Context(x=jnp.zeros(2)))
    assert seen == [[0, 0]]
    assert last["x"].tolist() == [1, 1]


def test_a_branch_that_gives_what_another_lent_would_not_matter_to_metrics():
    first = stage("metrics")(lambda x: {"a": x})
    uses = stage("z")(lambda metrics: metrics["a"] + 1)
    second = stage("metrics")(lambda x: {"a": 2 * x})
    workflow = parallel(sequence(first, uses), second)
    plain, compiled = (form(Context(x=jnp.ones(()))) for form in (workflow, compile(workflow)))
    assert plain["metrics"]["a"] == compiled["metrics"]["a"] == 3


def test_a_cleanup_after_a_failed_branch_reads_the_old_value():
    done, seen = threading.Event(), []
    finish = host()(lambda x: done.set())

    @host()
    def fail():
        assert done.wait(20)
        raise ZeroDivisionError

    cleanup = host()(lambda x: seen.append(x.tolist()))
    workflow = ensure(parallel(sequence(increment, finish), fail), cleanup)
    with pytest.raises(ZeroDivisionError) as caught:
        compile(workflow)(Context(x=jnp.zeros(2)))
    assert seen == [[0, 0]]
    assert not any("cleanup" in note for note in caught.value.__notes__)


def test_a_rollback_reads_the_values_of_its_moment():
    undone = []
    save = stage("saved", rollback=lambda x, saved: undone.append((x.tolist(), saved.tolist())))(
        lambda x: x + 5
    )
    boom = host()(lambda: 1 / 0)
    change = stage("saved")(lambda saved: saved * 0)
    workflow = sequence(increment, save, increment, change, boom)
    compiled = compile(workflow)
    assert [program.settings["donates"] for program in programs(compiled)] == [(), (), ()]
    for form in (workflow, compiled):
        with pytest.raises(ZeroDivisionError):
            form(Context(x=jnp.zeros(1)))
    assert undone == [([1.0], [6.0])] * 2


def test_a_rollback_of_a_host_stage_reads_what_programs_would_have_reused():
    undone = []
    book = host("booked", rollback=lambda x, booked: undone.append(x.tolist()))(lambda x: 1)
    boom = host()(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compile(sequence(increment, book, increment, boom))(Context(x=jnp.zeros(1)))
    assert undone == [[1.0]]


def test_a_shape_that_changes_is_not_donated_and_nothing_is_warned_of():
    shorter = stage("x", "n")(lambda x, n: (x[1:], n + 1))
    compiled = compile(shorter)
    (program,) = programs(compiled)
    x = jnp.arange(4)
    with Ledger().recording() as ledger:
        last = compiled(Context(x=x, n=jnp.asarray(0)))
    assert last["x"].tolist() == [1, 2, 3]
    assert program.settings["program"].donates == {"n"}
    assert not x.is_deleted()
    assert len(ledger.compiles) == 1
    assert ledger.costs["<lambda>"].calls == 1
    shape = jax.ShapeDtypeStruct((3,), jnp.int32)
    abstract = Context(x=shape, n=jax.ShapeDtypeStruct((), jnp.int32))
    (fresh,) = programs(compile(shorter))
    assert fresh.settings["program"].jaxpr(abstract).out_avals[1].shape == (2,)


def test_what_is_used_up_is_not_donated():
    workflow = sequence(increment, stage("z")(lambda x: x))
    (program,) = programs(compile(workflow))
    assert program.settings["donates"] == ()
    assert program.settings["dropped"] == ("x",)


# Shared arrays


def test_two_slots_that_share_an_array_are_safe():
    x = jnp.zeros(3)
    context = Context(x=x, reference={"w": x})
    last = compile(repeat(2, increment))(context)
    assert (last["x"].tolist(), last["reference"]["w"].tolist()) == ([2, 2, 2], [0, 0, 0])
    assert not x.is_deleted()


def test_a_resource_that_shares_an_array_is_safe():
    x = jnp.zeros(3)
    last = compile(increment)(Context(x=x, about=("the first", x)))
    assert last["about"][1].tolist() == [0, 0, 0]


def test_one_slot_with_an_array_twice_is_safe():
    swap = stage("pair")(lambda pair: (pair[1] + 1, pair[0]))
    x = jnp.zeros(3)
    last = compile(repeat(2, swap))(Context(pair=(x, x)))
    assert [leaf.tolist() for leaf in last["pair"]] == [[1, 1, 1], [1, 1, 1]]


def test_what_a_host_stage_gives_on_outlives_what_it_read():
    best = host("best")(lambda x, step, best=None: x if step == 1 else best)
    last = compile(repeat(4, increment, best))(Context(x=jnp.zeros(3)))
    assert last["best"].tolist() == [2, 2, 2]
    assert last["x"].tolist() == [4, 4, 4]


def test_what_a_host_stage_gives_on_within_a_resource_outlives_what_it_read():
    best = host("best")(lambda x, step, best=None: ("of", step, x) if step == 1 else best)
    last = compile(repeat(4, increment, best))(Context(x=jnp.zeros(3)))
    assert last["best"][2].tolist() == [2, 2, 2]


@pytest.mark.parametrize("wrap", [lambda s: retry(s), lambda s: timeout(s, 20.0)])
def test_what_a_wrapped_host_stage_gives_on_outlives_what_it_read(wrap):
    best = wrap(host("best")(lambda x, step, best=None: x if step == 1 else best))
    last = compile(repeat(4, increment, best))(Context(x=jnp.zeros(3)))
    assert last["best"].tolist() == [2, 2, 2]


def test_a_host_stage_may_give_the_same_array_every_time():
    batch = jnp.ones(3)
    load = host("batch")(lambda: batch)
    halve = stage("batch")(lambda batch: batch / 2)
    add = stage("x")(lambda x, batch: x + batch)
    last = compile(repeat(4, load, halve, add))(Context(x=jnp.zeros(3)))
    assert last["x"].tolist() == [2, 2, 2]
    assert batch.tolist() == [1, 1, 1]


def test_a_host_stage_may_give_one_array_twice():
    both = host("x", "z")(lambda: (jnp.ones(3),) * 2)
    last = compile(sequence(both, increment))(Context())
    assert (last["x"].tolist(), last["z"].tolist()) == ([2, 2, 2], [1, 1, 1])


def test_a_device_stage_may_give_one_array_twice():
    both = stage("x", "z")(lambda x: (x + 1,) * 2)
    last = compile(repeat(3, both))(Context(x=jnp.zeros(3)))
    assert (last["x"].tolist(), last["z"].tolist()) == ([3, 3, 3], [3, 3, 3])


def test_what_passes_through_a_program_is_safe():
    publish = stage("published")(lambda x: x)
    workflow = repeat(4, increment, every(2, publish))
    last = compile(workflow)(Context(x=jnp.zeros(3)))
    assert (last["x"].tolist(), last["published"].tolist()) == ([4, 4, 4], [3, 3, 3])


def test_items_of_a_loop_are_not_overwritten():
    items = [jnp.ones(3), jnp.ones(3)]
    use = sequence(stage("item")(lambda item: 2 * item), stage("x")(lambda x, item: x + item))
    for loop in (repeat(use, over=items), stream(items, use)):
        compiled = compile(loop)
        for _ in range(2):
            assert compiled(Context(x=jnp.zeros(3)))["x"].tolist() == [4, 4, 4]
    assert items[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("make", [lambda f, *s: repeat(*s, over=f), lambda f, *s: stream(f, *s)])
def test_items_that_are_slots_of_the_loop_outlive_it(make):
    both = stage("xs")(lambda xs, item: [item + x for x in xs])
    after = stage("xs")(lambda xs: [10 * x for x in xs])
    workflow = sequence(make(lambda xs: xs, both), after)
    plain, last = (
        form(Context(xs=[jnp.ones(2), jnp.full(2, 2.0)])) for form in (workflow, compile(workflow))
    )
    assert [x.tolist() for x in last["xs"]] == [x.tolist() for x in plain["xs"]]
    assert last["item"].tolist() == plain["item"].tolist()


def test_numpy_arrays_are_not_overwritten():
    raw = np.zeros(100_016, np.float32)
    x = raw[(-raw.ctypes.data % 64) // 4 :][:100_000]  # so aligned, XLA:CPU borrows it
    last = compile(repeat(3, increment))(Context(x=x))
    assert float(last["x"].sum()) == 300_000
    assert float(x.sum()) == 0
    x = np.zeros(3)
    compiled = compile(sequence(tenfold, increment), donate=False)
    context = Context(x=x)
    assert compiled(context)["y"].tolist() == [0, 0, 0]
    assert context["x"] is x


def test_a_run_that_goes_on_from_another_may_share_its_arrays():
    compiled = compile(increment)
    first = compiled(Context(x=jnp.zeros(3)))
    second = compiled(first.replace(best=first["x"]))
    assert (second["x"].tolist(), second["best"].tolist()) == ([2, 2, 2], [1, 1, 1])


# Compilations


def compiles(ledger, name):
    return [c.changed for c in ledger.compiles if c.stage == name]


def test_a_loop_of_many_steps_is_traced_once():
    traced = []

    @stage("x")
    def add(x, step, batch):
        traced.append(step)
        return x + step + batch.sum()

    load = host("batch")(lambda step: np.full(3, step, np.float32))
    with Ledger().recording() as ledger:
        last = compile(repeat(20, load, add))(Context(x=jnp.zeros(())))
    assert last["x"] == 4 * sum(range(20))
    assert len(traced) == 1
    assert compiles(ledger, "add") == [()]


def test_a_changed_shape_compiles_once_more_and_the_ledger_says_what_changed():
    traced = []

    @stage("x")
    def add(x, batch):
        traced.append(batch)
        return x + batch["tokens"].sum()

    load = host("batch")(lambda step: {"tokens": np.zeros(4 if step < 3 else 5, np.float32)})
    with Ledger().recording() as ledger:
        compile(repeat(6, load, add))(Context(x=jnp.zeros(())))
    assert len(traced) == 2
    assert compiles(ledger, "add") == [(), ("batch['tokens'] was float32[4], is float32[5]",)]


def test_a_changed_structure_and_resource_are_said():
    class Model:
        scale = 2

    add = stage("x")(lambda x, model, extra=None: x * model.scale + (extra or {}).get("a", 0))
    compiled = compile(add)
    first, second = Model(), Model()
    with Ledger().recording() as ledger:
        context = compiled(Context(x=jnp.zeros(()), model=first))
        context = compiled(context.replace(model=first))
        context = compiled(context.replace(model=second))
        context = compiled(context.replace(extra={"a": jnp.ones(())}))
        context = compiled(context.replace(model=first).without("extra"))
    assert context["x"] == 2
    _, model, extra = compiles(ledger, "<lambda>")
    assert model == (f"model was Model {id(first):#x}, is Model {id(second):#x}",)
    assert extra == ("extra['a'] was absent, is float32[]",)


def test_resources_of_other_names_are_another_program():
    pick = stage("x")(lambda x, one=None, two=None: x + (1 if one else 0) + (10 if two else 0))
    compiled, thing = compile(pick), object()
    assert compiled(Context(x=0, one=thing))["x"] == 1
    assert compiled(Context(x=0, two=thing))["x"] == 10


def test_numbers_at_the_start_compile_at_most_once_more_and_the_ledger_says_so():
    half = stage("x")(lambda x: x / 2 + jnp.ones(()))
    with Ledger().recording() as ledger:
        compile(repeat(5, half))(Context(x=1.0))
    assert compiles(ledger, "<lambda>") == [(), ("x was weak float32[], is float32[]",)]
    with Ledger().recording() as ledger:
        compile(repeat(5, increment))(Context(x=1))
    assert compiles(ledger, "increment") == [()]


def test_a_second_call_of_a_compiled_workflow_compiles_nothing():
    compiled = compile(repeat(2, increment, fuse(every(2, times_two))))
    with Ledger().recording() as ledger:
        compiled(Context(x=jnp.zeros(())))
        count = len(ledger.compiles)
        compiled(Context(x=jnp.zeros(())))
    assert len(ledger.compiles) == count > 0


def test_tokens_are_counted_though_the_batch_is_replaced():
    clean = stage("batch")(lambda batch: {"tokens": batch["tokens"] % 7})
    workflow = repeat(3, host("batch")(lambda: {"tokens": np.ones((2, 5), np.int32)}), clean)
    with Ledger().recording() as ledger:
        compile(workflow)(Context())
    assert ledger.costs["<lambda>"].tokens >= 30


# Consumed contexts


def test_a_consumed_slot_says_who_took_it_when_and_what_to_do():
    context = Context(x=jnp.zeros(3), y=1)
    compile(repeat(3, host()(lambda: None), increment))(context)
    message = r"'x' is gone.*stage 'increment' reused its memory.*donate=False"
    for read in (
        lambda: context["x"],
        lambda: jax.tree.leaves(context),
        lambda: compile(increment)(context),
        lambda: increment(context),
    ):
        with pytest.raises(RuntimeError, match=message):
            read()
    assert context["y"] == 1

    later = Context(x=jnp.zeros(3), step=4)
    compile(increment)(later)
    with pytest.raises(RuntimeError, match="reused its memory at step 4"):
        later["x"]
    assert repr(later) == "Context(x: consumed, step: ())"


def fails(x):
    if x.sum() > 2:
        raise ZeroDivisionError("of the callback")
    return x


@stage("x")
def call(x):
    return jax.pure_callback(fails, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + 1


def test_a_program_that_fails_as_it_runs_says_where_and_leaves_the_rest_readable():
    seen = []
    cleanup = host()(lambda y=None, step=None: seen.append((y, step)))
    look = host("y")(lambda x: float(x.sum()))
    workflow = ensure(repeat(5, call, look), cleanup)
    with pytest.raises(Exception, match="of the callback") as caught:
        compile(workflow)(Context(x=jnp.zeros(3)))
    assert type(caught.value) in (ValueError, jax.errors.JaxRuntimeError)
    notes = caught.value.__notes__
    assert "In stage 'call'." in notes
    assert "At step 1 of 5." in notes
    assert seen == [(3.0, 1)]


def test_what_a_failed_program_took_is_gone_and_what_it_took_a_copy_of_is_not():
    mine, numpys = jnp.ones(3), np.ones(3, np.float32)
    for x, readable in ((mine, False), (numpys, True)):
        context = Context(x=x)
        with pytest.raises(Exception, match="of the callback"):
            compile(call)(context)
        if readable:
            assert context["x"] is numpys
            with pytest.raises(Exception, match="of the callback"):
                compile(call)(context)
        else:
            with pytest.raises(RuntimeError, match="stage 'call' reused its memory"):
                context["x"]


def test_an_error_while_tracing_consumes_nothing():
    wrong = stage("x")(lambda x: x + jnp.ones(7))
    context = Context(x=jnp.ones(3))
    with pytest.raises(TypeError):
        compile(sequence(increment, wrong))(context)
    assert context["x"].tolist() == [1, 1, 1]


# Errors


def test_an_error_while_tracing_names_the_inner_stage_and_the_step():
    @stage("z")
    def inner(x, step):
        raise LookupError("the original words")

    with pytest.raises(LookupError, match="the original words") as caught:
        compile(repeat(5, increment, inner, start=2))(Context(x=jnp.zeros(3)))
    notes = [note for note in caught.value.__notes__ if not note.startswith("---")]
    assert notes == ["In stage 'inner'.", "At step 2 of 5."]


def test_a_missing_slot_is_named_with_the_program():
    with pytest.raises(KeyError, match=r"'increment \+ tenfold' needs 'x'"):
        compile(sequence(increment, tenfold)).run(Context(z=1))


@pytest.mark.parametrize("value", ["text", lambda: None, {1, 2}])
def test_what_is_not_an_array_cannot_leave_the_device(value):
    first = stage("said")(lambda x: x)
    talk = stage("said")(lambda x: value)
    for workflow in (sequence(first, talk), fuse(first, talk), fuse(when(lambda x: x < 5, talk))):
        with pytest.raises(TypeError, match=r"gives 'said', a \w+, but.*host=True"):
            compile(workflow)(Context(x=jnp.zeros(()), said=0))


def test_a_resource_may_be_given_on_unchanged():
    same = stage("config", "x")(lambda config, x: (config, x + config["step"]))
    last = compile(repeat(2, same))(Context(config={"step": 2, "name": "a"}, x=jnp.zeros(())))
    assert (last["config"]["name"], float(last["x"])) == ("a", 4)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: 1 if x > 0 else 2,
        lambda x: float(x),
        lambda x: np.asarray(x),
        lambda x: [1, 2, 3][x],
        lambda x: list(range(x)),
    ],
)
def test_python_that_asks_for_a_traced_value_is_told_what_to_do(asks):
    with pytest.raises(Exception, match=r"racer|traced") as caught:
        compile(repeat(2, stage("y")(asks)))(Context(x=jnp.asarray(1)))
    assert any("host=True" in n and "jnp.where" in n for n in caught.value.__notes__)


# Fuse


def both(workflow, **values):
    """The last contexts of a workflow and of its compiled form."""
    plain, fused = (
        form(Context(**jax.tree.map(jnp.asarray, values))) for form in (workflow, compile(workflow))
    )
    for name in fused:
        np.testing.assert_array_equal(plain[name], fused[name])
    return fused


def test_fuse_follows_conditions_and_counts_that_the_device_computes():
    collatz = when(lambda x: x % 2 == 0, stage("x")(lambda x: x // 2), otherwise=odd)
    loop = fuse(repeat(lambda n: n, when(lambda x: x > 1, collatz, count_up)))
    for n in (0, 1, 3, 200):
        assert both(loop, x=27, n=n, count=0)["count"] == min(n, 111)
    (program,) = programs(compile(loop))
    assert program.parts[0].kind == "fuse"


odd = stage("x")(lambda x: 3 * x + 1)
count_up = stage("count")(lambda count: count + 1)


def test_what_is_given_under_a_condition_replaces_what_was_there():
    conditional = fuse(when(lambda x: x > 0, tenfold))
    assert both(conditional, x=2, y=7)["y"] == 20
    assert both(conditional, x=-2, y=7)["y"] == 7
    sometimes = repeat(4, increment, fuse(every(2, tenfold)), host()(lambda: None))
    assert both(sometimes, x=0, y=7)["y"] == 30
    never = fuse(repeat(lambda n: n, tenfold))
    assert both(never, x=2, y=7, n=0)["y"] == 7


def test_what_is_given_under_a_condition_outlives_a_program_that_used_it_up():
    use = stage("z")(lambda y: y + 1)
    later = fuse(when(lambda x: x > 5, tenfold))
    workflow = sequence(tenfold, use, host()(lambda: None), later)
    assert both(workflow, x=2, y=7)["y"] == 20


def test_what_is_given_under_a_condition_needs_a_first_value():
    absent = Context(x=jnp.asarray(1), n=jnp.asarray(2))
    reads = stage("z")(lambda x, y=0: x + y)
    for workflow in (
        fuse(when(lambda x: x > 0, tenfold)),
        fuse(repeat(lambda n: n, tenfold)),
        fuse(when(lambda x: x > 0, tenfold), reads),
        fuse(repeat(lambda n: n, reads, tenfold)),
        fuse(repeat(lambda n: n, when(lambda x: x > 0, tenfold), reads)),
        sequence(fuse(when(lambda x: x > 0, tenfold)), host("z")(reads.fn)),
    ):
        with pytest.raises(ValueError, match=r"gives 'y' only if.*Give 'y' a first value"):
            compile(workflow)(absent)
    scratch = fuse(when(lambda x: x > 0, tenfold, stage("x")(lambda y: y)))
    assert both(scratch, x=2)["x"] == 20
    either = fuse(when(lambda x: x > 0, tenfold, otherwise=stage("y")(lambda x: -x)), reads)
    assert both(either, x=-2)["z"] == 0


def test_a_loop_in_fuse_gives_in_its_first_turn_what_was_not_there():
    grow = stage("x")(lambda x, y=None: x + (1 if y is None else y))
    assert both(fuse(repeat(3, grow, tenfold)), x=1)["x"] == 242
    shorter = stage("v")(lambda v: v[1:])
    assert both(fuse(repeat(1, shorter), repeat(0, shorter)), v=np.arange(4))["v"].shape == (3,)


def test_the_number_of_a_loop_in_fuse_is_left_behind():
    add = stage("x")(lambda x, step: x + step)
    read = stage("z")(lambda step: step)
    assert both(fuse(repeat(4, add), read), x=0)["z"] == 3
    uncertain = fuse(repeat(lambda n: n, add))
    assert both(uncertain, x=0, n=3, step=9)["step"] == 2
    assert both(uncertain, x=0, n=0, step=9)["step"] == 9
    nested = fuse(repeat(lambda n: n, repeat(2, add), add))
    assert both(nested, x=0, n=3, step=9)["step"] == 1
    assert both(fuse(repeat(3, repeat(2, add), add)), x=0)["step"] == 1
    assert both(fuse(repeat(lambda n: n, add, start=lambda s: s)), x=0, n=5, s=2)["x"] == 9


def test_counts_and_conditions_that_are_known_are_decided_while_tracing():
    class Config:
        turns = np.int64(3)
        careful = 1

    loop = repeat(lambda config: config.turns, tenfold)  # gives y, which was not there
    chosen = when(lambda config: config.careful, stage("z")(lambda x: x))
    items = repeat(stage("x")(lambda x, item: x + item), over=lambda config: [1, 2])
    last = compile(fuse(loop, chosen, items))(Context(x=jnp.asarray(2), config=Config()))
    assert (int(last["y"]), int(last["z"]), int(last["x"])) == (20, 2, 5)
    empty = fuse(repeat(lambda config: 0, tenfold))
    assert compile(empty)(Context(x=jnp.asarray(2), y=7, config=Config()))["y"] == 7


def test_a_bound_that_is_no_whole_number_is_refused_on_the_device_too():
    for workflow in (repeat(lambda n: n, increment), fuse(repeat(lambda n: n, increment))):
        with pytest.raises(TypeError):
            compile(workflow)(Context(x=0, n=jnp.asarray(2.0)))


def test_parallel_in_fuse_merges_and_adds_metrics():
    left = stage("metrics")(lambda x: {"a": x})
    right = stage("metrics", "y")(lambda x: ({"a": x, "b": x}, x))
    last = compile(fuse(parallel(left, right)))(Context(x=jnp.asarray(2)))
    assert jax.tree.map(int, last["metrics"]) == {"a": 4, "b": 2}
    doubtful = fuse(parallel(when(lambda x: x > 0, left), right))
    with pytest.raises(ValueError, match=r"only under a condition.*leave fuse and chunk out"):
        compile(doubtful)(Context(x=jnp.asarray(2), metrics={"a": 0, "b": 0}))


def test_fuse_refuses_what_can_be_rolled_back():
    undo = stage("x", rollback=lambda x: None)(lambda x: x + 1)
    with pytest.raises(ValueError, match=r"rollback of <lambda>"):
        compile(sequence(fuse(repeat(2, undo))))


def test_a_carried_value_keeps_its_shape_and_type_and_the_error_says_which():
    for grow, leaf in (
        (lambda state: {"w": jnp.concatenate([state["w"]] * 2)}, r"\(2,\)|int32\[2\]"),
        (lambda state: {"w": state["w"] / 2}, r"int32\[2\]"),
        (lambda state: {"v": state["w"]}, "absent"),
    ):
        loop = fuse(repeat(lambda n: n, stage("state")(grow)))
        with pytest.raises((ValueError, KeyError), match=rf"state\['w'\] is {leaf}|'w'"):
            compile(loop)(Context(state={"w": jnp.ones(2, int)}, n=jnp.asarray(3)))


# Beside each other


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_producer_reads_published_weights_while_the_consumer_lends_memory(where):
    seen = []

    def sample(weights, version, frozen):
        return weights + frozen

    @stage("weights", "momentum")
    def learn(weights, momentum, sample):
        return weights + 1 + 0 * sample, momentum + 1

    @host()
    def look(weights, momentum, sample, version, step):
        seen.append((momentum, int(sample[0]) - version, step - version))

    producer = stage("sample", host=where == "host")(sample)
    loop = async_loop(producer, learn, look, stop_when=lambda step: step >= 200, buffer_size=3)
    compiled = compile(loop)
    donates = [program.settings["donates"] for program in programs(compiled)]
    assert donates == ([("momentum",)] if where == "host" else [(), ("momentum",)])
    frozen = jnp.zeros(50)
    last = compiled(Context(weights=jnp.zeros(50), momentum=jnp.zeros(50), frozen=frozen))
    assert last["weights"][0] == last["momentum"][0] == 200
    assert all(momentum.is_deleted() for momentum, _, _ in seen[:-1])
    assert all(published == 0 for _, published, _ in seen)
    assert not frozen.is_deleted()


def test_what_a_producer_gives_on_outlives_the_loop():
    producer = host("sample")(lambda weights: weights)
    learn = stage("weights")(lambda weights, sample: weights + 1)
    loop = async_loop(producer, learn, stop_when=lambda step: step >= 3, buffer_size=1)
    after = stage("weights")(lambda weights: weights + 1)
    last = compile(sequence(stage("weights")(lambda: jnp.zeros(3)), loop, after))(Context())
    assert last["weights"].tolist() == [4, 4, 4]
    assert last["sample"][0] in (0, 1, 2)


# What flows


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (lambda: jax.random.key(0), lambda v: jax.random.split(v)[0]),
        (lambda: jax.random.split(jax.random.key(0), 3), lambda v: v[::-1]),
        (lambda: jnp.ones(3, jnp.bfloat16), lambda v: v * 1.5),
        (lambda: jnp.ones((2, 2), bool), lambda v: ~v),
        (lambda: jnp.zeros((0, 4)), lambda v: v + 1),
        (lambda: None, lambda v: v),
        (lambda: {"a": None, "b": (jnp.ones(()), [])}, lambda v: v),
    ],
)
def test_all_kinds_of_arrays_flow(value, change):
    turn = stage("v")(change)
    for workflow in (repeat(3, turn), fuse(repeat(3, turn)), fuse(repeat(lambda n: n, turn))):
        plain, last = (
            form(Context(v=value(), n=jnp.asarray(3))) for form in (workflow, compile(workflow))
        )
        assert jax.tree.structure(last["v"]) == jax.tree.structure(plain["v"])
        for x, y in zip(jax.tree.leaves(plain["v"]), jax.tree.leaves(last["v"]), strict=True):
            assert x.dtype == y.dtype
            data = jax.random.key_data if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.array
            np.testing.assert_array_equal(data(x), data(y))


def test_the_number_of_a_loop_is_as_weak_on_the_device_as_on_the_host():
    add = stage("x")(lambda x, step: x + step)
    for workflow in (repeat(4, add), fuse(repeat(4, add)), fuse(repeat(lambda n: n, add))):
        last = compile(workflow)(Context(x=jnp.zeros((), jnp.int8), n=4))
        assert (int(last["x"]), last["x"].dtype) == (6, jnp.int8)
