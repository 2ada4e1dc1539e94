"""The plan of a run: wiring, shapes, data and bytes, found out before a FLOP is spent."""

from __future__ import annotations

import dataclasses
import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crucible import train
from crucible.kitchen.compile import compile as compile_workflow
from crucible.kitchen.compile import programs
from crucible.kitchen.context import Context
from crucible.kitchen.costs import compiled_costs, count_flops
from crucible.kitchen.problems import Problem, Problems
from crucible.kitchen.shapes import Unknown, show_bytes, show_count, size_of
from crucible.kitchen.stage import Stage
from crucible.kitchen.walk import Row, Walk
from crucible.kitchen.wiring import every_part

__all__ = ["FOUND", "Plan", "ProgramPlan", "plan_workflow"]

FOUND = "The plan found this: nothing has been run."  # a note on what `Plan.check` raises
MEMORY = ("params", "frozen", "opt_state", "batch", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class ProgramPlan:
    """One XLA program of a compiled workflow.

    Attributes:
        name: its stages' names.
        stages: these, in order.
        gives: names of what leaves it.
        dropped: names that its stages give and that are never materialised.
        donates: names of what it reuses the memory of.
        flops: of its matrix products, in one step.
        costs: what the compiler says, if it was asked: bytes of `argument`, `output`, `temporary`
            and `peak`, `donated_bytes` and `donation_achieved`, `compile_seconds`.
    """

    name: str
    stages: tuple[str, ...]
    gives: tuple[str, ...]
    dropped: tuple[str, ...]
    donates: tuple[str, ...]
    flops: int | None = None
    costs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do, and whether it can.

    Attributes:
        name: the recipe's.
        problems: what would fail; empty if nothing does.
        notes: what is worth knowing: values that nobody reads, shapes that could not be checked.
        stages: every stage, with the shapes it gives.
        programs: the XLA programs.
        data: what the examples became, if the run trains on data.
        memory: bytes of `params`, `frozen`, `opt_state`, `batch` and `checkpoint`, where there are
            such.
        seconds: how long planning took.
        made: what host stages made; the run uses it.
    """

    name: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    stages: tuple[Row, ...]
    programs: tuple[ProgramPlan, ...]
    data: Mapping[str, str]
    memory: Mapping[str, int]
    seconds: float
    made: Sequence[Any] = field(default=(), repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether nothing would fail."""
        return not self.problems

    def check(self) -> None:
        """Raise what the run would.

        Raises:
            Exception: the first problem's own; a ValueError that lists them if there are several.
        """
        if not self.problems:
            return
        error = self.problems[0].error
        if len(self.problems) > 1:
            lines = "\n".join(
                f"- {_with_notes(problem)}".replace("\n", "\n  ") for problem in self.problems
            )
            error = ValueError(
                f"The plan of {self.name} has {len(self.problems)} problems:\n{lines}"
            )
            error.__cause__ = self.problems[0].error
        if FOUND not in getattr(error, "__notes__", ()):
            error.add_note(FOUND)
        raise error

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values that JSON can say."""
        values = {
            "name": self.name,
            "ok": self.ok,
            "problems": [{"stage": p.stage, "message": p.message} for p in self.problems],
            "notes": list(self.notes),
            "stages": [row._asdict() for row in self.stages],
            "programs": [dataclasses.asdict(program) for program in self.programs],
            "data": dict(self.data),
            "memory": dict(self.memory),
            "seconds": self.seconds,
        }
        return values

    def __str__(self) -> str:
        from rich.console import Console

        file = io.StringIO()
        console = Console(file=file, force_jupyter=False, width=100, highlight=False)
        console.print(*self._tables(), sep="\n")
        return file.getvalue().rstrip()

    def show(self) -> None:
        """Print it as tables, as wide as the terminal; as wide as they are where there is none."""
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal and not console.is_jupyter and "COLUMNS" not in os.environ:
            console = Console(highlight=False, width=1000)
        console.print(*self._tables(), sep="\n")

    def _tables(self) -> list[Any]:
        from rich.markup import escape
        from rich.padding import Padding
        from rich.table import Table

        stages = Table()
        for column in ("stage", "runs on", "gives"):
            stages.add_column(column, overflow="fold")
        for row in self.stages:
            gives = ", ".join(f"{name}: {shape}" for name, shape in row.gives.items())
            where = row.where if row.where in ("device", "host") else ""
            name = Padding(escape(row.name), (0, 0, 0, 2 * row.depth))
            stages.add_row(name, where, escape(gives))
        shown: list[Any] = [f"[bold]Plan of {escape(self.name)}[/]", stages]
        if self.programs:
            shown += ["[bold]XLA programs[/]", _program_table(self.programs)]
        shown += [f"[bold]{escape(name)}[/]  {escape(said)}" for name, said in self.data.items()]
        if self.memory:
            said = [f"{name} {show_bytes(size)}" for name, size in self.memory.items()]
            shown.append("[bold]Memory[/]  " + ", ".join(said))
        shown += [f"[yellow]Note[/]  {escape(note)}" for note in self.notes]
        for problem in self.problems:
            shown.append("[bold red]Problem[/]  " + escape(_with_notes(problem)))
        verdict = "[bold green]The plan passes[/]" if self.ok else "[bold red]The plan fails[/]"
        shown.append(f"{verdict}, after {self.seconds:.1f} s.")
        return shown


def _with_notes(problem: Problem) -> str:
    notes = [note for note in getattr(problem.error, "__notes__", ()) if note != FOUND]
    return "\n".join([problem.message, *notes])


def _program_table(plans: Sequence[ProgramPlan]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    names = ("program", "donates", "never leaves it")
    rows = []
    for program in plans:
        costs = program.costs
        row = dict.fromkeys((*names, "FLOPs", "temporary", "peak", "reused", "compiled"), "")
        said = (" + ".join(program.stages), ", ".join(program.donates), ", ".join(program.dropped))
        row |= dict(zip(names, said, strict=True))
        if program.flops is not None:
            row["FLOPs"] = show_count(program.flops)
        for title in ("temporary", "peak"):
            if f"{title}_bytes" in costs:
                row[title] = show_bytes(costs[f"{title}_bytes"])
        if program.donates and "donation_achieved" in costs:
            row["reused"] = "yes" if costs["donation_achieved"] else "NO"
        if costs:
            row["compiled"] = f"{costs['compile_seconds']:.1f} s"
        rows.append(row)
    table = Table()
    for column in (column for column in rows[0] if any(row[column] for row in rows)):
        right = column not in names
        table.add_column(
            column, overflow="fold", justify="right" if right else "left", no_wrap=right
        )
    for row in rows:
        table.add_row(*(escape(row[str(column.header)]) for column in table.columns))
    return table


def plan_workflow(
    name: str,
    workflow: Stage,
    context: Context,
    *,
    keep: Sequence[str] = (),
    compile: bool = False,
    problems: Sequence[Problem] = (),
) -> Plan:
    """Plan a workflow.

    Args:
        name: what to call it.
        workflow: the uncompiled workflow.
        context: what the run begins with; arrays may be `jax.ShapeDtypeStruct`s.
        keep: as for `compile`.
        compile: also compile each program, for its memory, donation and compile time.
        problems: what has been found already.
    """
    began = time.perf_counter()
    found = Problems(problems)
    try:
        compiled = compile_workflow(workflow, keep=keep)
    except (ValueError, TypeError) as error:
        found.add("compile", error)
        compiled = workflow
    walk = Walk(workflow, problems=found)
    ends = walk.through(compiled, [context])
    kinds = [value for end in ends for value in end.values()]
    data = next((value for value in kinds if isinstance(value, train.Data)), None)
    if data is not None and data.stats.num_supervised_stops == 0:
        message = (
            "No stop token is trained on: the model would never learn to end its answer. Use the "
            "renderer that belongs to the model, or a longer row length (--row-length)."
        )
        walk.problems.add("data", ValueError(message))
    programs_planned = [_program(program, walk, compile=compile) for program in programs(compiled)]
    return Plan(
        name=name,
        problems=tuple(walk.problems),
        notes=tuple(_notes(workflow, walk, keep)),
        stages=walk.rows,
        programs=tuple(programs_planned),
        data=_data(data),
        memory=_memory(ends),
        seconds=time.perf_counter() - began,
        made=walk.made,
    )


def _notes(workflow: Stage, walk: Walk, keep: Sequence[str]) -> list[str]:
    notes = [
        f"The shapes of stage {stage!r} could not be checked: {why}."
        for stage, why in walk.unchecked.items()
    ]
    if walk.cut:
        notes.append(
            "Its conditions allow for more combinations of shapes than a plan follows: each value "
            "was followed in all of its shapes, but not with all those of the others."
        )
    results = {name: stage for name, stage in _unread(workflow).items() if name not in keep}
    if results:
        said = ", ".join(f"{name!r} (of {stage!r})" for name, stage in results.items())
        what = "it is a result" if len(results) == 1 else "they are results"
        notes.append(f"No stage reads {said}: {what} of the run.")
    return notes


def _unread(workflow: Stage) -> dict[str, str]:
    """Names that a stage gives and nobody reads, with that stage."""
    parts = list(every_part(workflow))
    read = {name for part in parts for name in part.reads}
    return {n: p.name for p in parts if p.fn is not None for n in p.gives if n not in read}


def _program(program: Stage, walk: Walk, *, compile: bool) -> ProgramPlan:
    settings = program.settings
    made = settings["program"]
    flops, costs = None, {}
    for entry in _known_entries(program, walk):
        chunks = settings.get("chunks")
        try:
            extras = chunks.abstract(entry) if chunks else ()
            flops = max(flops or 0, count_flops(made.jaxpr(entry, *extras)))
        except Exception as error:
            if not walk.problems:  # else it may be that one
                walk.problems.add(program.name, error, f"In program {program.name!r}.")
            continue
        if compile and not costs and not walk.problems:
            donated = sum(size_of(entry[n]) for n in settings["donates"] if n in entry)
            costs = compiled_costs(made.lower(entry, *extras), donated)
    return ProgramPlan(
        name=program.name,
        stages=tuple(part.name for part in program.parts),
        gives=made.gives,
        dropped=settings["dropped"],
        donates=settings["donates"],
        flops=flops,
        costs=costs,
    )


def _known_entries(program: Stage, walk: Walk) -> list[Context]:
    """The contexts that a program would find, of which all that it reads is known."""
    return [
        entry
        for entry in walk.entries.get(id(program), ())
        if not any(isinstance(entry.get(name), Unknown) for name in program.reads)
    ]


def _data(data: train.Data | None) -> dict[str, str]:
    if data is None:
        return {}
    parts = {"Data": data.stats, "Held out": data.eval_stats}
    return {name: str(stats) for name, stats in parts.items() if stats is not None}


def _memory(ends: Sequence[Context]) -> dict[str, int]:
    """Bytes of the state's parts and of what else takes room."""
    sizes: dict[str, int] = {}
    for slots in (end.slots for end in ends):
        for state in slots.values():
            if isinstance(state, train.TrainState):
                sizes["params"] = size_of(state.params)
                sizes["opt_state"] = size_of(state.opt_state)
                sizes["checkpoint"] = size_of(state)
        sizes |= {n: size_of(slots[n]) for n in ("frozen", "batch") if slots.get(n) is not None}
    return {name: sizes[name] for name in MEMORY if name in sizes}
