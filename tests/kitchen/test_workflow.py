import pytest

from crucible.kitchen import Context, check, every, repeat, sequence, stage, when


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
    assert sequence(increment, double)(Context(x=1))["x"] == 4
    assert sequence(double, increment)(Context(x=1))["x"] == 3


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
    assert when(True, split).gives == ()
    assert when(True, split, otherwise=increment).gives == ()
    assert when(True, split, increment, otherwise=increment).gives == ("x",)
    assert every(2, split).gives == ()
    assert repeat(0, split).gives == ()
    assert "y" in repeat(1, split).gives


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


def test_a_workflow_prints_as_the_expression_that_made_it():
    workflow = sequence(repeat(3, every(2, increment), double), when(lambda x: x > 1, split))
    assert repr(workflow) == ("sequence(repeat(3, every(2, increment), double), when(λ(x), split))")


def test_only_stages_can_be_combined():
    for combinator in (sequence, lambda s: repeat(1, s), lambda s: every(1, s)):
        with pytest.raises(TypeError, match=r"takes stages, not .* Decorate a function"):
            combinator(lambda x: x)


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
    assert repeat(2, every(2, when(True, increment, otherwise=outside))).host
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
    assert caught.value.__notes__ == ["At step 3 of 5."]


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
    chosen = when(True, increment, otherwise=stage("x")(lambda other: other))
    assert chosen.needs == ("x", "other")
    with pytest.raises(ValueError, match="Stage '<lambda>' needs 'other'"):
        check(chosen, given=("x",))
