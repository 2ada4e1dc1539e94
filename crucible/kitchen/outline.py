"""A workflow as data, and as the nested boxes of a picture."""

from __future__ import annotations

import inspect
import math
import numbers
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from crucible.kitchen.stage import Stage
from crucible.kitchen.wiring import Argument, decided, leaves, may_give
from crucible.kitchen.workflow import sequence

__all__ = ["Node", "Words", "describe", "outline"]


def describe(workflow: Stage) -> dict[str, Any]:
    """A workflow as data that `json.dumps` takes.

    Args:
        workflow: any stage, compiled or not.

    Returns:
        `name`, `kind`, `where` ("host" or "device"), `needs`, `optional`, `gives`, `settings`, and
        `parts`, of which each is such a dictionary, without empty branches. A stage made from a
        function has its `module` and `doc` too, a program what it `donates`, and what is `dropped`.

    Example:
        >>> from crucible.kitchen import repeat, stage
        >>> loop = describe(repeat(lambda config: config.n, stage("x")(lambda x: x + 1)))
        >>> loop["kind"], loop["settings"]["count"], loop["parts"][0]["needs"]
        ('repeat', 'λ(config)', ['x'])
    """
    hidden = {"program", "chunks", "donates", "dropped"}
    facts: dict[str, Any] = {
        "name": workflow.name,
        "kind": workflow.kind,
        "where": _where(workflow),
        "needs": list(workflow.needs),
        "optional": list(workflow.optional),
        "gives": list(workflow.gives),
        "settings": {k: _plain(v) for k, v in workflow.settings.items() if k not in hidden},
    }
    if workflow.fn is not None:
        facts["module"] = getattr(workflow.fn, "__module__", None) or ""
        facts["doc"] = _doc(workflow)
    if workflow.kind == "program":
        facts |= {name: list(workflow.settings[name]) for name in ("donates", "dropped")}
    facts["parts"] = [
        describe(part) for part in workflow.parts if part.kind != "sequence" or part.parts
    ]
    return facts


def _where(stage: Stage) -> str:
    return "host" if stage.host else "device"


def _doc(stage: Stage) -> str:
    return (inspect.getdoc(stage.fn) or "").partition("\n")[0]


def _plain(value: Any) -> Any:
    """A setting as data for JSON: what is neither number, text nor a collection as it is shown."""
    if isinstance(value, Argument):
        return _shown(value) if callable(value.value) else _plain(value.value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(v) for v in value), key=repr)
    return _shown(value)


def _shown(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


Words = Sequence[tuple[str, bool]]  # of each, whether it comes from the box before


class Node(NamedTuple):
    """A box of the picture.

    Attributes:
        look: `host`, `device`, `program`, `scope`, `branch` (a part of a scope) or `given`.
        word: the combinator, or what part of it the box is.
        title: what comes after it: its arguments, or a stage's name.
        aside: short facts beside the title.
        takes: slots on the arrow into it.
        columns: boxes in it, from top to bottom, side by side.
        carried: slots that go from one turn to the next.
        over, back: slots that go from the first column to the second, and back.
        hint: what to show on hovering.
    """

    look: str
    word: str
    title: str = ""
    aside: tuple[str, ...] = ()
    takes: Words = ()
    columns: tuple[tuple[Node, ...], ...] = ()
    carried: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    hint: str = ""


class _Seen(NamedTuple):
    """The slots that are there before a box, and those that the box directly before it gives."""

    names: frozenset[str]
    near: frozenset[str]

    def also(self, names: Iterable[str]) -> _Seen:
        """With more slots, that come from nearby."""
        return _Seen(self.names.union(names), self.near.union(names))

    def after(self, *parts: Stage) -> _Seen:
        """After a box of these stages."""
        given = frozenset().union(*map(may_give, parts))
        return _Seen(self.names | given, given)


def outline(workflow: Stage) -> tuple[Node, ...]:
    """The boxes of the outermost column."""
    needs = frozenset(workflow.needs)
    nodes = _nodes((workflow,), _Seen(needs, needs))
    given = (Node("given", "given", aside=workflow.needs),) if needs else ()
    return (*given, *nodes) or (Node("scope", "nothing to run"),)


def _row(stages: Iterable[Stage]) -> Iterator[Stage]:
    """Stages in a row, without the sequences around them, and what is decided already."""
    for stage in stages:
        if stage.kind == "sequence" or decided(stage):
            yield from _row(stage.parts)
        elif any(True for _ in leaves((stage,))):
            yield stage


def _nodes(stages: Iterable[Stage], seen: _Seen) -> tuple[Node, ...]:
    nodes = []
    for part in _row(stages):
        nodes.append(_node(part, seen))
        seen = seen.after(part)
    return tuple(nodes)


def _node(stage: Stage, seen: _Seen) -> Node:
    """The box of a stage; a scope's own arrow says what its argument asks for."""
    if stage.fn is not None or stage.kind == "program":
        reads = stage.reads
    else:
        reads = tuple(dict.fromkeys(_asked(stage)))
    takes = tuple((name, name in seen.near) for name in reads if name in seen.names)
    if stage.fn is not None:
        what = f"{stage.name}({', '.join(stage.reads)}) → {', '.join(stage.gives) or 'nothing'}"
        gives = _sentence("→", stage.gives)
        hint = f"{what}\n{_doc(stage)}".strip()
        return Node(_where(stage), "", stage.name, gives, takes, hint=hint)
    if stage.kind == "program":
        settings, inside = stage.settings, _nodes(stage.parts, _Seen(frozenset(), frozenset()))
        facts = _sentence("donates", settings["donates"]) + _sentence("drops", settings["dropped"])
        return Node("program", "program", "", facts, takes, (inside,))
    return _scope(stage, seen)._replace(takes=takes)


def _sentence(verb: str, names: Sequence[str]) -> tuple[str, ...]:
    return (f"{verb} {names[0]}", *names[1:]) if names else ()


def _asked(stage: Stage) -> list[str]:
    """What a combinator asks for to decide what to do."""
    arguments = [value for value in stage.settings.values() if isinstance(value, Argument)]
    names = [name for a in arguments for name in (*a.needs, *a.optional)]
    index = [stage.settings["index"]] if stage.kind in ("every", "async_loop") else []
    return names + index if stage.kind == "every" else [n for n in names if n not in index]


def _scope(stage: Stage, seen: _Seen) -> Node:
    parts, settings, title = stage.parts, stage.settings, _title(stage)

    def node(*columns, **also):
        return Node("scope", stage.kind, title, columns=columns, **also)

    match stage.kind:
        case "repeat" | "stream":
            bound = [settings[key] for key in ("index", "item") if settings[key]]
            carried = _carried(parts, bound)
            return node(_nodes(parts, seen.also((*bound, *carried))), carried=carried)
        case "async_loop":
            producer, *consumers = parts
            bound = (settings["index"], settings["version"])
            back, carried = settings["publishes"], _carried(consumers, (*producer.gives, *bound))
            eats = seen.after(producer).also((*bound, *carried))
            return node(
                (_branch("producer", (producer,), seen.also((*bound, *back))),),
                (_branch("consumer", consumers, eats, carried),),
                over=producer.gives,
                back=back,
            )
        case "when" if list(_row(parts[1:])):
            branches = zip(("then", "otherwise"), parts, strict=True)
            return node(*((_branch(w, (p,), seen),) for w, p in branches if list(_row((p,)))))
        case "parallel":
            return node(*(_nodes((part,), seen) for part in parts if list(_row((part,)))))
        case "ensure":
            work, cleanup = parts
            last = _branch("cleanup", (cleanup,), seen.after(work))
            return node((*_nodes((work,), seen), *((last,) if list(_row((cleanup,))) else ())))
        case _:
            return node(_nodes(parts, seen))


def _branch(word: str, stages: Iterable[Stage], seen: _Seen, carried: tuple[str, ...] = ()) -> Node:
    return Node("branch", word, columns=(_nodes(stages, seen),), carried=carried)


def _carried(stages: Sequence[Stage], bound: Collection[str]) -> tuple[str, ...]:
    """What a loop's stages take from the turn before."""
    given = set().union(*map(may_give, stages)).difference(bound)
    return tuple(name for name in sequence(*stages).reads if name in given)


def _title(stage: Stage) -> str:
    """A combinator's arguments."""
    settings, words = stage.settings, []
    match stage.kind:
        case "repeat":
            over, usual = settings["over"], "step" if settings["over"] is None else "index"
            words = [_short(settings["count"]) if over is None else f"over {_short(over)}"]
            words += [f"from {_short(settings['start'])}"] * (settings["start"].value != 0)
            words += [f"as {settings['index']}"] * (settings["index"] != usual)
            words += [f"chunk {_short(settings['chunk'])}"] * (settings["chunk"].value != 1)
        case "every":
            words = [f"{settings['period']}"]
            words += [f"of {settings['index']}"] * (settings["index"] != "step")
        case "when":
            words = [_short(settings["condition"])]
        case "stream":
            words = [_short(settings["source"]), f"prefetch {settings['prefetch']}"]
        case "parallel" if settings["max_concurrency"].value is not None:
            words = [f"at most {_short(settings['max_concurrency'])} at once"]
        case "async_loop":
            words = [f"until {_short(settings['stop_when'])}", f"buffer {settings['buffer_size']}"]
        case "retry":
            words = [f"{settings['attempts']} attempts", f"backoff {settings['backoff']:g} s"]
            words += [f"on {settings['on'].rstrip(',')}"] * bool(settings["on"])
        case "timeout":
            words = [f"{settings['seconds']:g} s"]
    return " · ".join(words)


def _short(argument: Argument, limit: int = 44) -> str:
    """An argument in few letters."""
    value = argument.value
    scalar = isinstance(value, str) or getattr(value, "shape", None) == ()
    if isinstance(value, Collection) and not scalar:
        return f"{len(value)} item{'s' * (len(value) != 1)}"
    text = " ".join(str(_plain(argument)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
