"""Wiring: what stages need and give, from end to end, and how combinations are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from crucible.kitchen.context import Context
from crucible.kitchen.stage import Stage, parameters_of, take
from crucible.kitchen.words import did_you_mean

__all__ = [
    "Argument",
    "check",
    "combine",
    "decided",
    "every_part",
    "host_only",
    "leaves",
    "may_give",
    "only_stages",
    "options",
    "surely_runs",
    "unmet",
    "wiring_problems",
]


def check(workflow: Stage, given: Iterable[str]) -> None:
    """Check before anything runs that every stage will find what it needs.

    Args:
        workflow: any stage.
        given: the names in the first context.

    Raises:
        ValueError: something needed is never given; a misspelling is answered.
    """
    for problem in wiring_problems(workflow, given):
        raise ValueError(problem)


def wiring_problems(workflow: Stage, given: Iterable[str]) -> list[str]:
    """What `check` would say, all of it."""
    given, problems = set(given), []
    for name in workflow.needs:
        if name not in given:
            reader = _first_reader(workflow, name)
            problems.append(unmet(reader, name, workflow, given))
    return problems


def unmet(who: str, name: str, workflow: Stage, given: Iterable[str]) -> str:
    """What to say of somebody in a workflow who needs a name that is not among those given."""
    elsewhere = may_give(workflow)
    advice = (
        " It is given only later, or in a loop or branch that may not run: give it a first "
        f"value, or make the parameter optional ({name}=None)."
        if name in elsewhere
        else did_you_mean(name, {*given, *elsewhere})
    )
    return f"{who} needs {name!r}, which nothing gives before it." + advice


def decided(stage: Stage) -> bool:
    """Whether it is known when it is built which parts of a condition run, and always."""
    if stage.kind == "when":
        return not callable(stage.settings["condition"].value)
    return stage.kind == "every" and stage.settings["period"] < 2


def _first_reader(workflow: Stage, name: str) -> str:
    for part in workflow.parts:
        if name in part.needs:
            return _first_reader(part, name)
        if name in _undo_needs(part):
            return f"The rollback of {part.name!r}"
    return f"Stage {workflow.name!r}" if workflow.fn else f"The condition or count of {workflow}"


def _undo_needs(stage: Stage) -> Iterable[str]:
    """Names that must be in the context for a stage's rollback, beside what the stage gives."""
    needs = parameters_of(stage.rollback)[0] if stage.rollback is not None else ()
    return [name for name in needs if name not in (*stage.gives, "error")]


def may_give(workflow: Stage) -> set[str]:
    """All names that a stage may give, on any path; also the numbers and items of its loops."""
    return {name for part in every_part(workflow) for name in (*part.gives, *_bound(part))}


def surely_runs(settings: Mapping[str, Any]) -> bool | None:
    """Whether a loop certainly runs (True), certainly does not (False), or it depends."""
    if settings["over"] is not None:
        items = settings["over"].value
        return None if callable(items) else len(items) > 0
    start, count = settings["start"].value, settings["count"].value
    if isinstance(start, int) and isinstance(count, int):
        return start < count
    return None


def _bound(stage: Stage) -> Iterable[str]:
    """Names that a loop gives to its body itself, if it runs."""
    if stage.kind == "repeat" and surely_runs(stage.settings) is False:
        return ()
    loop = stage.kind in ("repeat", "stream", "async_loop")
    names = (stage.settings.get(key) for key in ("index", "item", "version") if loop)
    return [name for name in names if name is not None]


def every_part(workflow: Stage) -> Iterable[Stage]:
    """A stage and all that it is made of, itself first."""
    yield workflow
    for part in workflow.parts:
        yield from every_part(part)


def leaves(stages: Iterable[Stage]) -> Iterable[Stage]:
    """The stages made from functions."""
    return (part for s in stages for part in every_part(s) if part.fn is not None)


class Argument:
    """A constant, or a function of named values of the context, with its needs."""

    def __init__(self, value: Any, needs: tuple[str, ...] = ()):
        if isinstance(value, Stage):
            raise TypeError(f"The stage {value} stands where a value or a plain function belongs.")
        self.value = value
        self.needs, self.optional = parameters_of(value) if callable(value) else (needs, ())
        self._who = str(self) if callable(value) else ""

    def __call__(self, context: Context) -> Any:
        """Its value in a context."""
        if not callable(self.value):
            return self.value
        return self.value(**take(context, self.needs, self.optional, self._who))

    def but(self, name: str) -> Argument:
        """What it needs but for a name that it is given by who asks."""
        other = Argument(None, tuple(n for n in self.needs if n != name))
        other.optional = tuple(n for n in self.optional if n != name)
        return other

    def __repr__(self) -> str:
        name = getattr(self.value, "__name__", "")
        return (name if name != "<lambda>" else f"λ({', '.join(self.needs)})") or repr(self.value)


def options(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """The keyword arguments of an expression: those that are not the usual ones."""
    values = {name: settings[name] for name in usual if settings[name] is not None}
    plain = {k: v.value if isinstance(v, Argument) else v for k, v in values.items()}
    unusual = [k for k, v in plain.items() if callable(v) or v != usual[k]]
    return [f"{name}={values[name]!r}" for name in unusual]


def combine(
    kind: str,
    stages: Sequence[Stage],
    run: Callable[[Context], Context],
    *,
    arguments: Sequence[Argument] = (),
    bound: tuple[str, ...] = (),
    certain: bool = True,
    apart: bool = False,
    settings: Mapping[str, Any] | None = None,
    shown: Sequence[Any] | None = None,
    again: Callable[..., Stage],
) -> Stage:
    """A stage made of stages.

    Args:
        kind: the combinator's name.
        stages: what it is made of.
        run: what it does.
        arguments: what it asks of the context before its stages run.
        bound: names that it gives to its stages itself.
        certain: whether its stages certainly run.
        apart: each stage finds only what was there before all of them.
        settings: what it was given beside stages.
        shown: the arguments of its expression, if not just the stages.
        again: makes the same of other stages.
    """
    have, needs, optional = set(bound), [], []
    for argument in arguments:
        needs += argument.needs
        optional += argument.optional
    for part in stages:
        needs += [name for name in (*part.needs, *_undo_needs(part)) if name not in have]
        optional += [name for name in part.optional if name not in have]
        if not apart:
            have.update(part.gives)
    gives = [*bound, *(name for part in stages for name in part.gives)] if certain else []
    return Stage(
        name=kind,
        kind=kind,
        needs=tuple(dict.fromkeys(needs)),
        optional=tuple(dict.fromkeys(name for name in optional if name not in needs)),
        gives=tuple(dict.fromkeys(gives)),
        run=run,
        host=any(part.host for part in stages),
        parts=tuple(stages),
        settings=settings or {},
        again=again,
        expression=f"{kind}({', '.join(map(str, stages if shown is None else shown))})",
    )


def host_only(combinator: str, stage: Stage) -> None:
    """Refuse a stage of which a part runs on the device."""
    for leaf in leaves(only_stages(combinator, (stage,))):
        if not leaf.host:
            raise ValueError(
                f"{combinator} is for host stages, but {leaf.name!r} runs on the device. If it "
                "touches the world outside JAX, declare it so: @stage(..., host=True)."
            )


def only_stages(combinator: str, stages: Sequence[Any]) -> Sequence[Stage]:
    """The same stages, if that is what they are."""
    for part in stages:
        if not isinstance(part, Stage):
            raise TypeError(
                f"{combinator} takes stages, not {part!r}. Decorate a function with "
                "@kitchen.stage('what_it_gives')."
            )
    return stages
