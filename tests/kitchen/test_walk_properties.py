"""Random workflows: what a plan accepts, and what it says of the shapes, against plain runs.

The oracle is the eager run of the workflow itself, in every outcome of its conditions and counts:
each of them asks `FATE`, which goes through all that it could answer. A cleanup must work wherever
a host stage of the work fails, so such works fail everywhere in turn.

Left out, since the plan refuses it on purpose: shapes that change at every turn of a loop for ever
(`test_plan.py` has these). No formula here makes any: there are two shapes and two types.
"""

import inspect
import itertools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from crucible.kitchen import (
    Context,
    compile,
    ensure,
    every,
    parallel,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    when,
)
from crucible.kitchen.plan import plan_workflow
from crucible.kitchen.shapes import show_value
from crucible.kitchen.walk import Walk

pytestmark = pytest.mark.slow  # as a whole: many real runs, or many workflows

NAMES = "abcd"
SHAPES = {"2": (2,), "3": (3,)}
LENGTHS = (0, 1, 2, 3)  # turns that a count may ask for
MOST = 400  # paths through a workflow that are tried one by one


class Fate:
    """Decides every condition and count of a run, and goes through all of their outcomes."""

    def __init__(self):
        self.chosen, self.at, self.busy = [], 0, False

    def choose(self, options):
        assert self.busy, "a plan must not ask how a condition or a count turns out"
        if self.at == len(self.chosen):
            self.chosen.append((0, len(options)))
        index = self.chosen[self.at][0]
        self.at += 1
        return options[index]

    def runs(self):
        """A number for each run, until all outcomes have been."""
        for number in itertools.count():
            self.at = 0
            yield number
            while self.chosen and self.chosen[-1][0] == self.chosen[-1][1] - 1:
                self.chosen.pop()
            if not self.chosen:
                return
            last, options = self.chosen[-1]
            self.chosen[-1] = last + 1, options


FATE = Fate()


class Fault(Exception):
    """What a work is interrupted by."""


class Die:
    """Stands for the number of a loop; whether `every` divides it is anybody's guess."""

    def __mod__(self, period):
        return FATE.choose((0, 1))


def ones(shape):
    return np.ones(shape, np.float32)


def function(formula, needs, optional=()):
    """A function of these parameters; works on arrays of NumPy and on tracers alike."""
    names = [*needs, *optional]
    parameter = inspect.Parameter
    kinds = [parameter(n, parameter.KEYWORD_ONLY) for n in needs]
    kinds += [parameter(n, parameter.KEYWORD_ONLY, default=None) for n in optional]

    def of(**values):
        return formula([values[name] for name in names if name in values])

    of.__signature__ = inspect.Signature(kinds)
    of.__name__ = f"of_{''.join(names)}"
    return of


def add(values):
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


FORMULAS = {
    "add": add,
    "to 2": lambda values: ones(2) + add([v.sum() for v in values]),
    "half": lambda values: add(values).astype(np.float16),
    "to 3": lambda values: ones(3) + add([v.sum() for v in values]),
}


@st.composite
def leaf(draw, host=None, gives=NAMES):
    host = draw(st.booleans()) if host is None else host
    given_names = draw(st.lists(st.sampled_from(gives), min_size=1, max_size=2, unique=True))
    needs = draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True))
    optional = draw(st.lists(st.sampled_from(NAMES), max_size=1)) if draw(st.booleans()) else []
    optional = [name for name in optional if name not in needs]
    formulas = [FORMULAS[draw(st.sampled_from(sorted(FORMULAS)))] for _ in given_names]
    made = [draw(st.sampled_from((2, 3))) for _ in given_names]

    def formula(values):
        results = [f(values) if values else ones(n) for f, n in zip(formulas, made, strict=True)]
        return results[0] if len(results) == 1 else tuple(results)

    fn = function(formula, needs, optional)
    if not host:
        return stage(*given_names)(fn)
    stand_in = function(lambda values: jax.eval_shape(formula, values), needs, optional)
    return stage(*given_names, host=True, plan=stand_in)(fn)


@stage(host=True, plan=lambda: None)
def fault():
    if FATE.choose((False, True)):
        raise Fault


def faulty(workflow):
    """The same, but anything in it may be interrupted."""
    if workflow.fn is not None:
        return sequence(fault, workflow, fault)
    return workflow.again(*map(faulty, workflow.parts)) if workflow.parts else workflow


def count(draw):
    """A number of turns: known, or known only to fate."""
    if draw(st.booleans()):
        return draw(st.sampled_from((0, 1, 2, 3, 5)))
    return lambda n0: FATE.choose(LENGTHS)


def condition(draw):
    return draw(st.sampled_from((True, False, *[lambda c0: FATE.choose((True, False))] * 4)))


def scopes(children, host):
    """Combinators of what `children` draws."""

    @st.composite
    def scope(draw):
        parts = draw(st.lists(children, min_size=1, max_size=3))
        kind = draw(st.sampled_from(("sequence", "repeat", "start", "over", "every", "when")))
        if draw(st.integers(0, 2)) == 0:
            kind = draw(st.sampled_from(("parallel", "ensure", "stream", "retry")))
        items = [ones(n) for n in draw(st.lists(st.sampled_from((2, 3)), max_size=3))]
        named = {"index": draw(st.sampled_from(("i", "j")))}
        match kind:
            case "sequence":
                return sequence(*parts)
            case "repeat":
                return repeat(count(draw), *parts, **named)
            case "start":
                return repeat(3, *parts, start=lambda n1: FATE.choose((0, 2, 3, 4)), **named)
            case "over":
                return repeat(*parts, over=items, item=draw(st.sampled_from(NAMES)), **named)
            case "stream":
                return stream(items, *parts, item=draw(st.sampled_from(NAMES)), **named)
            case "every":
                return every(draw(st.sampled_from((0, 1, 2, 2, 2))), *parts, index="die")
            case "when":
                other = draw(st.none() | children)
                return when(condition(draw), *parts, otherwise=other)
            case "parallel":
                sides = [draw(leaf(host, gives=names)) for names in ("ab", "cd")]
                sides[0] = sequence(*sides[:1], *draw(st.lists(leaf(host, gives="ab"), max_size=1)))
                return parallel(*sides, max_concurrency=1)
            case "ensure":
                return ensure(faulty(sequence(*parts)), draw(leaf(host)))
            case "retry":
                return retry(sequence(*draw(st.lists(leaf(True), min_size=1, max_size=2))))

    return scope()


def workflows(host=None):
    nested = st.recursive(leaf(host), lambda children: scopes(children, host), max_leaves=5)
    return st.lists(nested, min_size=1, max_size=4).map(lambda parts: sequence(*parts))


CONTEXT = {"n0": 1, "n1": 1, "c0": True, "die": Die(), "a": ones(2), "b": ones(3)}


def outcome(workflow, context):
    """What a run ends in: a context, an error, or None if it was interrupted and cleaned up."""
    FATE.busy = True
    try:
        return workflow.run(context)
    except Fault as error:
        notes = getattr(error, "__notes__", ())
        bad = [n for n in notes if "failed too" in n and "Fault(" not in n]
        return AssertionError(bad) if bad else None
    except Exception as error:
        return error
    finally:
        FATE.busy = False


def runs_in_every_outcome(workflow, context):
    """Whether plain runs never fail; None if there are too many to try."""
    FATE.chosen = []
    for number in FATE.runs():
        if number == MOST:
            return None
        end = outcome(workflow, context)
        if isinstance(end, Exception):
            return False
    return True


def planned(workflow, **changes):
    return plan_workflow("w", workflow, Context(**{**CONTEXT, **changes}))


def bounded(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@bounded(250)
@given(workflows())
def test_a_plan_accepts_exactly_the_workflows_that_run_in_every_outcome(workflow):
    runs = runs_in_every_outcome(workflow, Context(**CONTEXT))
    assume(runs is not None)
    plan = planned(workflow)
    assert plan.ok == runs, (workflow, [problem.message for problem in plan.problems])


def shapes(context, names="abcdij"):
    """What a context has, by name, in shapes and types."""
    return frozenset((name, show_value(context[name])) for name in names if name in context)


@bounded(120)
@given(workflows())
def test_a_walk_ends_in_exactly_the_shapes_that_plain_runs_end_in(workflow):
    context, ends = Context(**CONTEXT), set()
    FATE.chosen = []
    for number in FATE.runs():
        end = outcome(workflow, context)
        assume(number < MOST and not isinstance(end, Exception))
        if end is not None:
            ends.add(shapes(end))
    walk = Walk(workflow)
    assert {shapes(end) for end in walk.through(compile(workflow), [context])} == ends


@bounded(30)
@given(workflows(), st.lists(st.booleans(), min_size=8, max_size=8))
def test_a_compiled_run_ends_in_shapes_that_the_plan_foresaw(workflow, fate):
    context = Context(**CONTEXT)
    walk, compiled = Walk(workflow), compile(workflow)
    foreseen = {shapes(end) for end in walk.through(compiled, [context])}
    assume(not walk.problems)
    FATE.chosen, FATE.at = [(int(choice), 2) for choice in fate], 0
    end = outcome(compiled, context)
    assume(end is not None)
    assert not isinstance(end, Exception), end
    assert any(shapes(end) <= possible for possible in foreseen)


@bounded(60)
@given(workflows())
def test_a_plan_depends_on_no_value_of_a_slot(workflow):
    other = {"n0": -7, "n1": 10**9, "c0": False, "a": np.full(2, np.nan, np.float32)}
    shapes = {
        name: jax.ShapeDtypeStruct(np.shape(value), jax.typeof(value).dtype)
        for name, value in CONTEXT.items()
        if name != "die"
    }
    plans = [planned(workflow, **changes) for changes in ({}, other, shapes)]
    said = [[(p.stage, p.message) for p in plan.problems] for plan in plans]
    assert said[0] == said[1] == said[2]
    assert plans[0].stages == plans[1].stages == plans[2].stages
