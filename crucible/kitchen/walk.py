"""A walk through a workflow on every path that it can take, before a FLOP is spent.

It goes with shapes in place of arrays (`jax.eval_shape`), so it is as quick for 70 billion
parameters as for a few. Host stages that say so are run for real (`plan=True`), or by their
stand-in; what they make is kept, and the run uses it (`recall`).

A condition, a period and a count that is a function may turn out either way, at every turn anew:
the walk does not look at the values that they ask for. It goes through a loop of a known number of
turns that often, and through others until no turn leaves anything new.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from crucible.kitchen.concurrency import add_metrics
from crucible.kitchen.context import Context, is_slot
from crucible.kitchen.problems import Problem, Problems
from crucible.kitchen.recall import Made, identical, recall
from crucible.kitchen.shapes import (
    Signatures,
    Unknown,
    few,
    is_abstract,
    show_value,
    show_values,
)
from crucible.kitchen.stage import Stage, advise, parameters_of, take
from crucible.kitchen.turns import (
    Changing,
    Turn,
    any_number,
    exactly,
    known_turns,
    unknown_turn,
)
from crucible.kitchen.wiring import leaves, may_give

__all__ = ["Problem", "Row", "Walk", "recall"]

PATHS = 64  # alternatives that are followed


class Row(NamedTuple):
    """A stage in the plan.

    Attributes:
        name: the stage's.
        depth: how deep it is nested.
        where: `device`, `host`, or the combinator.
        gives: what it gives, each with its shapes, which may differ from path to path.
    """

    name: str
    depth: int
    where: str
    gives: dict[str, str]


class _Place(NamedTuple):
    """Where in the workflow a stage stands."""

    path: tuple[int, ...] = ()
    depth: int = 0

    def part(self, number: int, deeper: int = 1) -> _Place:
        return _Place((*self.path, number), self.depth + deeper)


TOP = _Place()


@dataclass
class Walk:
    """A walk through a workflow, on every path.

    Attributes:
        workflow: the whole, to answer misspellings.
        problems: what would fail.
        made: what host stages have made, to be used by the run: see `recall`.
        unchecked: device stages of which some input is not known, with why.
        entries: by identity of a program, the contexts that it would find.
        cut: whether there were too many alternatives to follow all.
    """

    workflow: Stage
    problems: Problems = field(default_factory=Problems)
    made: list[Made] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)
    entries: dict[int, list[Context]] = field(default_factory=dict)
    cut: bool = False
    _rows: dict[tuple[int, ...], tuple[str, int, str, dict[str, dict[str, None]]]] = field(
        default_factory=dict
    )
    _shapes: dict[Any, Any] = field(default_factory=dict)
    _signatures: Signatures = field(default_factory=Signatures)
    _trails: list[list[Context]] = field(default_factory=list)  # contexts in which a work may fail

    @property
    def rows(self) -> tuple[Row, ...]:
        """The stages met, in order."""
        rows = [row for _, row in sorted(self._rows.items(), key=lambda item: item[0])]
        return tuple(
            Row(name, depth, where, {n: _alternatives(said) for n, said in gives.items()})
            for name, depth, where, gives in rows
        )

    def through(self, stage: Stage, contexts: Sequence[Context], at: _Place = TOP) -> list[Context]:
        """The contexts in which a stage can leave those that it may find."""
        if stage.kind not in ("stage", "sequence"):
            self._rows.setdefault(at.path, (_title(stage), at.depth, stage.kind, {}))
        after = self._through(stage, contexts, at)
        if stage.rollback is not None:
            for name in parameters_of(stage.rollback)[0]:
                for context in after:
                    if name not in context and name != "error":
                        self.problems.missing(
                            self.workflow, f"The rollback of {stage.name!r}", name, context
                        )
        return after

    def _through(self, stage: Stage, contexts: Sequence[Context], at: _Place) -> list[Context]:
        settings, parts = stage.settings, stage.parts
        match stage.kind:
            case "stage":
                return self._unique([self._leaf(stage, context, at) for context in contexts])
            case "program":
                return self._program(stage, contexts, at)
            case "every" if settings["period"] > 1:
                ready = self._have(stage, (settings["index"],), contexts)
                return self._unique([*ready, *self._series(parts, ready, at)])
            case "when" if callable(settings["condition"].value):
                ready = self._have(stage, settings["condition"].needs, contexts)
                return self._unique(
                    c for i, part in enumerate(parts) for c in self.through(part, ready, at.part(i))
                )
            case "repeat" | "stream":
                return self._loop(stage, contexts, at)
            case "async_loop":
                return self._async_loop(stage, contexts, at)
            case "parallel":
                ready = self._have(stage, settings["max_concurrency"].needs, contexts)
                return self._unique(m for c in ready for m in self._parallel(stage, c, at))
            case "ensure":
                return self._ensure(parts[0], parts[1], contexts, at)
            case _:
                return self._series(parts, contexts, at, deeper=int(stage.kind != "sequence"))

    def _unique(self, contexts: Iterable[Context]) -> list[Context]:
        found = self._signatures.unique(contexts)
        self.cut |= len(found) > PATHS
        return few(found, PATHS, self._signatures)

    def _series(
        self, stages: Sequence[Stage], contexts: Sequence[Context], at: _Place, *, deeper: int = 1
    ) -> list[Context]:
        contexts = list(contexts)
        for number, stage in enumerate(stages):
            contexts = self.through(stage, contexts, at.part(number, deeper))
        return contexts

    def _have(self, stage: Stage, names: Iterable[str], contexts: Sequence[Context]):
        """The contexts that have what a condition or a count asks for."""
        names = tuple(names)
        who = f"The condition or count of {_short(str(stage))}"
        for context in contexts:
            for name in names:
                if name not in context:
                    self.problems.missing(self.workflow, who, name, context)
        return [context for context in contexts if all(name in context for name in names)]

    def _program(self, stage: Stage, contexts: Sequence[Context], at: _Place) -> list[Context]:
        found = self.entries.setdefault(id(stage), [])
        found[:] = self._signatures.unique([*found, *contexts], stage.reads)
        with self._unobserved():
            after = self._series(stage.parts, contexts, at)
        for trail in self._trails:
            trail += [*contexts, *after]
        return after

    @contextlib.contextmanager
    def _unobserved(self):
        """Without a trail of the contexts in between."""
        around, self._trails = self._trails, []
        yield
        self._trails = around

    def _ensure(self, work: Stage, cleanup: Stage, contexts: Sequence[Context], at: _Place):
        self._trails.append(list(contexts))
        after = self.through(work, contexts, at.part(0))
        failed = self._signatures.unique(self._trails.pop(), cleanup.reads)
        ends = self.through(cleanup, after, at.part(1))
        with self._unobserved():  # what fails in a cleanup after an error becomes a note
            self.through(cleanup, few(failed, PATHS, self._signatures), at.part(1))
        return ends

    def _loop(self, stage: Stage, contexts: Sequence[Context], at: _Place) -> list[Context]:
        settings = stage.settings
        arguments = [settings.get(k) for k in ("count", "over", "start", "chunk", "source")]
        contexts = self._have(stage, [n for a in arguments if a for n in a.needs], contexts)

        def turn(values: Mapping[str, Any]) -> Turn:
            def once(contexts: Sequence[Context]) -> list[Context]:
                return self._series(stage.parts, [c.replace(**values) for c in contexts], at)

            return self._settling(stage, once)

        turns = known_turns(stage, self._signatures)
        if turns is None:
            left = any_number(contexts, turn(unknown_turn(stage)), self._signatures)
            return self._unique(left)
        for values, count in turns:
            contexts = exactly(count, contexts, turn(values), self._signatures)
        return list(contexts)

    def _async_loop(self, stage: Stage, contexts: Sequence[Context], at: _Place) -> list[Context]:
        producer, *consumers = stage.parts
        settings = stage.settings
        index, version = settings["index"], settings["version"]
        stop = [name for name in settings["stop_when"].needs if name != index]
        contexts = self._have(stage, (*stop, *settings["start"].needs), contexts)

        def turn(contexts: Sequence[Context]) -> list[Context]:
            items = []
            for start in (context.replace(**{index: 0, version: 0}) for context in contexts):
                for end in self.through(producer, [start], at.part(0)):
                    items.append(start.replace(**{name: end[name] for name in producer.gives}))
            for number, consumer in enumerate(consumers, 1):
                items = self.through(consumer, self._unique(items), at.part(number))
            return items

        left = any_number(contexts, self._settling(stage, turn), self._signatures)
        return self._unique(left)

    def _settling(self, stage: Stage, turn: Turn) -> Turn:
        """The turns of a loop, after which what has changed at each for long is unknown."""
        changing = Changing(self._signatures)

        def settled(contexts: Sequence[Context]) -> list[Context]:
            after = turn(contexts)
            names = changing.after(after)
            if not names:
                return after
            read = {name for part in leaves(stage.parts) if not part.host for name in part.reads}
            if traced := sorted(names.keys() & read):
                what = ", ".join(f"{name} ({names[name]})" for name in traced)
                message = (
                    f"{_short(str(stage))}: a device stage reads what changes its shape at every "
                    f"turn, so it would be compiled anew each time: {what}. Keep the shape, or "
                    "read it in a host stage (host=True)."
                )
                self.problems.add(stage.name, ValueError(message))
            why = "" if traced else "where its shape changes at every turn"
            unknown = {name: Unknown(stage.name, why) for name in names}
            return self._unique(
                c.replace(**{n: unknown[n] for n in names if n in c}) for c in after
            )

        return settled

    def _parallel(self, stage: Stage, context: Context, at: _Place) -> list[Context]:
        parts = stage.parts
        branches = [self.through(part, [context], at.part(i)) for i, part in enumerate(parts)]
        self.cut |= len(list(itertools.islice(itertools.product(*branches), PATHS + 1))) > PATHS
        made = []
        for ends in itertools.islice(itertools.product(*branches), PATHS):
            values: dict[str, Any] = {}
            for part, end in zip(parts, ends, strict=True):
                for name in sorted(may_give(part)):
                    if name in end and not end.same(name, context):
                        both = (values[name], end[name]) if name in values else (end[name],)
                        values[name] = self._added(stage, both) if len(both) > 1 else end[name]
            made.append(context.replace(**values))
        return made

    def _added(self, stage: Stage, metrics: tuple[Any, Any]) -> Any:
        """The metrics of two branches, which add."""
        for value in metrics:
            if isinstance(value, Unknown):
                return value
        try:
            return jax.eval_shape(add_metrics, *metrics)
        except Exception as error:
            given = " and ".join(map(show_value, metrics))
            where = f"In {_short(str(stage))}: the metrics of its branches, {given}, do not add."
            self.problems.add(stage.name, error, where)
            return Unknown(stage.name)

    def _leaf(self, stage: Stage, context: Context, at: _Place) -> Context:
        for trail in self._trails:
            trail.append(context)
        lacking = [name for name in stage.needs if name not in context]
        for name in lacking:
            self.problems.missing(self.workflow, f"Stage {stage.name!r}", name, context)
        if lacking:
            after = self._given(stage, context, Unknown(stage.name), at)
        else:
            values = take(context, stage.needs, stage.optional, f"Stage {stage.name!r}")
            result = (self._host if stage.host else self._device)(stage, context, values)
            after = self._given(stage, context, result, at)
        for trail in self._trails:
            trail.append(after)
        return after

    def _host(self, stage: Stage, context: Context, values: dict[str, Any]) -> Any:
        """What a host stage gives; `Unknown` if it does not say."""
        if stage.plan is False:
            return Unknown(stage.name, "which does not say what it gives (@stage(..., plan=))")
        function = stage.fn if stage.plan is True else stage.plan
        assert callable(function)
        if stage.plan is not True:
            needs, optional = parameters_of(function)
            if absent := [name for name in needs if name not in context]:
                return Unknown(stage.name, f"whose plan= needs {absent[0]!r}, which nothing gives")
            values = take(context, needs, optional, f"The plan of {stage.name!r}")
        for name, value in values.items():
            if isinstance(value, Unknown):
                return value
            if stage.plan is True and is_abstract(value):
                why = f"which a plan cannot run (plan=True), since {name!r} is only a shape as yet"
                return Unknown(stage.name, why)
        for other, seen, result in self.made:
            if other is stage and identical(seen, values):
                return result
        try:
            result = function(**values)
        except Exception as error:
            self.problems.add(stage.name, error, f"In stage {stage.name!r}.")
            return Unknown(stage.name)
        self.made.append((stage, values, result))
        return result

    def _device(self, stage: Stage, context: Context, values: dict[str, Any]) -> Any:
        """The shapes that a device stage gives; `Unknown` if it reads what is not known."""
        for name, value in values.items():
            if isinstance(value, Unknown):
                if value.why:
                    said = f"it needs {name!r}, which comes from {value.giver!r}, {value.why}"
                    self.unchecked.setdefault(stage.name, said)
                return value
        slots = {name: value for name, value in values.items() if is_slot(value)}
        static = {name: value for name, value in values.items() if name not in slots}
        key = (id(stage.fn), *((name, self._signatures.of(v)) for name, v in values.items()))
        if key not in self._shapes:
            try:
                self._shapes[key] = jax.eval_shape(
                    lambda slots: _traced(stage, slots, static), slots
                )
            except Exception as error:
                advise(error)
                where = f"In stage {stage.name!r}, given {show_values(slots) or 'nothing'}."
                self.problems.add(stage.name, error, where)
                self._shapes[key] = Unknown(stage.name)
        return self._shapes[key]

    def _given(self, stage: Stage, context: Context, result: Any, at: _Place) -> Context:
        """The context with what a stage gives, as far as it is known."""
        gives = stage.gives
        results = (result,) if len(gives) == 1 else result
        if isinstance(result, Unknown):
            results = (result,) * len(gives)
        elif gives and (not isinstance(results, tuple) or len(results) != len(gives)):
            said = f"{len(results)} values" if isinstance(results, tuple) else show_value(results)
            message = (
                f"Stage {stage.name!r} said that it gives {', '.join(gives)}, but returned {said}. "
                "Return one value per name, in that order."
            )
            self.problems.add(stage.name, TypeError(message))
            results = (Unknown(stage.name),) * len(gives)
        values = dict(zip(gives, results, strict=True)) if gives else {}
        where = "host" if stage.host else "device"
        row = self._rows.setdefault(at.path, (stage.name, at.depth, where, {}))
        for name, value in values.items():
            row[3].setdefault(name, {})[show_value(value)] = None
        return context.replace(**values)


def _alternatives(said: Iterable[str]) -> str:
    """What a name may be: at most three of them, `?` if nothing is known."""
    known = [text for text in said if text != "?"]
    return " or ".join([*known[:3], *(["..."] if len(known) > 3 else [])]) or "?"


def _traced(stage: Stage, slots: Mapping[str, Any], static: Mapping[str, Any]) -> Any:
    """What a device stage makes of tracers, which must be arrays."""
    assert stage.fn is not None
    result = stage.fn(**slots, **static)
    results = result if isinstance(result, tuple) and len(stage.gives) != 1 else (result,)
    for name, value in zip(stage.gives, results, strict=False):
        if not is_slot(value):
            raise TypeError(
                f"Stage {stage.name!r} gives {name!r}, a {type(value).__name__}, but runs on the "
                "device, where there are only arrays. Declare it @stage(..., host=True)."
            )
    return result if stage.gives else None


def _short(text: str) -> str:
    """An expression in a line."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _title(stage: Stage) -> str:
    """A combinator with the argument that says most."""
    keys = ("count", "over", "source", "period", "condition", "seconds", "attempts", "stop_when")
    said = [str(stage.settings[key]) for key in keys if stage.settings.get(key) is not None]
    said = [_short(text) for text in said if text != "None"]
    chunk = stage.settings.get("chunk")
    if chunk is not None and chunk.value != 1:
        said.append(f"chunk={chunk}")
    return " ".join([stage.kind, *said])
