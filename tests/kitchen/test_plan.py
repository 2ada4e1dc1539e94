"""The plan: all that would fail, the shapes, the data, the bytes and the FLOPs, before a run."""

import dataclasses
import io
import json
import math
import re
import shutil
import time
from contextlib import redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from crucible import kitchen, metrics, models, train
from crucible.kitchen import (
    Context,
    async_loop,
    ensure,
    every,
    fuse,
    parallel,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    when,
)
from crucible.kitchen.compile import compile
from crucible.kitchen.costs import count_flops
from crucible.kitchen.plan import FOUND, plan_workflow
from crucible.kitchen.recall import recall
from crucible.kitchen.shapes import Unknown, show_bytes, show_count, show_value, size_of
from tests.conftest import REPOSITORY

SMALL = models.DecoderConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=32)


@stage("x")
def to_2(x):
    return jnp.zeros(2) + x.sum()


@stage("x")
def to_3(x):
    return jnp.zeros(3) + x.sum()


@stage("y")
def double(x):
    return 2 * x


def ones(n):
    return np.ones(n, np.float32)


def plan(workflow, keep=(), compile=False, **values):
    return plan_workflow("test", workflow, Context(**values), keep=keep, compile=compile)


def problems(workflow, **values):
    return [problem.message for problem in plan(workflow, **values).problems]


@pytest.fixture
def recipe(conversations, tmp_path):
    config = kitchen.SupervisedConfig(
        model=SMALL, data=conversations, workdir=tmp_path / "run", row_length=64, batch_size=4
    )
    return kitchen.Recipe(name="small", workflow=kitchen.supervised, config=config)


# What would fail


def test_every_missing_name_is_listed_and_a_misspelling_is_answered():
    @stage("z", host=True)
    def needs_two(batch, stat):
        return batch, stat

    found = problems(sequence(double, needs_two), x=1.0, state=2.0)
    assert found == [
        "Stage 'needs_two' needs 'batch', which nothing gives before it. There are: state, x, y, "
        "z.",
        "Stage 'needs_two' needs 'stat', which nothing gives before it. Did you mean 'state'?",
    ]
    assert problems(sequence(double, needs_two), x=1.0, batch=1, stat=2) == []


def test_what_is_given_too_late_or_perhaps_not_at_all_is_said_to_be_so():
    [late] = problems(sequence(stage("z")(lambda y: y), double), x=1.0)
    assert "needs 'y'" in late
    assert "given only later" in late
    [perhaps] = problems(sequence(when(lambda x: x > 0, double), stage("z")(lambda y: y)), x=1.0)
    assert "make the parameter optional (y=None)" in perhaps


@pytest.mark.parametrize(
    "workflow",
    [
        when(lambda wanted: wanted, double),
        repeat(lambda wanted: wanted, double),
        repeat(3, double, start=lambda wanted: wanted),
        repeat(3, double, chunk=lambda wanted: wanted),
        repeat(double, over=lambda wanted: wanted),
        stream(lambda wanted: wanted, double),
        parallel(double, max_concurrency=lambda wanted: wanted),
        every(2, double, index="wanted"),
        async_loop(double, stop_when=lambda wanted: wanted),
    ],
    ids=lambda workflow: str(workflow),
)
def test_what_a_condition_or_a_count_asks_for_must_be_there(workflow):
    [found] = problems(workflow, x=1.0)
    assert found.startswith("The condition or count of ")
    assert "needs 'wanted', which nothing gives before it." in found


def test_the_failing_stage_and_the_two_shapes_are_in_the_table_and_in_the_error():
    @stage("total")
    def add(x, bias):
        return x + bias

    wrong = plan(add, x=ones(2), bias=ones(3))
    for said in ("float32[2]", "float32[3]", "(2,), (3,)", "In stage 'add'"):
        assert said in str(wrong)
    with pytest.raises(TypeError, match=r"\(2,\), \(3,\)") as caught:
        wrong.check()
    assert caught.value.__notes__ == [
        "In stage 'add', given x: float32[2], bias: float32[3].",
        FOUND,
    ]
    with pytest.raises(TypeError) as again:
        wrong.check()
    assert again.value.__notes__.count(FOUND) == 1


def test_one_problem_is_raised_as_it_is_and_several_as_a_list():
    @stage("a", host=True, plan=True)
    def missing():
        raise FileNotFoundError("no such file")

    with pytest.raises(FileNotFoundError, match="no such file"):
        plan(missing).check()
    several = plan(sequence(missing, double))
    with pytest.raises(ValueError, match="The plan of test has 2 problems") as caught:
        several.check()
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["- FileNotFoundError: no such file", "  In stage 'missing'."]
    assert lines[3].startswith("- Stage 'double' needs 'x'")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert not several.ok
    plan(double, x=1.0).check()


def test_a_problem_makes_no_others_out_of_what_it_leaves_unknown():
    @stage("x")
    def broken(x):
        return x + jnp.zeros(7)

    found = plan(sequence(broken, double, stage("z", host=True, plan=True)(lambda y: y)), x=ones(2))
    assert len(found.problems) == 1
    assert not any("could not be checked" in note for note in found.notes)


def test_a_device_stage_that_gives_no_array_or_asks_for_a_value_is_told_what_to_do():
    [found] = problems(stage("text")(lambda: "words"))
    assert found.startswith(
        "TypeError: Stage '<lambda>' gives 'text', a str, but runs on the device"
    )
    [second] = problems(stage("a", "b")(lambda: (1.0, "words")))
    assert "gives 'b', a str" in second
    assert problems(stage("pair")(lambda: (1.0, 2.0))) == []
    [problem] = plan(stage("y")(lambda x: 1.0 if x > 0 else 0.0), x=1.0).problems
    assert "declare it @stage(..., host=True)" in problem.error.__notes__[-1]


def test_a_stage_that_returns_another_number_of_values_is_named():
    [one] = problems(stage("a", "b")(lambda x: x), x=ones(2))
    assert one == (
        "TypeError: Stage '<lambda>' said that it gives a, b, but returned float32[2]. Return one "
        "value per name, in that order."
    )
    [three] = problems(stage("a", "b", host=True, plan=True)(lambda: (1, 2, 3)))
    assert "but returned 3 values" in three


def test_what_only_the_whole_program_gets_wrong_is_found():
    [branches] = problems(fuse(when(lambda flag: flag, to_3)), x=ones(2), flag=True)
    assert "float32[3]" in branches
    assert "float32[2]" in branches
    [carried] = problems(repeat(4, to_3, chunk=2), x=ones(2))
    assert "float32[2] before a turn and float32[3] after it" in carried
    assert problems(repeat(4, to_3, chunk=2), x=ones(3)) == []


def test_chunks_that_cannot_be_are_a_problem_and_the_rest_is_planned_all_the_same():
    host = stage("seen", host=True, plan=lambda: 1)(lambda x: 1)
    found = plan(repeat(4, double, to_2, host, chunk=2), x=ones(2))
    assert "reads 'x' after each step" in found.problems[0].message
    assert [row.name for row in found.stages] == ["repeat 4 chunk=2", "double", "to_2", "<lambda>"]


def test_metrics_of_two_branches_that_do_not_add_are_a_problem():
    left, right = (stage("metrics")(f) for f in (lambda x: {"m": x}, lambda y: {"m": y}))
    later = stage("sum")(lambda metrics: metrics["m"])
    [found] = plan(sequence(parallel(left, right), later), x=ones(2), y=ones(3)).problems
    assert "(2,), (3,)" in found.message
    assert "float32[2] and float32[3], do not add" in found.error.__notes__[0]
    assert problems(parallel(left, right), x=ones(2), y=ones(2)) == []


def test_a_rollback_must_find_what_it_needs_after_its_stage():
    def undo(x, error, lease):
        """Give it back."""

    take = stage("lease", host=True, plan=lambda: 1, rollback=undo)(lambda: 1)
    [found] = problems(take)
    assert found.startswith("The rollback of '<lambda>' needs 'x', which nothing gives before it.")
    assert problems(take, x=1) == []
    device = stage("lease", rollback=undo)(lambda: 1)
    assert len(problems(device)) == 1


def test_a_cleanup_must_work_wherever_the_work_fails():
    bias = stage("total")(lambda y, x=None: y if x is None else x + y)
    host = stage("z", host=True, plan=lambda: 1)(lambda: 1)
    work = sequence(stage("x")(lambda: jnp.ones(3)), host, stage("x")(lambda: jnp.ones(2)))
    assert problems(work.parts[2], y=ones(2)) == []
    assert len(problems(ensure(work, bias), y=ones(2))) == 1  # if `host` fails, x is [3]
    assert problems(ensure(sequence(host, work.parts[2]), bias), y=ones(2)) == []
    [never] = problems(ensure(to_2, stage(host=True)(lambda opened: None)), x=ones(2))
    assert "needs 'opened'" in never


def test_problems_of_ports_and_config_are_found(recipe):
    wrong = kitchen.plan(recipe, ports={"dataset_stor": "jsonl:x", "metrics_store": "nothing"})
    assert [problem.stage for problem in wrong.problems] == ["ports", "ports"]
    assert "Did you mean 'dataset_store'?" in wrong.problems[0].message
    missing = kitchen.plan(recipe, ports={"dataset_store": "jsonl:missing.jsonl"})
    assert [type(problem.error) for problem in missing.problems] == [FileNotFoundError]
    with pytest.raises(ValueError, match="batch_size=0"):
        kitchen.plan(recipe, batch_size=0)
    assert not recipe.config.workdir.exists()


# Loops and branches


def test_a_known_number_of_turns_is_gone_through_that_often():
    needs_2 = stage("total")(lambda x: x + ones(2))
    assert problems(repeat(1, needs_2, to_3), x=ones(2)) == []
    assert len(problems(repeat(2, needs_2, to_3), x=ones(2))) == 1
    assert len(problems(repeat(lambda n: n, needs_2, to_3), x=ones(2), n=1)) == 1
    swap = stage("x", "y")(lambda x, y: (y, x))
    turns = {n: plan(sequence(repeat(n, swap), needs_2), x=ones(2), y=ones(3)).ok for n in range(5)}
    assert turns == {0: True, 1: False, 2: True, 3: False, 4: True}
    assert plan(sequence(repeat(10**9, swap), needs_2), x=ones(2), y=ones(3)).ok


def test_the_items_of_a_collection_are_checked_each_in_its_turn():
    add = stage("x")(lambda x, item: x + item)
    for loop in (lambda items: repeat(add, over=items), lambda items: stream(items, add)):
        assert problems(loop([ones(2)] * 3), x=ones(2)) == []
        assert len(problems(loop([ones(2), ones(2), ones(3)]), x=ones(2))) == 1
        assert problems(loop([]), x=ones(3)) == []
        keep = stage("x")(lambda item: item)
        ends = repeat(keep, over=[ones(2), ones(3)]), stage("y")(lambda x: x + ones(3))
        assert problems(sequence(*ends), x=ones(2)) == []
    assert len(problems(repeat(add, over=np.ones((4, 3), np.float32)), x=ones(2))) == 1


def test_what_a_loop_goes_through_may_be_known_only_by_its_length():
    class Items:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([ones(2)] * 3)

    add = stage("total")(lambda item: item + ones(2))
    later = stage("z")(lambda total: total)
    assert problems(sequence(repeat(add, over=Items()), later)) == []
    unknown = plan(repeat(add, over=lambda n: [ones(2)] * n), n=3)
    assert unknown.ok
    assert unknown.notes[0] == (
        "The shapes of stage '<lambda>' could not be checked: it needs 'item', which comes from "
        "'repeat', whose items are known only when it runs."
    )


def test_a_shape_that_changes_at_every_turn_is_refused_only_where_it_would_be_compiled_anew():
    grow = stage("x")(lambda x: jnp.concatenate([x, x[:1]]))
    [found] = problems(repeat(50, grow), x=ones(2))
    assert "a device stage reads what changes its shape at every turn" in found
    assert "x (float32[10], then float32[11])" in found
    assert len(problems(repeat(lambda n: n, grow), x=ones(2), n=5)) == 1
    assert problems(repeat(3, grow), x=ones(2)) == []  # it comes to an end by itself
    collect = stage("seen", host=True, plan=True)(lambda seen, step: (*seen, step))
    read = stage("last")(lambda seen: seen[-1])
    assert problems(repeat(50, collect), seen=()) == []
    after = plan(sequence(repeat(50, collect), read), seen=())
    assert after.ok
    assert "'repeat', where its shape changes at every turn" in after.notes[0]


def test_a_stage_in_two_places_has_two_rows_and_alternatives_are_shown():
    made = plan(sequence(to_2, when(lambda flag: flag, to_3), double, to_2), x=ones(4), flag=True)
    rows = [(row.name, row.depth) for row in made.stages]
    assert [name for name, _ in rows] == [
        *("program", "to_2", "when λ(flag)", "program", "to_3", "program", "double", "to_2"),
    ]
    assert [depth for _, depth in rows] == [0, 1, 0, 1, 2, 0, 1, 1]
    assert made.stages[-2].gives == {"y": "float32[3] or float32[2]"}


def test_more_combinations_than_can_be_followed_are_no_problem_and_take_no_time():
    switches = [when(lambda flag: flag, stage(f"s{i}")(lambda x: x)) for i in range(24)]
    began = time.perf_counter()
    made = plan(repeat(lambda n: n, *switches), x=ones(2), flag=True, n=3)
    assert made.ok
    assert any("more combinations" in note for note in made.notes)
    assert time.perf_counter() - began < 30
    wrong = stage("total")(lambda x, s23=None: x if s23 is None else s23 + ones(3))
    assert len(problems(sequence(*switches, wrong), x=ones(2), flag=True)) == 1
    assert not any("more combinations" in n for n in plan(switches[0], x=ones(2), flag=True).notes)


def test_a_producer_gives_only_what_it_declares_and_its_consumers_are_checked():
    make = stage("sample", host=True, plan=lambda weight: jnp.ones(3))(lambda weight, version: 0)
    learn = stage("weight")(lambda weight, sample: weight + sample)
    loop = async_loop(make, learn, stop_when=lambda step: step > 3)
    assert problems(loop, weight=ones(3)) == []
    assert len(problems(loop, weight=ones(2))) == 1
    maybe = sequence(make, when(lambda flag: flag, stage("extra")(lambda: 1.0)))
    reads = stage("z", host=True)(lambda extra: extra)
    loop = async_loop(maybe, reads, stop_when=lambda step: step > 3)
    [found] = problems(loop, weight=ones(3), flag=True)
    assert "needs 'extra'" in found


def test_branches_of_many_alternatives_are_followed_in_some_and_that_is_said():
    def sometimes(name):
        return when(lambda flag: flag, stage(name)(lambda x: x))

    left, right = (sequence(*(sometimes(f"{side}{i}") for i in range(4))) for side in "lr")
    made = plan(parallel(left, right), x=ones(2), flag=True)
    assert made.ok
    assert "more combinations of shapes" in made.notes[0]
    few = plan(parallel(left.parts[0], right.parts[0]), x=ones(2), flag=True)
    assert not any("more combinations" in note for note in few.notes)


def test_long_expressions_are_cut_short_where_they_are_shown():
    loop = repeat(stage("y")(lambda item: item), over=[np.ones(100, np.float32)] * 50)
    row = plan(loop).stages[0]
    assert row.name.startswith("repeat [array([1., 1.")
    assert len(row.name) < 70
    [found] = problems(repeat(lambda n: n, *[double] * 50), x=1.0)
    assert len(found) < 160


def test_an_optional_value_is_absent_on_one_path_and_there_on_the_other():
    use = stage("z")(lambda x, y=None: x if y is None else x + y)
    workflow = sequence(when(lambda flag: flag, stage("y")(lambda: jnp.ones(3))), use)
    assert len(problems(workflow, x=ones(2), flag=True)) == 1
    assert problems(workflow, x=ones(3), flag=True) == []


def test_a_value_that_is_no_array_but_has_a_shape_is_no_trouble():
    class Frame:
        shape, dtype = (3, 2), "mixed"

    @stage("z", host=True, plan=True)
    def read(frame, words):
        return frame

    made = plan(repeat(lambda n: n, read), frame=Frame(), words=np.array(["a"], object), n=2)
    assert made.ok
    assert made.stages[-1].gives == {"z": "Frame"}


# What is said beside


def test_values_that_nobody_reads_are_results_and_are_noted():
    made = plan(sequence(double, to_3), x=ones(2))
    assert made.notes == ("No stage reads 'y' (of 'double'): it is a result of the run.",)
    assert plan(sequence(double, to_3), keep=("y",), x=ones(2)).notes == ()


def test_a_stage_whose_input_is_unknown_is_reported_as_unchecked():
    silent = stage("x", host=True)(lambda: 1)
    made = plan(sequence(silent, double, stage("z")(lambda y: y)))
    assert made.ok
    why = "which comes from '<lambda>', which does not say what it gives (@stage(..., plan=))."
    assert made.notes[:2] == (
        f"The shapes of stage 'double' could not be checked: it needs 'x', {why}",
        f"The shapes of stage '<lambda>' could not be checked: it needs 'y', {why}",
    )
    assert [row.gives for row in made.stages if row.gives] == [{"x": "?"}, {"y": "?"}, {"z": "?"}]
    abstract = stage("z", host=True, plan=True)(lambda y: float(y))
    made = plan(sequence(double, abstract, stage("u")(lambda z: z)), x=1.0)
    assert "which a plan cannot run (plan=True), since 'y' is only a shape as yet" in made.notes[0]
    odd = stage("z", host=True, plan=lambda nothing: 1)(lambda x: 1)
    made = plan(sequence(odd, stage("u")(lambda z: z)), x=1.0)
    assert "whose plan= needs 'nothing', which nothing gives" in made.notes[0]


def test_none_is_a_known_value():
    none = stage("x", host=True, plan=True)(lambda: None)
    checked = stage("y")(lambda x, z: z + (1.0 if x is None else x) + ones(3))
    assert len(problems(sequence(none, checked), z=ones(2))) == 1
    assert plan(stage("x")(lambda: None)).stages[-1].gives == {"x": "None"}


def test_a_plan_is_strict_json():
    @stage("y", host=True, plan=True)
    def broken(x):
        raise ValueError(f"not\nthis: {math.nan}")

    made = plan(sequence(double, when(lambda flag: flag, broken)), x=jnp.ones(2), flag=True)
    said = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert set(said) == {f.name for f in dataclasses.fields(made)} - {"made"} | {"ok"}
    assert said["ok"] is False
    assert said["problems"] == [{"stage": "broken", "message": "not\nthis: nan"}]
    assert said["stages"][-1] == {
        "name": "broken",
        "depth": 1,
        "where": "host",
        "gives": {"y": "?"},
    }
    compiled = plan(double, compile=True, x=jnp.ones(2)).to_json()
    costs = json.loads(json.dumps(compiled, allow_nan=False))["programs"][0]["costs"]
    assert costs["argument_bytes"] == costs["output_bytes"] == 8


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_stays_within_its_columns_and_breaks_no_number(recipe, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    made = kitchen.plan(recipe)
    costs = {"temporary_bytes": 160_000_000, "peak_bytes": 165_000_000, "donation_achieved": True}
    costs |= {"compile_seconds": 12.3}
    programs = tuple(dataclasses.replace(p, costs=costs) for p in made.programs)
    file = io.StringIO()
    with redirect_stdout(file):
        dataclasses.replace(made, programs=programs).show()
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    if columns >= 80:
        for number in ("160 MB", "165 MB", "12.3 s", "arrays (26 kB)", "train_step", "init_params"):
            assert number in file.getvalue()


def test_markup_in_a_name_or_an_error_is_shown_as_it_is():
    @stage("x", host=True, plan=True)
    def tricky():
        raise ValueError("use [bold] or [/bold] here")

    assert "use [bold] or [/bold] here" in str(plan(tricky))
    assert "Plan of [red]" in str(dataclasses.replace(plan(double, x=1.0), name="[red]"))


def test_a_terminal_s_table_has_its_width(recipe, monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "70")
    file = io.StringIO()
    with redirect_stdout(file):
        plan(double, x=1.0).show()
    plain = re.sub("\x1b\\[[0-9;]*m", "", file.getvalue())
    assert max(map(len, plain.splitlines())) <= 70


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (12_340_000, "12.3 MB")],
)
def test_bytes_are_shown_in_three_digits(count, shown):
    assert show_bytes(count) == shown


def test_values_are_shown_by_their_shapes():
    shown = [1.0, None, Unknown("a"), (), "text", {"a": ones(3), "b": np.int8(1)}]
    assert [show_value(value) for value in shown] == [
        *("float32[]", "None", "?", "tuple", "str", "2 arrays (13 B)"),
    ]
    assert (show_count(8.46e9), show_count(12)) == ("8.46 G", "12")
    assert show_bytes(2.5e15) == "2.5 PB"
    assert size_of(jax.random.key(0)) == 8
    assert size_of(jax.random.key(0, impl="rbg")) == 16


# The data


def test_the_data_is_shown_and_truncation_counted(recipe):
    whole = kitchen.plan(recipe, eval_fraction=0.25)
    assert whole.ok
    assert set(whole.data) == {"Data", "Held out"}
    assert "18 examples in 18 rows of 64: 867 tokens" in whole.data["Data"]
    assert "0 truncated, 0 unsupervised" in whole.data["Data"]
    cut = kitchen.plan(recipe, eval_fraction=0.25, row_length=40)
    assert "18 truncated (-147 tokens)" in cut.data["Data"]
    assert "6 truncated (-50 tokens)" in cut.data["Held out"]
    assert "18 truncated" in str(cut)
    assert set(kitchen.plan(recipe, eval_fraction=0.0).data) == {"Data"}


def test_data_in_which_nothing_is_trained_on_is_a_problem(recipe, tmp_path):
    path = tmp_path / "user.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    [problem] = kitchen.plan(recipe, data=path).problems
    assert "No supervised tokens" in problem.message
    assert problem.error.__notes__ == ["In stage 'load_data'."]


def test_data_that_never_trains_on_a_stop_token_is_a_problem(recipe, tmp_path):
    path = tmp_path / "long.jsonl"
    words = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "word " * 99}]
    path.write_text((json.dumps({"messages": words}) + "\n") * 8)
    [problem] = kitchen.plan(recipe, data=path, eval_fraction=0.0).problems
    assert problem.stage == "data"
    assert "No stop token is trained on" in problem.message
    with pytest.raises(ValueError, match="No stop token"):
        kitchen.run(recipe, data=path, eval_fraction=0.0)
    assert not recipe.config.workdir.exists()


def test_a_token_outside_of_the_vocabulary_is_a_problem(recipe):
    [problem] = kitchen.plan(recipe, model={"vocab_size": 100}).problems
    assert problem.error.__notes__ == ["In stage 'load_data'."]
    assert "100" in problem.message


# Bytes and FLOPs


def parameters(config):
    """`(embedding, others)`, by hand."""
    width, size = config.width, config.head_size
    attention = width * size * (2 * config.heads + 2 * config.kv_heads)
    block = attention + 3 * width * config.mlp_width + 2 * width
    head = 0 if config.tied_head else config.vocab_size * width
    return config.vocab_size * width, config.layers * block + width + head


def test_memory_is_what_one_computes_by_hand(recipe):
    made = kitchen.plan(recipe)
    weights = 4 * sum(parameters(SMALL))
    batch = 4 * 64 * 4 * 5  # rows, tokens, bytes; tokens, targets, weights, positions, segment_ids
    assert made.memory == {
        "params": weights,
        "opt_state": 2 * weights + 2 * 4,  # two moments; two counts
        "batch": batch,
        "checkpoint": 3 * weights + 2 * 4 + 4 + 8,  # with the step and the key
    }
    assert list(made.memory) == ["params", "opt_state", "batch", "checkpoint"]


def test_memory_with_an_adapter_counts_the_model_as_frozen(recipe):
    made = kitchen.plan(recipe, lora=models.LoraConfig(rank=3))
    shapes = jax.eval_shape(models.decoder(SMALL).init, jax.random.key(0))
    adapter = jax.eval_shape(
        lambda params: models.init_lora(models.LoraConfig(rank=3), params, jax.random.key(0)),
        shapes,
    )
    trained = 4 * sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert made.memory["params"] == trained < 4 * sum(parameters(SMALL))
    assert made.memory["frozen"] == 4 * sum(parameters(SMALL))
    assert made.memory["opt_state"] == 2 * trained + 2 * 4
    assert made.memory["checkpoint"] == 3 * trained + 2 * 4 + 4 + 8
    assert list(made.memory)[:2] == ["params", "frozen"]


@pytest.mark.parametrize("layers", [2, 6])  # unrolled, and scanned
def test_the_flops_of_a_step_are_those_one_counts_by_hand(recipe, layers):
    config = dataclasses.replace(models.TINY, layers=layers)
    [*_, step] = kitchen.plan(recipe, model=config).programs
    embedding, others = parameters(config)
    tokens, length = 4 * 64, 64
    products = others - config.width * (2 * layers + 1)  # the norms multiply no matrices
    weights = 6 * (products + embedding) * tokens  # the head is the embedding
    attention = 3 * layers * 4 * length * config.width * tokens  # QK and AV, of all pairs
    assert step.flops == pytest.approx(weights + attention, rel=0.05)
    naive = 6 * (embedding + others) * tokens
    assert naive < step.flops < 1.2 * naive


def test_flops_count_each_turn_of_a_scan_and_the_dearest_branch():
    x = jnp.ones((8, 8))
    product = 2 * 8**3

    def scan(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    def cond(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def conv(x):
        return jax.lax.conv(x[None, None], jnp.ones((3, 1, 2, 2)), (1, 1), "VALID")

    def count(f):
        return count_flops(jax.make_jaxpr(f)(x))

    assert count(scan) == 7 * product
    assert count(cond) == 2 * product
    assert count(jax.checkpoint(scan)) == count(jax.jit(scan)) == 7 * product
    assert count(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)) == product
    assert count(conv) == 2 * (3 * 7 * 7) * (2 * 2)
    assert count(jax.grad(lambda x: (x @ x).sum())) == 3 * product
    assert count(lambda x: x + 1) == 0


def test_a_chunk_is_counted_as_one_step(recipe):
    one = kitchen.plan(recipe).programs[-1].flops
    chunked = kitchen.plan(recipe, chunk=5, save_every=10, eval_every=10).programs[-1].flops
    assert chunked == one > 0


def test_a_70b_model_is_planned_as_quickly_as_a_tiny_one_and_nothing_of_it_is_allocated(recipe):
    huge = models.DecoderConfig(
        vocab_size=128_256,
        width=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        mlp_width=28_672,
        tied_head=False,
        dtype="bfloat16",
    )

    def timed(config):
        began = time.perf_counter()
        made = kitchen.plan(recipe, model=config)
        return made, time.perf_counter() - began

    timed(dataclasses.replace(SMALL, layers=6))
    before = {id(array) for array in jax.live_arrays()}
    _, tiny = timed(dataclasses.replace(SMALL, layers=7))
    made, seconds = timed(huge)
    assert made.ok
    assert made.memory["params"] == 4 * sum(parameters(huge)) > 280e9
    assert made.programs[-1].flops > 6 * 69e9 * 4 * 64
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in new) < 1e6
    assert seconds < max(10 * tiny, 10)


def test_a_directory_without_weights_is_planned(tmp_path, recipe):
    source = REPOSITORY / "tests" / "fixtures" / "llama_tied"
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, tmp_path / name)
    model = kitchen.PretrainedConfig(source=str(tmp_path))
    made = kitchen.plan(recipe, model=model, lora=models.LoraConfig(rank=2))
    assert made.ok, made.problems
    config = models.load_config(tmp_path)
    assert made.memory["frozen"] == 4 * sum(parameters(config))
    [problem] = kitchen.plan(recipe, model={"source": str(tmp_path / "missing")}).problems
    assert isinstance(problem.error, FileNotFoundError)
    [unknown] = kitchen.plan(recipe, model={**dataclasses.asdict(model), "dtype": "int3"}).problems
    assert "int3" in unknown.message


# What the compiler says


def test_compiling_tells_memory_and_donation_of_each_program():
    add = stage("x")(lambda x: x + 1)
    made = plan(sequence(add, stage("z", host=True)(lambda: 1), double), compile=True, x=ones(1000))
    first, second = made.programs
    assert (first.donates, second.donates) == (("x",), ())
    assert first.costs["argument_bytes"] == first.costs["output_bytes"] == 4000
    assert first.costs["donated_bytes"] == 4000
    assert first.costs["donation_achieved"] is True
    assert first.costs["peak_bytes"] == 4000 + first.costs["temporary_bytes"]
    assert second.costs["peak_bytes"] == 8000 + second.costs["temporary_bytes"]
    assert first.costs["compile_seconds"] > 0
    rows = [line for line in str(made).splitlines() if line.startswith("│ <lambda> ")]
    assert [cell.strip() for cell in rows[-1].split("│")][-3] == "yes"
    assert plan(add, x=ones(1000)).programs[0].costs == {}


def test_memory_that_cannot_be_reused_is_shown_as_such():
    shrink = stage("x")(lambda x: x.sum()[None])
    made = plan(shrink, compile=True, x=ones(1000))
    assert made.programs[0].donates == ("x",)
    assert made.programs[0].costs["donation_achieved"] is False
    row = next(
        line for line in str(made).splitlines() if line.startswith("│ <lambda> ") and "NO" in line
    )
    assert [cell.strip() for cell in row.split("│")][-3] == "NO"


def test_a_program_that_donates_nothing_says_nothing_of_it():
    said = str(plan(double, compile=True, x=ones(10)))
    assert "reused" not in said
    assert "donates" not in said
    assert "peak" in said


def test_the_train_step_reuses_all_of_the_state(recipe):
    made = kitchen.plan(recipe, compile=True)
    step = made.programs[-1]
    assert step.donates == ("state",)
    assert step.costs["donation_achieved"] is True
    assert step.costs["donated_bytes"] == made.memory["checkpoint"]
    assert step.costs["argument_bytes"] >= made.memory["checkpoint"] + made.memory["batch"]
    assert step.costs["temporary_bytes"] > 0


def test_nothing_is_compiled_if_something_is_wrong(recipe):
    made = plan(sequence(double, stage("z", host=True)(lambda missing: 1)), compile=True, x=ones(2))
    assert [program.costs for program in made.programs] == [{}]


def test_what_never_leaves_a_program_is_listed():
    made = plan(sequence(double, stage("x")(lambda y: y)), x=ones(2))
    assert made.programs[0].dropped == ("y",)
    assert "never leaves it" in str(made)
    kept = plan(sequence(double, stage("x")(lambda y: y)), keep=("y",), x=ones(2))
    assert kept.programs[0].dropped == ()
    assert (kept.programs[0].name, kept.programs[0].gives) == ("double + <lambda>", ("y", "x"))


# What the plan has run


def test_a_stage_that_the_plan_ran_is_not_run_again_by_the_run_wherever_it_stands():
    calls = []

    def load(name):
        def fn(path):
            calls.append(name)
            return f"{name} of {path}"

        return stage(name, host=True, plan=True)(fn)

    workflow = sequence(
        load("a"),
        when(lambda path: path, load("b"), otherwise=load("c")),
        parallel(load("d"), load("e")),
        ensure(retry(load("f")), load("g")),
        repeat(2, load("h")),
    )
    made = plan(workflow, path="file")
    assert sorted(calls) == list("abcdefgh")
    last = compile(recall(made.made, workflow)).run(Context(path="file"))
    assert sorted(calls) == list("abcdefgh")
    assert [last[name] for name in "abdefgh"] == [f"{name} of file" for name in "abdefgh"]
    recall(made.made, workflow).run(Context(path="other"))
    assert sorted(calls) == sorted("abcdefgh" + "abdefghh")


def test_what_was_recalled_is_rolled_back_like_the_rest():
    undone = []
    take = stage("lease", host=True, plan=True, rollback=lambda lease: undone.append(lease))(
        lambda: "lease"
    )
    nothing = stage(host=True, plan=True)(lambda: None)

    @stage(host=True)
    def fail():
        raise OSError("gone")

    workflow = sequence(take, nothing, fail)
    made = plan(workflow)
    with pytest.raises(OSError, match="gone"):
        recall(made.made, workflow).run(Context())
    assert undone == ["lease"]


def test_a_run_loads_its_data_once(recipe, monkeypatch):
    loads = []
    original = train.load
    monkeypatch.setattr(train, "load", lambda *a, **k: loads.append(1) or original(*a, **k))
    kitchen.run(recipe, num_steps=0, eval_every=0)
    assert loads == [1]


def test_a_plan_asks_no_condition_and_runs_only_what_says_so():
    def never(x):
        raise AssertionError("a plan must not run this")

    workflow = sequence(
        when(never, double),
        repeat(never, double),
        stage("h", host=True)(never),
        stage("z", host=True, plan=lambda x: x)(never),
    )
    made = plan(workflow, x=jax.ShapeDtypeStruct((2,), jnp.float32))
    assert made.ok
    assert made.stages[-1].gives == {"z": "float32[2]"}


def test_means_are_followed_like_arrays():
    mean = stage("metrics")(lambda x: {"loss": metrics.Mean(x.sum(), jnp.float32(2))})
    made = plan(mean, x=ones(3))
    assert made.stages[-1].gives == {"metrics": "2 arrays (8 B)"}
