"""What a device stage, or a combination of them, means to JAX while it is traced."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from crucible.kitchen.concurrency import merged
from crucible.kitchen.context import Context
from crucible.kitchen.scope import rolls_back
from crucible.kitchen.stage import Stage
from crucible.kitchen.wiring import every_part, may_give
from crucible.kitchen.workflow import bounds

__all__ = [
    "advance",
    "check_given",
    "describe_leaf",
    "exposed",
    "given_by",
    "is_weak",
    "loop",
    "on_device",
    "only_arrays",
    "trace",
    "unset",
]

THREADED = ("stream", "async_loop")  # what they run comes from a thread, even on the device


def on_device(stage: Stage) -> bool:
    """Whether all of a stage can be part of a program."""
    threaded = any(part.kind in THREADED for part in every_part(stage))
    return not (stage.host or threaded or rolls_back(stage))


def exposed(stages: Iterable[Stage]) -> set[str]:
    """Names that stages in a row may read from before them."""
    have, names = set(), set()
    for part in stages:
        names |= set(part.reads) - have
        have |= set(part.gives)
    return names


def given_by(stages: Iterable[Stage]) -> set[str]:
    """All names that stages may give, on any path."""
    return set().union(*(may_give(part) for part in stages))


def trace(stages: Iterable[Stage], context: Context) -> Context:
    """Run device stages on tracers; loops and conditions become XLA's.

    Raises:
        ValueError: a stage may read what another gives only under a condition, and nothing is
            there in the other case.
    """
    stages = tuple(stages)
    for number, stage in enumerate(stages):
        context = _trace(stage, context)
        absent = may_give(stage) - context.keys()
        for name in sorted(absent & exposed(stages[number + 1 :])):
            raise unset(name, stage)
    return context


def _trace(stage: Stage, context: Context) -> Context:
    match stage.kind:
        case "stage":
            return stage.run(context)
        case "every":
            period, index = stage.settings["period"], stage.settings["index"]
            if period < 2:
                return trace(stage.parts, context)
            return _cond(context[index] % period == 0, stage.parts, (), context)
        case "when":
            holds = stage.settings["condition"](context)
            return _cond(holds, stage.parts[:1], stage.parts[1:], context)
        case "repeat" if stage.settings["over"] is None:
            return _repeat(stage, context)
        case "repeat":  # over a collection, which is known: unrolled
            for number, item in enumerate(bounds(stage.settings, context)[2]):
                names = {stage.settings["index"]: number, stage.settings["item"]: item}
                context = trace(stage.parts, context.replace(**names))
            return context
        case "parallel":
            return _parallel(stage, context)
        case _:
            return trace(stage.parts, context)


def unset(name: str, stage: Stage | str) -> ValueError:
    """The error of what is given only under a condition that the device decides."""
    return ValueError(
        f"{stage} gives {name!r} only if its condition holds or its loop runs, which the device "
        f"decides, so that there must be a value in the other case too. Give {name!r} a first "
        "value in the context, or in both branches."
    )


def only_arrays(stages: Iterable[Stage], before: Context, after: Context) -> None:
    """Refuse what cannot leave a program.

    Raises:
        TypeError: a stage gave something else than arrays.
    """
    for name, value in after.resources.items():
        if before.resources.get(name) is not value:
            leaves = [part for stage in stages for part in every_part(stage) if part.fn]
            giver = next((leaf.name for leaf in reversed(leaves) if name in leaf.gives), "?")
            raise TypeError(
                f"Stage {giver!r} gives {name!r}, a {type(value).__name__}, but runs on the "
                "device, where there are only arrays. Declare it @stage(..., host=True)."
            )


def check_given(
    stages: Sequence[Stage], gives: Iterable[str], wanted: Iterable[str], after: Context
) -> None:
    """Refuse to lose what is given only under a condition, unless it is used up by then.

    Raises:
        ValueError: a name is not there that somebody wants, or that no stage reads: a result.
    """
    parts = [part for stage in stages for part in every_part(stage)]
    used = {name for part in parts for name in part.reads}
    given = {name for part in parts if part.fn for name in part.gives}
    for name in sorted(set(gives) - after.keys()):
        if name in wanted or name in given - used:
            giver = next((s for s in reversed(stages) if name in may_give(s)), "The program")
            raise unset(name, giver)


def _cond(holds: Any, then: Sequence[Stage], other: Sequence[Stage], context: Context) -> Context:
    """One branch or the other; what only one of them gives must be in the context already."""
    if not isinstance(holds, Tracer):
        return trace(then if holds else other, context)
    both = _certain(then) & _certain(other)
    names = [n for n in sorted(given_by((*then, *other))) if n in context or n in both]

    def branch(stages):
        after = trace(stages, context)
        only_arrays(stages, context, after)
        return {name: after[name] for name in names}

    values = lax.cond(holds, lambda: branch(then), lambda: branch(other))
    return context.replace(**values)


def _certain(stages: Iterable[Stage]) -> set[str]:
    """Names that stages in a row certainly give."""
    return {name for stage in stages for name in stage.gives}


def _parallel(stage: Stage, context: Context) -> Context:
    for name in sorted(may_give(stage)):
        givers = [part for part in stage.parts if name in may_give(part)]
        doubtful = [part for part in givers if name not in part.gives]
        if doubtful and len(givers) > 1:
            raise ValueError(
                f"{stage}: {doubtful[0]} gives {name!r} only under a condition, so a program "
                "cannot tell whether to add it. Give it always, or leave fuse and chunk out."
            )
    return merged(context, stage.parts, [_trace(part, context) for part in stage.parts])


def _repeat(stage: Stage, context: Context) -> Context:
    index, parts = stage.settings["index"], stage.parts
    begin, end = (_whole(stage.settings[key](context)) for key in ("start", "count"))
    known = isinstance(begin, int) and isinstance(end, int)
    if known and begin >= end:
        return context
    given = given_by(parts)
    if known:  # the first turn gives what was not there before
        entry = context.replace(**{index: begin})
        context, begin = trace(parts, entry), begin + 1
        only_arrays(parts, entry, context)
        if begin == end:
            return context
    else:
        for name in sorted((given & exposed(parts)) - {index, *context}):
            raise unset(name, stage)
    carried = {name for name in given if name in context}

    def turn(number, values):
        entry = context.replace(**{**values, index: number})
        after = trace(parts, entry)
        only_arrays(parts, entry, after)
        return {name: after[name] for name in carried}

    first = {name: context[name] for name in carried}
    last = loop(begin, end, turn, first, str(stage))
    if index not in last and known:
        last[index] = end - 1
    elif index not in last and index in context:
        last[index] = jnp.where(begin < end, end - 1, context[index])
    return context.replace(**last)


def _whole(number: Any) -> Any:
    """A loop's bound: an int if it is known, else an array of whole numbers."""
    if not isinstance(number, Tracer):
        return operator.index(number)
    if not jnp.issubdtype(number.dtype, jnp.integer):
        raise TypeError(f"A loop's bound must be a whole number, not {describe_leaf(number)}.")
    return number


def loop(
    begin: Any, end: Any, turn: Callable[[Any, Any], Any], first: Mapping[str, Any], where: str
) -> Any:
    """Carry named values through numbered turns, in a loop of XLA's.

    The bound may be an argument of the program, so one program serves every length, and a run that
    is cut anywhere goes on in the same one. The number has a Python int's weak type, as on the
    host.
    """
    first = advance(lambda values: turn(begin, values), first, where)

    def body(carry):
        number, values = carry
        after = turn(number, values)
        return number + 1, jax.tree.map(_strong, after)

    _, values = lax.while_loop(lambda carry: carry[0] < end, body, (begin, first))
    return values


def advance(turn: Callable[[Any], Any], values: Mapping[str, Any], where: str) -> Any:
    """The values, as strong types, if a turn leaves their shapes and types as they are.

    Raises:
        ValueError: it does not.
    """
    strong = {name: jax.tree.map(_strong, value) for name, value in values.items()}
    after = jax.eval_shape(turn, strong)
    for name, value in strong.items():
        before = {k: describe_leaf(v) for k, v in jax.tree_util.tree_leaves_with_path(value)}
        later = {k: describe_leaf(v) for k, v in jax.tree_util.tree_leaves_with_path(after[name])}
        if before != later:
            path = next(k for k in (*before, *later) if before.get(k) != later.get(k))
            raise ValueError(
                f"{where}: {name}{jax.tree_util.keystr(path)} is {before.get(path, 'absent')} "
                f"before a turn and {later.get(path, 'absent')} after it. In a loop on the device, "
                "what is carried from turn to turn must keep its shape and type."
            )
    return strong


def _strong(leaf: Any) -> jax.Array:
    """An array whose type no later promotion can change."""
    array = jnp.asarray(leaf)
    return lax.convert_element_type(array, array.dtype) if is_weak(array) else array


def is_weak(leaf: Any) -> bool:
    """Whether a leaf takes another's type when they meet, as a Python number does."""
    return getattr(jax.typeof(leaf), "weak_type", False)


def describe_leaf(leaf: Any) -> str:
    """`float32[8, 128]`."""
    aval = jax.typeof(leaf)
    dtype, shape = getattr(aval, "dtype", "?"), getattr(aval, "shape", ())
    return f"{dtype}[{', '.join(map(str, shape))}]"
