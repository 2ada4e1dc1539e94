"""Compiling a workflow: neighbouring device stages become one XLA program.

What leaves a program is what somebody reads later (a later stage, the next turn of a loop, a
cleanup or rollback), what nobody reads (a result), and what is kept on request. The rest, such as
gradients between two stages of one program, is never materialised. What a program both needs and
gives lends its memory to its successor, unless somebody beside it may still read the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from crucible.kitchen import scope
from crucible.kitchen.chunks import Chunks
from crucible.kitchen.context import Context
from crucible.kitchen.programs import Program, claim, share, share_given
from crucible.kitchen.scope import rolls_back
from crucible.kitchen.stage import Stage, parameters_of
from crucible.kitchen.tracing import check_given, exposed, given_by, only_arrays, trace
from crucible.kitchen.wiring import decided, every_part, leaves, may_give
from crucible.kitchen.workflow import sequence

__all__ = ["compile", "programs"]


@dataclass(frozen=True)
class _Around:
    """What is known of the surroundings of a stage.

    Attributes:
        after: names that may be read after it.
        held: names of which somebody beside it may read the old value.
        always: names that a cleanup or a rollback may read at any moment.
        keep: names to keep on request.
        passed: names to keep because a program may pass them on as they were.
        device: names that device stages give, whose memory may belong to them alone.
        donate: whether to donate at all.
    """

    after: frozenset[str]
    held: frozenset[str]
    always: frozenset[str]
    keep: frozenset[str]
    passed: frozenset[str]
    device: frozenset[str]
    donate: bool

    def later(self, names: Iterable[str]) -> _Around:
        """With more names that may be read afterwards."""
        return replace(self, after=self.after | set(names))

    def beside(self, names: Iterable[str]) -> _Around:
        """With more names that somebody beside it reads."""
        return replace(self, held=self.held | set(names))


def compile(workflow: Stage, *, keep: Sequence[str] = (), donate: bool = True) -> Stage:
    """Make programs of a workflow's device stages; the result is a stage that does the same.

    Every slot that is left in the context equals the uncompiled one's: exactly for integers, and
    for floats up to the rounding of XLA, which may compute a sum of several stages at once.

    Args:
        workflow: any stage.
        keep: names to have in the last context even if they are used up within a program.
        donate: let programs reuse the memory of what they replace. The contexts that one called it
            with are then used up: reading such a slot says so. A host stage may give on what it
            read, but to keep an array for later by itself it must copy it (`jax.device_get`).

    Raises:
        ValueError: a `repeat` with chunks has stages that cannot be run in chunks.

    Example:
        >>> from crucible.kitchen import Context, repeat, stage
        >>> @stage("y")
        ... def double(x):
        ...     return 2 * x
        >>> @stage("x")
        ... def add(y):
        ...     return y + 1
        >>> compiled = compile(repeat(3, double, add))
        >>> print(compiled)
        repeat(3, program(double, add))
        >>> last = compiled(Context(x=1))
        >>> int(last["x"]), "y" in last
        (15, False)
    """
    always = {
        name
        for part in every_part(workflow)
        for name in (
            parameters_of(part.rollback)[0] + parameters_of(part.rollback)[1]
            if part.rollback
            else ()
        )
    }
    around = _Around(
        after=frozenset(),
        held=frozenset(always),
        always=frozenset(always),
        keep=frozenset(keep),
        passed=_passed(workflow),
        device=frozenset(n for leaf in leaves((workflow,)) if not leaf.host for n in leaf.gives),
        donate=donate,
    )
    made = _one(_body((workflow,), around))
    lent = {name for program in programs(made) for name in program.settings["donates"]}

    def run(context: Context) -> Context:
        claim(context, lent)
        return made.run(context)

    return replace(made, run=run) if lent else made


def programs(workflow: Stage) -> list[Stage]:
    """The programs of a compiled workflow, each a stage of kind `program`."""
    return list({id(p): p for p in every_part(workflow) if p.kind == "program"}.values())


def _body(stages: Sequence[Stage], around: _Around) -> list[Stage]:
    """Stages in a row, with neighbouring device stages put together."""
    parts = list(flat(stages))
    readers, live = [], around.after | around.always
    for part in reversed(parts):
        readers.append(live)
        live = (live - set(part.gives)) | set(part.reads) | around.always
    readers.reverse()
    made, group, last = [], [], around.after
    for part, after in zip(parts, readers, strict=True):
        if part.kind in ("stage", "fuse") and not part.host and part.rollback is None:
            group.append(part)
            last = after
            continue
        if group:
            made.append(_program(group, replace(around, after=last)))
            group = []
        made.append(_lower(part, replace(around, after=after)))
    if group:
        made.append(_program(group, replace(around, after=last)))
    return made


def flat(stages: Iterable[Stage]) -> Iterable[Stage]:
    """Stages in a row without the sequences around them and what is decided already."""
    for stage in stages:
        if (stage.kind == "sequence" and not rolls_back(stage)) or decided(stage):
            yield from flat(stage.parts)
        else:
            yield stage


def _one(parts: Sequence[Stage]) -> Stage:
    return parts[0] if len(parts) == 1 else sequence(*parts)


def _lower(stage: Stage, around: _Around) -> Stage:
    """The same stage, of programs."""
    parts = stage.parts
    match stage.kind:
        case "stage" if not stage.host:  # it can be rolled back, so it stands alone
            return _journaled(_program([replace(stage, rollback=None)], around), stage)
        case "repeat" if stage.settings["chunk"].value != 1 and parts:
            body = around.later(exposed(parts))
            may_donate = given_by(parts) - body.held
            wanted = body.after | around.keep
            chunks = Chunks(stage, list(flat(parts)), wanted, around.passed, may_donate)
            single = _remade(stage, _body(parts, body))
            return chunks.stage(single, donate=around.donate)
        case "repeat" | "stream":
            items = stage.settings.get("over") or stage.settings.get("source")
            held = items.needs + items.optional if items else ()  # items may be arrays of these
            made = _remade(stage, _body(parts, around.later(exposed(parts)).beside(held)))
            return _sharing(made, held)
        case "every" | "sequence":
            return _remade(stage, _body(parts, around))
        case "when":
            return _remade(stage, (sequence(*_body([part], around)) for part in parts))
        case "parallel":
            gives = [may_give(part) for part in parts]
            reads = [set(part.reads) | given for part, given in zip(parts, gives, strict=True)]
            others = [set().union(*reads[:i], *reads[i + 1 :]) for i in range(len(parts))]
            added = {name for given in gives for name in given if sum(name in g for g in gives) > 1}
            inner = around.later(added).beside(around.always)  # a failed branch has the old values
            branches = zip(parts, others, strict=True)
            return _remade(stage, (_one(_body([p], inner.beside(o))) for p, o in branches))
        case "async_loop":
            producer, *consumers = parts
            stopping = stage.settings["stop_when"]
            stop = (*stopping.needs, *stopping.optional)
            everything = {name for part in every_part(stage) for name in part.reads + part.gives}
            made = _body([producer], around.later(producer.gives).beside(everything))
            body = around.beside(producer.reads).later(
                (*exposed(consumers), *producer.reads, *stop)
            )
            made = _remade(stage, [_one(made), *_body(consumers, body)])
            return _sharing(made, producer.reads)
        case "ensure":
            work, cleanup = parts
            reads = cleanup.reads
            inner = replace(around, always=around.always | set(reads)).later(reads)
            return _remade(stage, [_one(_body([work], inner)), _one(_body([cleanup], around))])
        case _ if stage.host and around.device & set(stage.reads) and may_give(stage):
            return _watched(stage)
        case _:  # host stages, and what is compiled already
            return stage


def _remade(stage: Stage, parts: Iterable[Stage]) -> Stage:
    """The same combination of other stages."""
    assert stage.again is not None
    return stage.again(*parts)


def _passed(workflow: Stage) -> frozenset[str]:
    """Names that a program may or may not give, and that nothing in it reads: its results."""
    names: set[str] = set()
    for part in every_part(workflow):
        if part.kind == "fuse" or (part.kind == "repeat" and part.settings["chunk"].value != 1):
            inside = list(leaves((part,)))
            given = {name for leaf in inside for name in leaf.gives}
            names |= given - set(part.gives) - {name for leaf in inside for name in leaf.reads}
    return frozenset(names)


def _sharing(stage: Stage, names: Sequence[str]) -> Stage:
    """A loop whose items may be the very arrays of these names."""
    if not names:
        return stage

    def run(context: Context) -> Context:
        share(context, names)
        context = stage.run(context)
        share(context, names)
        return context

    return replace(stage, run=run)


def _watched(stage: Stage) -> Stage:
    """A host stage of which one learns whether it gives on the arrays that it reads."""
    gives = may_give(stage)

    def run(context: Context) -> Context:
        after = stage.run(context)
        share_given(context, after, stage.reads, gives)
        return after

    return replace(stage, run=run)


def _journaled(program: Stage, stage: Stage) -> Stage:
    """A program that can be rolled back as its stage can."""

    def run(context: Context) -> Context:
        context = program.run(context)
        scope.completed(made, context)
        return context

    made = replace(program, run=run, rollback=stage.rollback)
    return made


def _program(stages: Sequence[Stage], around: _Around) -> Stage:
    """One program of neighbouring device stages."""
    stages = tuple(stages)
    row = sequence(*stages)
    given = list(dict.fromkeys(n for s in stages for n in (*s.gives, *sorted(may_give(s)))))
    wanted = around.after | around.keep
    kept = wanted | around.passed
    gives = [name for name in given if name in kept or not _used_up(name, stages)]
    passed = tuple(n for n in gives if n not in row.gives and n not in row.reads)
    takes = (*row.reads, *passed)
    donates = [n for n in takes if n in gives and n not in around.held and around.donate]

    def body(context: Context):
        after = trace(stages, context)
        only_arrays(stages, context, after)
        check_given(stages, gives, wanted, after)
        return {name: after[name] for name in gives if name in after.cells}, None

    names = [s.name for s in stages]
    name = names[0] if len(names) == 1 else f"{' + '.join(names)}"
    dropped = [n for n in given if n not in gives]
    program = Program(
        name,
        needs=row.needs,
        optional=(*row.optional, *passed),
        gives=gives,
        dropped=dropped,
        donates=donates,
        body=body,
    )
    return Stage(
        name=name,
        kind="program",
        needs=row.needs,
        optional=row.optional,
        gives=tuple(n for n in gives if n in row.gives),
        run=lambda context: program(context)[0],
        parts=stages,
        settings={"program": program, "dropped": tuple(dropped), "donates": tuple(donates)},
        expression=f"program({', '.join(map(str, stages))})",
    )


def _used_up(name: str, stages: Sequence[Stage]) -> bool:
    """Whether the last value of a name is read within the stages that give it."""
    last = max(i for i, stage in enumerate(stages) if name in may_give(stage))
    return any(name in stage.reads for stage in stages[last + 1 :])
