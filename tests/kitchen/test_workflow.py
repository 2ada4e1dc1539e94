import inspect
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from crucible import kitchen, telemetry
from crucible.kitchen import (
    Context,
    async_loop,
    check,
    compile,
    ensure,
    every,
    fuse,
    parallel,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    timeout,
    when,
)
from crucible.kitchen.wiring import every_part, may_give, wiring_problems


@stage("x")
def increment(x):
    return x + 1


@stage("x")
def double(x):
    return 2 * x


@stage("seen")
def remember(seen, step):
    return (*seen, step)


@stage("y", "z")
def split(x, offset=10):
    return x, x + offset


@stage("z", host=True)
def outside(x):
    return x


def positive(x):
    return x > 0


def three(x=0):
    return 3


def test_a_stage_is_a_function_from_context_to_context_and_of_its_slots():
    context = Context(x=1)
    assert increment(context)["x"] == 2
    assert context["x"] == 1
    assert increment.fn(41) == 42


def test_a_parameter_with_a_default_is_optional_and_taken_if_there():
    assert split.needs == ("x",)
    assert split(Context(x=1))["z"] == 11
    assert split(Context(x=1, offset=100))["z"] == 101


def test_a_stage_that_gives_nothing_changes_nothing():
    context = Context(x=1)
    assert stage()(lambda x: None)(context) is context


def test_a_missing_slot_is_named_with_the_stage_and_the_closest_name():
    with pytest.raises(KeyError, match="'increment' needs 'x'"):
        increment(Context(y=1))
    with pytest.raises(KeyError, match="Did you mean 'seem'"):
        remember(Context(seem=(), step=0))


@pytest.mark.parametrize("result", [1, (1,), (1, 2, 3), None])
def test_returning_another_number_of_values_than_given_is_an_error(result):
    with pytest.raises(TypeError, match="gives a, b, but returned"):
        stage("a", "b")(lambda: result)(Context())


def test_needs_that_cannot_be_read_are_refused():
    with pytest.raises(TypeError, match="Name its parameters"):
        stage("x")(lambda *args: args)
    with pytest.raises(TypeError, match="with parentheses"):
        stage(increment.fn)  # type: ignore[arg-type]


def test_a_sequence_runs_in_order_and_computes_its_needs_and_gives():
    both = sequence(increment, split, stage("w")(lambda y, v: y + v))
    assert (both.needs, both.gives) == (("x", "v"), ("x", "y", "z", "w"))
    assert (both.optional, both.reads) == (("offset",), ("x", "v", "offset"))
    assert sequence(increment, stage()(lambda x=0, offset=0: None), split).optional == ("offset",)
    assert when(positive, increment, otherwise=stage()(lambda x=0: None)).optional == ()
    assert sequence(increment, double)(Context(x=1))["x"] == 4
    assert sequence(double, increment)(Context(x=1))["x"] == 3


def test_a_workflow_that_would_miss_something_does_not_begin():
    ran = []
    with pytest.raises(KeyError, match="'sequence' needs 'unknown'"):
        sequence(stage()(lambda: ran.append(1)), stage()(lambda unknown: None))(Context())
    assert ran == []


def test_zero_repetitions_are_zero_repetitions():
    for loop in (repeat(0, remember), repeat(3, remember, start=3), repeat(2, remember, start=5)):
        assert loop(Context(seen=()))["seen"] == ()


def test_a_loop_runs_from_its_start_and_gives_its_number():
    loop = repeat(5, remember, start=2)
    assert loop(Context(seen=()))["seen"] == (2, 3, 4)
    assert loop.needs == ("seen",)


def test_a_count_may_be_a_function_of_the_context():
    loop = repeat(lambda total: total - 1, remember, start=lambda first: first)
    assert set(loop.needs) == {"total", "first", "seen"}
    assert loop(Context(seen=(), total=4, first=1))["seen"] == (1, 2)


def test_loops_nest_by_the_name_of_their_number():
    pair = stage("seen")(lambda seen, step, epoch: (*seen, (epoch, step)))
    loop = repeat(2, repeat(2, pair), index="epoch")
    assert loop(Context(seen=()))["seen"] == ((0, 0), (0, 1), (1, 0), (1, 1))


def test_every_runs_at_multiples_and_never_at_zero():
    assert repeat(7, every(3, remember))(Context(seen=()))["seen"] == (0, 3, 6)
    assert repeat(7, every(0, remember))(Context(seen=()))["seen"] == ()
    with pytest.raises(ValueError, match="or 0 for never"):
        every(-1, remember)


def test_when_chooses_and_nests():
    sign = when(lambda x: x > 0, increment, otherwise=when(lambda x: x < 0, double))
    assert [sign(Context(x=x))["x"] for x in (3, -3, 0)] == [4, -6, 0]
    assert when(True, increment)(Context(x=1))["x"] == 2
    assert when(False, increment)(Context(x=1))["x"] == 1


def test_what_only_one_branch_gives_is_not_promised():
    assert when(positive, split).gives == ()
    assert when(positive, split, otherwise=increment).gives == ()
    assert when(positive, split, increment, otherwise=increment).gives == ("x",)
    assert every(2, split).gives == ()
    assert repeat(lambda n: n, split).gives == ()
    assert stream([1], split).gives == ()
    assert repeat(1, split).gives == ("step", "y", "z")


def test_what_is_decided_when_it_is_built_is_not_part_of_the_workflow():
    """A literal boolean crashed the predecessor's runner, and 0 turns were two."""
    other = stage("x")(lambda unknown: unknown)
    for live, dead in (
        (when(True, increment, otherwise=other), when(False, other, otherwise=increment)),
        (every(1, increment), every(0, other)),
        (repeat(1, increment), repeat(0, other)),
        (repeat(increment, over=[7]), repeat(other, over=[])),
    ):
        assert (live.needs, "x" in live.gives) == (("x",), True)
        assert "unknown" not in dead.needs
        assert other not in tuple(every_part(dead))
        assert live(Context(x=1))["x"] == 2
    for dead in (when(False, other), every(0, other), repeat(0, other), repeat(other, over=())):
        assert (dead.needs, dead.gives, may_give(dead), dead.host) == ((), (), set(), False)
        assert dict(dead(Context(x=1))) == {"x": 1}


def test_the_check_names_the_stage_and_answers_a_misspelling():
    workflow = sequence(stage("stat")(lambda: 1), repeat(2, stage("x")(lambda state: state)))
    with pytest.raises(ValueError, match=r"needs 'state', which nothing gives.*mean 'stat'"):
        check(workflow, given=())
    check(workflow, given=("state",))
    again = repeat(2, stage("state")(lambda state: state))  # it gives what it needs, too late
    with pytest.raises(ValueError, match=r"needs 'state'.*only later.*\(state=None\)"):
        check(again, given=("stat",))
    with pytest.raises(ValueError, match="The condition or count of when"):
        check(sequence(when(lambda ready: ready, increment)), given=("x",))


def test_an_error_keeps_its_type_and_says_stage_and_position():
    @stage("x")
    def fails(step):
        if step == 2:
            raise ZeroDivisionError("the original words")
        return step

    with pytest.raises(ZeroDivisionError, match="the original words") as caught:
        sequence(repeat(5, every(1, fails)))(Context())
    assert caught.value.__notes__ == ["In stage 'fails'.", "At step 2 of 5."]


def test_a_failed_stage_stops_the_loop():
    ran = []

    @stage()
    def note(step):
        ran.append(step)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        repeat(5, note)(Context())
    assert ran == [0]


EXPRESSIONS = [
    "sequence()",
    "sequence(increment, sequence(double, split))",
    "fuse(increment, when(positive, double))",
    "repeat(3, increment)",
    "repeat(three, increment, start=three, index='epoch', chunk=4)",
    "repeat(3, increment, start=1, chunk='auto')",
    "repeat(0, increment)",
    "repeat(increment, over=['a', 'b'], index='i', item='letter')",
    "repeat(increment, double, over=three)",
    "repeat(increment, over=[])",
    "every(0, increment)",
    "every(1, increment)",
    "every(4, increment, double, index='epoch')",
    "when(positive, increment, double)",
    "when(positive, increment, otherwise=double)",
    "when(positive, otherwise=sequence(double, increment))",
    "when(positive, sequence(increment), otherwise=sequence())",
    "when(True, increment, otherwise=double)",
    "when(False, increment)",
    "ensure(increment, double)",
    "retry(outside, attempts=2, backoff=0.5, on=(OSError, ValueError))",
    "retry(outside, attempts=3, backoff=1, on=(OSError,))",
    "timeout(outside, 2.5)",
    "parallel(increment, outside)",
    "parallel(increment, outside, max_concurrency=1)",
    "parallel(increment, outside, max_concurrency=three)",
    "stream([1, 2], increment)",
    "stream(three, increment, item='line', index='number', prefetch=5)",
    "async_loop(outside, increment, stop_when=positive)",
    "async_loop(outside, increment, stop_when=positive, buffer_size=1, index='turn', "
    "version='age', start=three)",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_workflow_prints_as_the_expression_that_made_it(expression):
    made = eval(expression)
    assert repr(made) == str(made) == expression
    if made.parts and "True" not in expression and "False" not in expression:
        assert repr(made.again(*made.parts)) == expression
        put = repr(made.again(*[sequence(part) for part in made.parts]))
        assert put.count("sequence(") >= expression.count("sequence(") + 1


def test_every_combinator_is_printed_above():
    made = [eval(expression) for expression in EXPRESSIONS]
    public = [getattr(kitchen, name) for name in kitchen.__all__]
    makers = {
        f.__name__
        for f in public
        if inspect.isfunction(f) and inspect.signature(f).return_annotation == "Stage"
        if ".workflows." not in f.__module__ and f is not compile
    }
    assert {workflow.kind for workflow in made} == makers


def test_a_function_without_a_name_prints_as_what_it_reads():
    workflow = sequence(repeat(lambda config: 3, increment), when(lambda x, y: x > y, split))
    assert repr(workflow) == "sequence(repeat(λ(config), increment), when(λ(x, y), split))"


@pytest.mark.parametrize(
    "combinator",
    [
        sequence,
        fuse,
        parallel,
        lambda s: repeat(1, s),
        lambda s: repeat(s, over=[1]),
        lambda s: every(1, s),
        lambda s: when(True, s),
        lambda s: when(False, otherwise=s),
        lambda s: ensure(s, increment),
        lambda s: ensure(increment, s),
        lambda s: stream([1], s),
        lambda s: async_loop(s, increment, stop_when=positive),
        lambda s: async_loop(increment, s, stop_when=positive),
        lambda s: timeout(s, 1),
        lambda s: retry(s),
    ],
)
def test_only_stages_can_be_combined(combinator):
    with pytest.raises(TypeError, match=r"takes stages, not .* Decorate a function|for host.*not"):
        combinator(lambda x: x)


@pytest.mark.parametrize(
    "build",
    [
        lambda: when(increment, double),
        lambda: stream(increment, double),
        lambda: repeat(double, over=increment),
        lambda: async_loop(increment, double, stop_when=increment),
        lambda: repeat(3, double, start=increment),
    ],
)
def test_a_stage_in_the_place_of_a_function_is_refused(build):
    with pytest.raises(TypeError, match="stage increment stands where"):
        build()


def test_keyword_parameters_that_cannot_be_read_are_refused():
    with pytest.raises(TypeError, match=r"takes \*\*options.*Name its parameters"):
        stage("x")(lambda **options: options)


def test_a_parameter_whose_default_is_none_is_optional():
    tell = stage("said")(lambda x, frozen=None: (x, frozen))
    assert tell.needs == ("x",)
    assert tell(Context(x=1))["said"] == (1, None)


def test_a_combination_touches_the_host_if_any_part_does():
    outside = stage("x", host=True)(lambda x: x)
    assert outside.host
    assert not increment.host
    assert sequence(increment, outside).host
    assert repeat(2, every(2, when(positive, increment, otherwise=outside))).host
    assert not repeat(2, every(2, when(True, increment, otherwise=outside))).host
    assert not sequence(increment, double).host


def test_stages_of_one_function_are_equal():
    assert stage("x")(increment.fn) == stage("x")(increment.fn) == increment
    assert stage("x")(increment.fn) != stage("y")(increment.fn)


def test_ctrl_c_in_a_loop_says_where():
    @stage()
    def interrupted(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        repeat(5, interrupted)(Context())
    assert caught.value.__notes__ == ["In stage 'interrupted'.", "At step 3 of 5."]


def test_the_number_of_a_loop_that_runs_can_be_read_after_it():
    after = stage("last")(lambda step: step)
    assert sequence(repeat(3, increment), after).needs == ("x",)
    assert sequence(repeat(3, increment), after)(Context(x=0))["last"] == 2


def test_every_needs_the_number_of_a_loop():
    assert every(2, increment).needs == ("step", "x")
    with pytest.raises(ValueError, match="needs 'step'"):
        check(every(2, increment), given=("x",))


def test_each_need_is_named_once_and_with_the_stage_that_has_it_on_either_branch():
    chosen = when(lambda x: x > 0, increment, otherwise=split)
    assert chosen.needs == ("x",)
    chosen = when(positive, increment, otherwise=stage("x")(lambda other: other))
    assert chosen.needs == ("x", "other")
    with pytest.raises(ValueError, match="Stage '<lambda>' needs 'other'"):
        check(chosen, given=("x",))


def test_the_items_of_a_collection_come_with_their_number():
    pair = stage("seen")(lambda seen, index, item: (*seen, (index, item)))
    for items in (["a", "b"], ("a", "b"), dict.fromkeys("ab").keys(), np.array(["a", "b"])):
        assert repeat(pair, over=items)(Context(seen=()))["seen"] == ((0, "a"), (1, "b"))
        loop = repeat(pair, over=lambda items: items)
        assert loop.needs == ("items", "seen")
        assert loop(Context(seen=(), items=items))["seen"] == ((0, "a"), (1, "b"))
    last = repeat(pair, over=["a", "b"])(Context(seen=()))
    assert (last["index"], last["item"]) == (1, "b")


def test_a_collection_is_asked_for_once_and_kept_as_it_was():
    asked = []

    def items(pool):
        asked.append(1)
        return pool

    @stage("pool", host=True)
    def change(pool, item):
        pool.append(item)
        return pool

    after = repeat(change, over=items)(Context(pool=["a", "b"]))
    assert (after["pool"], len(asked)) == (["a", "b", "a", "b"], 1)


class _Rows:
    """As a dataset is: it has a length and items, and cannot be asked what it contains."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return range(10, 12)[i]

    def __iter__(self):
        return iter((10, 11))


def test_a_dataset_with_a_length_is_a_collection():
    add = stage("x")(lambda x, item: x + item)
    assert repeat(add, over=_Rows())(Context(x=0))["x"] == 21
    assert repeat(add, over=jnp.arange(4))(Context(x=0))["x"] == 6


@pytest.mark.parametrize("items", [(i for i in [1]), "ab", b"ab", {"a": 1}, 5, iter([1]), None])
def test_what_is_not_a_collection_is_refused(items):
    advice = "but needs a collection.*For what is lazy or endless there is stream"
    with pytest.raises(TypeError, match=rf"over=λ\(\)\) got a {type(items).__name__}, {advice}"):
        repeat(increment, over=lambda: items)(Context(x=1))
    if items is not None:
        with pytest.raises(TypeError, match=f"got a {type(items).__name__}, {advice}"):
            repeat(increment, over=items)


def test_no_items_are_no_turns():
    for over in ([], lambda: ()):
        assert dict(repeat(increment, over=over)(Context(x=1))) == {"x": 1}


def test_a_negative_count_is_no_turns():
    assert repeat(-1, remember)(Context(seen=()))["seen"] == ()
    assert repeat(lambda n: n, remember)(Context(seen=(), n=-5))["seen"] == ()
    assert repeat(1, remember, start=-1)(Context(seen=()))["seen"] == (-1, 0)


def test_counts_are_whole_numbers_of_any_kind():
    assert repeat(np.int64(2), remember)(Context(seen=()))["seen"] == (0, 1)
    assert repeat(np.int64(2), remember).gives == ("step", "seen")
    assert repeat(lambda: np.int32(2), remember)(Context(seen=()))["seen"] == (0, 1)
    assert type(repeat(lambda: jnp.int32(1), remember)(Context(seen=()))["step"]) is int
    assert repeat(4, every(np.int64(2), remember))(Context(seen=()))["seen"] == (0, 2)
    for count in (2.0, "3", None):
        with pytest.raises(TypeError, match="the count must be a whole number, or a function"):
            repeat(count, increment)
    with pytest.raises(TypeError, match="start must be a whole number"):
        repeat(3, increment, start=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="period must be a whole number"):
        every(0.5, increment)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a period is a number of steps"):
        every(lambda: 2, increment)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float"):
        repeat(lambda: 2.0, increment)(Context(x=1))


def test_repeat_without_a_count_or_with_a_start_of_items_is_refused():
    for arguments in ((), (increment,)):
        with pytest.raises(TypeError, match="a count before its stages, or over="):
            repeat(*arguments)
    with pytest.raises(TypeError, match="leave start= out"):
        repeat(increment, over=[1], start=1)
    for chunk in (0, -1, 1.5, True, "all"):
        with pytest.raises(ValueError, match="must be a number of steps from 1 on"):
            repeat(3, increment, chunk=chunk)


def test_a_chunk_that_is_a_function_says_what_it_needs():
    loop = repeat(3, increment, chunk=lambda config: config.chunk)
    assert loop.needs == ("config", "x")


def test_a_condition_takes_an_optional_value_if_it_is_there():
    chosen = when(lambda x, limit=5: x > limit, increment)
    assert (chosen.needs, chosen.optional) == (("x",), ("limit",))
    assert chosen(Context(x=3))["x"] == 3
    assert chosen(Context(x=3, limit=1))["x"] == 4


def test_a_condition_that_misses_something_is_told_what_there_is():
    with pytest.raises(KeyError, match=r"λ\(reddy\) needs 'reddy'.*Did you mean 'ready'"):
        sequence(when(lambda reddy: reddy, increment)).run(Context(ready=True, x=1))


def test_nested_loops_have_numbers_of_their_own():
    note = stage("seen", host=True)(lambda seen, epoch, step, i, item: (*seen, (epoch, step, item)))
    loop = repeat(2, repeat(note, over=lambda epoch: "ab"[epoch:], index="i"), index="epoch")
    loop = repeat(1, repeat(note, over=lambda epoch: ["a", "b"][epoch:], index="i"))
    loop = repeat(2, loop, index="epoch")
    seen = loop(Context(seen=()))["seen"]
    assert seen == ((0, 0, "a"), (0, 0, "b"), (1, 0, "b"))


def test_every_may_follow_an_outer_loop():
    loop = repeat(4, repeat(2, every(3, remember, index="epoch")), index="epoch")
    assert loop(Context(seen=()))["seen"] == (0, 1, 0, 1)
    with pytest.raises(KeyError, match=r"every\(2, \.\.\.\) needs 'epoc'.*mean 'epoch'"):
        repeat(1, every(2, increment, index="epoc"), index="epoch").run(Context(x=1))


@pytest.mark.parametrize("deep", [2, 3])
def test_conditions_nest_in_conditions(deep):
    """The predecessor closed the outer one at the inner one's end."""
    workflow = sequence(increment)
    for level in range(deep):
        tail = stage("x")(lambda x: x + 100)
        workflow = when(lambda x, level=level: x >= 0, sequence(workflow, tail))
    assert workflow(Context(x=0))["x"] == 1 + 100 * deep
    assert workflow(Context(x=-1))["x"] == -1


def test_a_compiled_condition_prints_its_programs():
    compiled = compile(when(lambda on: on, increment, double, otherwise=split))
    assert repr(compiled) == "when(λ(on), program(increment, double), otherwise=program(split))"


def test_fuse_takes_only_what_can_be_one_program():
    with pytest.raises(ValueError, match=r"'outside' touches the host.*before or after"):
        fuse(increment, sequence(outside))
    with pytest.raises(ValueError, match=r"stream\(\[1\], increment\), which needs a thread"):
        fuse(repeat(2, stream([1], increment)))
    with pytest.raises(ValueError, match="which needs a thread"):
        fuse(async_loop(split, increment, stop_when=positive))
    undone = stage("x", rollback=lambda x: None)(lambda x: x)
    with pytest.raises(ValueError, match="cannot make the rollback of <lambda> part"):
        fuse(sequence(undone))
    assert fuse(increment, when(positive, double))(Context(x=1))["x"] == 4


def test_an_error_in_nested_loops_says_every_position():
    @stage("x")
    def fails(step, index):
        if (step, index) == (1, 2):
            raise ZeroDivisionError("the original words")
        return step

    loop = repeat(2, repeat(fails, over=list("abc")))
    with pytest.raises(ZeroDivisionError, match="the original words") as caught:
        loop(Context(secret="do not tell"))
    notes = ["In stage 'fails'.", "At index 2 of 3.", "At step 1 of 2."]
    assert caught.value.__notes__ == notes
    assert str(caught.value) == "the original words"
    assert repr(caught.value) == "ZeroDivisionError('the original words')"


def test_an_error_of_a_condition_says_where():
    with pytest.raises(ZeroDivisionError) as caught:
        repeat(2, when(lambda step: 1 / (1 - step), increment))(Context(x=1))
    assert caught.value.__notes__ == ["At step 1 of 2."]


def test_a_stage_used_within_a_stage_says_so_once():
    @stage("x", host=True)
    def outer(x):
        return fails(Context(x=x, private=1))["x"]

    @stage("x")
    def fails(x):
        raise ValueError("what it said")

    found = []
    look = stage(host=True)(lambda x, private=None: found.append((x, private)))
    with pytest.raises(ValueError, match="what it said") as caught:
        ensure(sequence(increment, outer), look)(Context(x=1))
    assert caught.value.__notes__ == ["In stage 'fails'."]
    assert found == [(2, None)]  # the run's context, not that of the stage within


def test_steps_are_told_to_who_listens():
    told = []
    with telemetry.attached("test", "training.step", told.append):
        repeat(3, increment, start=1)(Context(x=0))
        repeat(increment, over=[1, 2])(Context(x=0))  # not steps
        with pytest.raises(KeyError):
            repeat(1, remember).run(Context())
    names = [event.name.rpartition(".")[2] for event in told]
    assert names == ["start", "stop"] * 2 + ["start", "exception"]
    steps = [event.metadata["step"] for event in told if event.name.endswith("stop")]
    assert steps == [1, 2]
    assert told[0].metadata["total_steps"] == 3


def test_the_check_says_all_that_is_missing():
    workflow = sequence(remember, when(lambda ready: ready, split), repeat(2, every(3, increment)))
    problems = wiring_problems(workflow, ())
    assert [p.split(", which nothing gives")[0] for p in problems] == [
        "Stage 'remember' needs 'seen'",
        "Stage 'remember' needs 'step'",
        "The condition or count of when(λ(ready), split) needs 'ready'",
        "Stage 'split' needs 'x'",
    ]
    assert "given only later" in problems[1]
    assert wiring_problems(workflow, ("seen", "step", "ready", "x")) == []


def test_a_cleanup_that_needs_what_the_body_gives_is_refused():
    close = stage(host=True)(lambda file: None)
    work = stage("file", host=True)(lambda: "open")
    with pytest.raises(ValueError, match=r"needs 'file'.*\(file=None\)"):
        check(ensure(work, close), given=())
    check(ensure(work, close), given=("file",))
    assert ensure(work, close).gives == ("file",)


# Below, workflows of stages that only pass on names are generated, and run for every outcome of
# their conditions and counts.

NAMES = ("a", "b", "c", "d")
names = st.lists(st.sampled_from(NAMES), unique=True, max_size=2).map(tuple)
leaf_specs = st.tuples(st.just("leaf"), names, names, names)
COMBINATORS = (
    *("sequence", "repeat", "over", "counted", "over_function", "every", "literal_every", "when"),
    *("literal_when", "parallel", "stream", "async_loop", "ensure", "retry", "timeout"),
)


def combined_specs(children):
    parts = st.lists(children, min_size=1, max_size=3).map(tuple)
    return st.tuples(st.sampled_from(COMBINATORS), parts, st.integers(0, 2), leaf_specs)


specs = st.recursive(leaf_specs, combined_specs, max_leaves=6)


class Builder:
    """Builds a workflow from a specification, with a slot for each outcome that is open.

    Attributes:
        controls: for each such slot, its possible values.
        found: what the stages found: (stage, names).
    """

    def __init__(self):
        self.controls, self.found = {}, set()
        self._numbers = itertools.count()

    def control(self, *values):
        name = f"control{next(self._numbers)}"
        self.controls[name] = values
        return name

    def fresh(self, what):
        return f"{what}{next(self._numbers)}"

    def leaf(self, spec, needs=None, gives=None, record=True):
        _, spec_needs, spec_gives, optional = spec
        needs = spec_needs if needs is None else needs
        gives = spec_gives if gives is None else gives
        number = next(self._numbers)

        def fn(**values):
            if record:
                self.found.add((number, frozenset(values)))
            return 0 if len(gives) == 1 else tuple(0 for _ in gives)

        optional = [name for name in optional if name not in needs]
        return stage(*gives, host=True)(_with_parameters(fn, needs, optional))

    def build(self, spec):
        if spec[0] == "leaf":
            return self.leaf(spec)
        kind, parts, number, extra = spec
        return getattr(self, f"_{kind}")([self.build(part) for part in parts], number, extra)

    def _sequence(self, parts, number, extra):
        return sequence(*parts)

    def _repeat(self, parts, number, extra):
        return repeat(number, *parts, index=self.fresh("index"))

    def _over(self, parts, number, extra):
        return repeat(*parts, over=[5] * number, index=self.fresh("index"), item=self.fresh("item"))

    def _counted(self, parts, number, extra):
        """The first part runs at every second turn; the first turn may or may not be one."""
        control, index = self.control((0, 0), (0, 1), (1, 2), (1, 3)), self.fresh("index")
        start, stop = (_reader(control, lambda pair, i=i: pair[i]) for i in (0, 1))
        return repeat(stop, every(2, parts[0], index=index), *parts[1:], start=start, index=index)

    def _over_function(self, parts, number, extra):
        items = _reader(self.control(0, 1, 2), lambda n: [5] * n)
        return repeat(*parts, over=items, index=self.fresh("index"), item=self.fresh("item"))

    def _every(self, parts, number, extra):
        return every(2, *parts, index=self.control(0, 1))

    def _literal_every(self, parts, number, extra):
        return every(number % 2, *parts)

    def _when(self, parts, number, extra):
        condition = _reader(self.control(False, True), bool)
        return when(condition, *parts[1:], otherwise=parts[0] if number else None)

    def _literal_when(self, parts, number, extra):
        return when(number > 0, *parts[1:], otherwise=parts[0])

    def _parallel(self, parts, number, extra):
        overlap = sum(len(may_give(part)) for part in parts) - len(
            set().union(*map(may_give, parts))
        )
        if not overlap:
            return parallel(*parts, max_concurrency=number or None)
        with pytest.raises(ValueError, match="both give"):
            parallel(*parts)
        return sequence(*parts)

    def _stream(self, parts, number, extra):
        items = _reader(self.control(0, 1, 2), range)
        names = {"index": self.fresh("index"), "item": self.fresh("item")}
        return stream(items, *parts, prefetch=number + 1, **names)

    def _async_loop(self, parts, number, extra):
        index, control = self.fresh("index"), self.control(0, 2)
        stop = _with_parameters(lambda **values: values[index] >= values[control], (index, control))
        producer = self.leaf(extra, gives=extra[2] or ("a",), record=False)
        names = {"index": index, "version": self.fresh("version")}
        return async_loop(producer, *parts, stop_when=stop, buffer_size=number + 1, **names)

    def _ensure(self, parts, number, extra):
        """The cleanup needs nothing that the body gives: without an error that would be found."""
        body = sequence(*parts)
        needs = [name for name in extra[1] if name not in may_give(body)]
        return ensure(body, self.leaf(extra, needs=needs))

    def _retry(self, parts, number, extra):
        return retry(sequence(*parts))

    def _timeout(self, parts, number, extra):
        return timeout(sequence(*parts), 60)


def _with_parameters(fn, needs, optional=()):
    kind = inspect.Parameter.KEYWORD_ONLY
    required = [inspect.Parameter(name, kind) for name in needs]
    others = [inspect.Parameter(name, kind, default=None) for name in optional]
    fn.__signature__ = inspect.Signature([*required, *others])
    return fn


def _reader(control, function):
    return _with_parameters(lambda **values: function(values[control]), (control,))


def outcomes(workflow, builder, given_names):
    """For each outcome, the names in the last context, or None if a stage missed one; and what
    the stages found.
    """
    for values in itertools.product(*builder.controls.values()):
        context = Context(**dict.fromkeys(given_names, 0))
        context = context.replace(**dict(zip(builder.controls, values, strict=True)))
        builder.found.clear()
        try:
            after = set(workflow.run(context))
        except KeyError as error:
            if "the context does not have" not in str(error):
                raise
            after = None
        yield after, frozenset(builder.found)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs, st.sets(st.sampled_from(NAMES)), st.integers(0, 2))
def test_the_check_accepts_exactly_the_workflows_that_run_whatever_happens(spec, have, lacking):
    builder = Builder()
    workflow = builder.build(spec)
    assume(math.prod(map(len, builder.controls.values())) <= 48)
    needs = sorted(set(workflow.needs).intersection(NAMES))
    have = (have | set(needs)) - set(needs[lacking - 1 : lacking] if lacking else ())
    accepted = not wiring_problems(workflow, have | set(builder.controls))
    results = list(outcomes(workflow, builder, have))
    event(f"accepted: {accepted}, kind: {workflow.kind}")
    assert accepted == all(after is not None for after, _ in results)
    if accepted:
        contexts, before = [after for after, _ in results], have | set(builder.controls)
        assert set.intersection(*contexts) - before == set(workflow.gives) - before
        assert set.union(*contexts) - before == may_give(workflow) - before
        narrow = list(outcomes(workflow, builder, have.intersection(workflow.reads)))
        assert [found for _, found in narrow] == [found for _, found in results]
