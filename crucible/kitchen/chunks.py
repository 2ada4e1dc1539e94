"""Loops that run several steps per dispatch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from crucible.kitchen import ledger
from crucible.kitchen.context import Context, is_slot
from crucible.kitchen.programs import Program
from crucible.kitchen.rows import cut, stack, unstack
from crucible.kitchen.scope import reached, rolls_back, series
from crucible.kitchen.stage import Stage, take
from crucible.kitchen.tracing import (
    check_given,
    exposed,
    given_by,
    loop,
    on_device,
    only_arrays,
    trace,
)
from crucible.kitchen.wiring import may_give
from crucible.kitchen.workflow import bounds, sequence, turn

__all__ = ["Chunks"]

LARGEST = 32  # steps per dispatch that "auto" considers
WORTH = 0.97  # of the time of single steps, that chunks must stay below to be taken
ROWS = "what it gives at each step"  # no name of a slot's


class Chunks:
    """The parts of a loop's body, by when they run in a chunk, and the program that loops.

    Host stages before the device stages run ahead, for each step of the chunk (*feeders*), but an
    `every` only at the chunk's first step (*boundaries*). Then the program runs all steps. Then the
    host stages after it follow, for each step (*followers*).

    Args:
        stage: the `repeat`.
        parts: its body, flat.
        wanted: names that may be read after a turn, or are to be kept.
        passed: names to be left in the context though nobody may read them.
        may_donate: names that nobody beside the loop reads.
    """

    def __init__(
        self,
        stage: Stage,
        parts: Sequence[Stage],
        wanted: frozenset[str],
        passed: frozenset[str],
        may_donate: Set[str],
    ):
        self.settings, self.index = stage.settings, stage.settings["index"]
        at = [i for i, part in enumerate(parts) if not part.host and not _threaded(part)]
        if self.settings["over"] is not None:
            raise ValueError(f"{stage}: chunks are for counted steps, not for over=.")
        if not at:
            raise ValueError(f"{stage}: no stage of its body runs on the device; leave chunk out.")
        self.before, self.device = list(parts[: at[0]]), list(parts[at[0] : at[-1] + 1])
        self.after = list(parts[at[-1] + 1 :])
        self.boundaries = [part for part in self.before if self._period(part)]
        self.feeders = [part for part in self.before if not self._period(part)]
        self.is_boundary = [self._period(part) > 0 for part in self.before]
        self.row = row = sequence(*self.device)
        given = given_by(self.device)
        fed, always_fed = given_by(self.feeders), {n for part in self.feeders for n in part.gives}
        maybe = given - set(row.gives)  # keeps its old value at a step that does not give it
        lasting = [n for n in row.reads if n in given] + sorted(maybe - set(row.reads))
        self.carried = [n for n in lasting if n not in always_fed]
        self.fresh = sorted(given - set(self.carried))
        self._check(stage, given)
        self.feeds = sorted(n for n in fed if n in row.reads or n in maybe)
        read_after = {name for part in self.after for name in part.reads}
        self.kept_steps = sorted(read_after & fed - given)
        self.stacked = [name for name in self.fresh if name in read_after]
        self.wanted = wanted | read_after
        gives = self.carried + [n for n in self.fresh if n in self.wanted or n in passed]
        self.gives = gives + [n for n in self.fresh if n not in gives and self._is_result(n)]
        self.donates = [name for name in self.carried if name in may_donate]
        self._programs: dict[int, Program] = {}
        self.name = " + ".join(part.name for part in self.device)

    def _check(self, stage: Stage, given: set[str]) -> None:
        for part in self.device:
            if not on_device(part) and not rolls_back(part):
                raise ValueError(
                    f"{stage}: the host stage {part} lies between device stages, so the steps "
                    "cannot run in chunks. Move it before or after them, or leave chunk out."
                )
        if any(rolls_back(part) for part in stage.parts):
            raise ValueError(f"{stage}: a stage with a rollback cannot run in chunks.")
        for part in stage.parts:
            if self.index in may_give(part):
                raise ValueError(
                    f"{stage}: {part} gives {self.index!r} too, the number of the step. Give the "
                    "inner loop's number another name (index=), or leave chunk out."
                )
        self._check_feeders(stage, given)
        for part in self.after:
            for name in sorted(set(part.reads) & set(self.carried)):
                raise ValueError(
                    f"{stage}: {part} reads {name!r} after each step, but within a chunk it exists "
                    "only on the device. Put it before the device stages, in an every(n, ...) of "
                    "which the chunk is a divisor, or leave chunk out."
                )
            for name in sorted(may_give(part) & {*self.row.reads, *self.carried}):
                raise ValueError(
                    f"{stage}: {part} gives {name!r} to the next step, but the steps of a chunk "
                    "run without the host. Leave chunk out."
                )

    def _check_feeders(self, stage: Stage, given: set[str]) -> None:
        have: set[str] = set()
        later = given | given_by(self.after)  # than the feeders, which run ahead
        for part in self.feeders:
            for name in sorted(set(part.reads) & later - have):
                raise ValueError(
                    f"{stage}: {part} runs ahead for the whole chunk, but reads {name!r}, which "
                    "the steps change. Put it in every(n, ...), or leave chunk out."
                )
            have |= set(part.gives)
        for part in self.feeders:
            for name in sorted((may_give(part) - have) & later):
                raise ValueError(
                    f"{stage}: {part} gives {name!r} at some steps only, and runs ahead for the "
                    "whole chunk, but later stages give it too. Use another name, or leave chunk "
                    "out."
                )

    def _period(self, part: Stage) -> int:
        own = part.kind == "every" and part.settings["index"] == self.index
        return part.settings["period"] if own else 0

    def _is_result(self, name: str) -> bool:
        last = max(i for i, part in enumerate(self.device) if name in may_give(part))
        return not any(name in part.reads for part in self.device[last + 1 :])

    def check_size(self, size: Any) -> None:
        """Refuse a chunk that a period of host stages is not a multiple of."""
        if type(size) is not int or size < 1:
            raise ValueError(f"chunk={size!r} must be a number of steps from 1 on, or 'auto'.")
        for part in self.boundaries:
            period = self._period(part)
            if period % size:
                divisors = [k for k in range(1, min(period, 64) + 1) if period % k == 0]
                around = {period // size * size, (period // size + 1) * size} - {0}
                near = " or ".join(map(str, sorted(around)))
                raise ValueError(
                    f"chunk={size} does not divide the period of {part}, which touches the host. "
                    f"Choose a chunk of {', '.join(map(str, divisors))}, or a period of {near}."
                )

    def candidate(self) -> int:
        """The chunk that "auto" tries: the largest that divides all periods."""
        common = gcd(*(self._period(part) for part in self.boundaries)) or 16
        return max(k for k in range(1, LARGEST + 1) if common % k == 0)

    def _size(self) -> int:
        """The steps per dispatch, if they are known, else those that "auto" tries."""
        size = self.settings["chunk"].value
        return size if type(size) is int else self.candidate()

    def stage(self, single: Stage, *, donate: bool) -> Stage:
        """The loop as a stage; `single` is the same loop a step at a time, of programs."""
        if type(self.settings["chunk"].value) is int:
            self.check_size(self.settings["chunk"].value)
        parts, self.donates = list(single.parts), self.donates if donate else []
        first, last = len(self.before), len(parts) - len(self.after)
        self.before, one, self.after = parts[:first], parts[first:last], parts[last:]
        self.single, self.one_step, self.device_parts = series(parts), series(one), one
        program = Stage(
            name=self.name,
            kind="program",
            needs=self.row.needs,
            optional=self.row.optional,
            gives=tuple(n for n in self.gives if n in self.row.gives),
            run=self.one_step,
            parts=tuple(self.device),
            settings={
                "program": self.program(self._size()),
                "dropped": tuple(n for n in self.fresh if n not in self.gives),
                "donates": tuple(self.donates),
                "chunks": self,
            },
            expression=f"program({', '.join(map(str, self.device))})",
        )
        assert single.again is not None
        made = single.again(*self.before, program, *self.after)
        return replace(made, run=self.run, settings={**made.settings, "chunks": self})

    def program(self, size: int) -> Program:
        """The program that runs up to `size` steps."""
        if size not in self._programs:
            inside = (*self.feeds, self.index)
            optional = dict.fromkeys((*self.row.optional, *self.carried))
            self._programs[size] = Program(
                self.name,
                needs=[n for n in self.row.needs if n not in inside],
                optional=[n for n in optional if n not in (*inside, *self.row.needs)],
                gives=self.gives,
                dropped=[n for n in self.fresh if n not in self.gives],
                donates=self.donates,
                body=lambda context, *extras: self._traced(size, context, *extras),
            )
        return self._programs[size]

    def abstract(self, context: Context) -> tuple[Any, ...]:
        """What the program takes beside a context, in shapes, for a context within a step."""

        def stacked(leaf):
            aval = jax.typeof(leaf)
            return jax.ShapeDtypeStruct((self._size(), *aval.shape), aval.dtype)

        return jax.tree.map(stacked, _pick(context, self.feeds)), 0, 1

    def _traced(self, size: int, context: Context, feeds: Mapping, first: Any, count: Any):
        """`count` steps from `first` on, of at most `size`; `feeds` are stacked along the steps."""

        def step(offset, values):
            fed = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, offset, keepdims=False), feeds)
            entry = context.replace(**{**values, **fed, self.index: first + offset})
            after = trace(self.device, entry)
            only_arrays(self.device, entry, after)
            check_given(self.device, self.gives, self.wanted, after)
            return after

        carried = {name: context[name] for name in self.carried if name in context}
        for name in sorted(exposed(self.device) & set(self.carried) - carried.keys()):
            raise ValueError(
                f"{self.name} reads {name!r}, which the step before gives: in a chunk it must have "
                "a value before the first one too. Put it in the context."
            )
        outputs = [name for name in self.gives if name not in self.carried]
        shapes = jax.eval_shape(lambda: _pick(step(0, carried), outputs))
        rows = jax.tree.map(lambda s: jnp.zeros((size, *s.shape), s.dtype), shapes)

        def one(offset, values):
            after = step(offset, {n: v for n, v in values.items() if n != ROWS})
            rows = jax.tree.map(
                lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, offset, 0),
                values[ROWS],
                _pick(after, outputs),
            )
            return {**_pick(after, carried), ROWS: rows}

        done = loop(0, count, one, {**carried, ROWS: rows}, f"repeat(..., chunk={size})")
        rows = done.pop(ROWS)
        last = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, count - 1, keepdims=False), rows)
        return {**done, **last}, {n: rows[n] for n in self.stacked}

    def run(self, context: Context) -> Context:
        """The loop."""
        begin, end, _ = bounds(self.settings, context)
        size: Any = self.settings["chunk"](context)
        if size == "auto" and isinstance(context.get("chunk"), int):
            size = context["chunk"]  # as it was before the run was resumed
        if size == "auto" and begin < end:
            context, begin, size = self._choose(context, begin, end)
        if begin < end:
            self.check_size(size)
        try:
            while begin < end:
                assert type(size) is int
                count = self._until(begin, end, size)
                body = self.single if size == 1 else partial(self._chunk, size, begin, count)
                context = self._turn(body, context, begin, end, count)
                begin += count
        except BaseException as error:
            reached(error, context)
            raise
        return context

    def _until(self, begin: int, end: int, size: int) -> int:
        """How many steps there are until the end of the chunk."""
        return min(end, (begin // size + 1) * size) - begin

    def _turn(self, body: Any, context: Context, begin: int, end: int, count: int) -> Context:
        return turn(body, context.replace(**{self.index: begin}), self.index, begin, end, count)

    def _chunk(self, size: int, first: int, count: int, context: Context) -> Context:
        context, feeds, kept = self._ahead(context, first, count)
        context, rows = self.program(size)(context, stack(feeds, size), *_placed(first, count))
        return self._follow(context, rows, kept, first, count)

    def _ahead(self, context: Context, first: int, count: int):
        """Run what comes before the device stages; what it feeds to them, and to who follows."""
        feeds, kept = [], []
        for number in range(first, first + count):
            context = context.replace(**{self.index: number})
            for part, boundary in zip(self.before, self.is_boundary, strict=True):
                if number == first or not boundary:
                    context = part.run(context)
            feeds.append(_pick(context, self.feeds))
            kept.append(_pick(context, self.kept_steps))
        return context, feeds, kept

    def _follow(self, context: Context, rows: Any, kept: list, first: int, count: int) -> Context:
        """Run what comes after the device stages, for each step."""
        steps = range(first, first + count)
        at_once = [part for part in self.after if self._follows_at_once(part, kept[0])]
        each = [part for part in self.after if part not in at_once]
        for part in at_once:
            given = cut(_pick(rows, part.reads), count)
            fed = stack([_pick(turn, part.reads) for turn in kept], count)
            values = context.replace(**given, **fed)
            taken = take(values, part.needs, part.optional, f"Stage {part.name!r}")
            if self.index in taken:
                taken[self.index] = steps
            assert part.many is not None
            ledger.timed(part.name, part.many, taken, taken.get("batch"))
        if each:
            run = series(each)
            for number, given, fed in zip(steps, unstack(rows, count), kept, strict=True):
                context = run(context.replace(**given, **fed, **{self.index: number}))
        return context.replace(**{self.index: first + count - 1})

    def _follows_at_once(self, part: Stage, fed: Mapping[str, Any]) -> bool:
        """Whether a stage does all steps at once: nothing of it goes from step to step."""
        if part.many is None or part.gives or set(part.reads) & given_by(self.after):
            return False
        return all(is_slot(fed[name]) for name in part.reads if name in fed)

    def _choose(self, context: Context, first: int, end: int) -> tuple[Context, int, int]:
        """Time both forms on the first steps, and run these in the faster."""
        size = self.candidate()
        if size == 1 or end - first < size:
            none = "no larger chunk divides the periods of its host stages"
            why = none if size == 1 else f"chunks of {size} do not fit"
            print(f"chunk: 1 step per dispatch ({why}).")
            return context.replace(chunk=1) if size == 1 else context, first, 1
        count = self._until(first, end, size)
        body = partial(self._timed, size, first, count)
        context = self._turn(body, context, first, end, count)
        return context, first + count, context["chunk"]

    def _timed(self, size: int, first: int, count: int, context: Context) -> Context:
        context, feeds, kept = self._ahead(context, first, count)
        stacked = stack(feeds, size)

        def chunked(context):
            return self.program(size)(context, stacked, *_placed(first, count))[0]

        def single(context):
            for offset, feed in enumerate(feeds):
                context = self.one_step(context.replace(**feed, **{self.index: first + offset}))
            return context

        chunk_time, step_time = (
            ledger.timed("chunk='auto'", self._time, (form, context)) / count
            for form in (chunked, single)
        )
        chosen = size if chunk_time < WORTH * step_time else 1
        print(
            f"chunk: {chosen} step{'s' if chosen > 1 else ''} per dispatch "
            f"({1e3 * chunk_time:.3g} ms a step in chunks of {size}, {1e3 * step_time:.3g} ms one "
            "by one)."
        )
        context = context.replace(chunk=chosen)
        if chosen == size:
            context, rows = self.program(size)(context, stacked, *_placed(first, count))
            return self._follow(context, rows, kept, first, count)
        run = series([*self.device_parts, *self.after])
        for offset, feed in enumerate(feeds):
            number = {self.index: first + offset}
            context = run(context.replace(**{**kept[offset], **feed, **number}))
        return context

    def _time(self, form: Callable[[Context], Context], context: Context) -> float:
        """Seconds that a form takes, compiled, on copies of what it would consume."""
        best = float("inf")
        for _ in range(3):
            copies = {n: jax.tree.map(jnp.copy, context[n]) for n in self.carried if n in context}
            start = context.became(jax.block_until_ready(copies), (), ())
            began = time.perf_counter()
            with ledger.unbooked():
                jax.block_until_ready(_pick(form(start), self.gives))
            best = min(best, time.perf_counter() - began)
        return best


def _threaded(part: Stage) -> bool:
    """Whether a stage without host stages must run from the host all the same."""
    return not on_device(part) and not rolls_back(part)


def _placed(*numbers: int) -> tuple[jax.Array, ...]:
    """Python ints on the device, by an explicit transfer that keeps their weak type."""
    return jax.device_put(numbers)


def _pick(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
