"""How a plan goes through a loop: how often, and when it has seen enough."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

from crucible.kitchen.context import Context, is_slot
from crucible.kitchen.shapes import Signatures, Unknown, show_value
from crucible.kitchen.stage import Stage

__all__ = ["ROUNDS", "Changing", "Turn", "any_number", "exactly", "known_turns", "unknown_turn"]

ROUNDS = 8  # turns in a row after which a value that changes at each is taken to change for ever
LONGEST = 64  # turns that are gone through one by one
ITEMS = 1000  # items of a collection that are looked at

Turn = Callable[[Sequence[Context]], list[Context]]


def known_turns(stage: Stage, signatures: Signatures) -> list[tuple[dict[str, Any], int]] | None:
    """The turns of a loop, if they are known: what it binds, and how often in a row."""
    settings = stage.settings
    index, item = settings["index"], settings["item"]
    if item is None:
        start, count = settings["start"].value, settings["count"].value
        known = isinstance(start, int) and isinstance(count, int)
        return [({index: start}, max(count - start, 0))] if known else None
    items = _items(stage)
    if not isinstance(items, Sized) or not isinstance(items, Iterable):
        return None
    if not isinstance(items, list | tuple) or len(items) > ITEMS:
        looked_at = list(itertools.islice(items, 1))  # others are taken to be like it
        return [({index: 0, item: first}, len(items)) for first in looked_at]
    kinds = itertools.groupby(items, key=lambda one: signatures.of(one) if is_slot(one) else None)
    groups = (list(group) for _, group in kinds)
    return [({index: 0, item: group[0]}, len(group)) for group in groups]


def unknown_turn(stage: Stage) -> dict[str, Any]:
    """What a loop binds in a turn, if its turns are not known."""
    settings = stage.settings
    start = settings["start"].value if "start" in settings else 0
    values: dict[str, Any] = {settings["index"]: start if isinstance(start, int) else 0}
    if settings["item"] is not None:
        values[settings["item"]] = Unknown(stage.name, "whose items are known only when it runs")
    return values


def _items(stage: Stage) -> Any:
    items = stage.settings["over" if stage.kind == "repeat" else "source"].value
    return None if callable(items) else items


def exactly(
    count: int, contexts: Sequence[Context], turn: Turn, signatures: Signatures
) -> list[Context]:
    """What so many turns leave; they are not all gone through where they repeat themselves."""
    seen: dict[Any, int] = {}
    left = [list(contexts)]
    for done in range(min(count, LONGEST)):
        kinds = frozenset(map(signatures.of_context, left[-1]))
        if kinds in seen:
            first = seen[kinds]
            return left[first + (count - first) % (done - first)]
        seen[kinds] = done
        left.append(turn(left[-1]))
    return left[-1]


def any_number(contexts: Sequence[Context], turn: Turn, signatures: Signatures) -> list[Context]:
    """What turns can leave, none included, until another one leaves nothing new."""
    left = news = list(contexts)
    for _ in range(LONGEST):
        known = set(map(signatures.of_context, left))
        news = [c for c in turn(news) if signatures.of_context(c) not in known]
        if not news:
            break
        left = [*left, *news]
    return left


class Changing:
    """Which values have changed at every turn of late."""

    def __init__(self, signatures: Signatures):
        self._signatures = signatures
        self._seen: dict[str, dict[Any, Any]] = {}
        self._turns: dict[str, int] = {}

    def after(self, contexts: Sequence[Context]) -> dict[str, str]:
        """After another turn: names that have changed for too long, and how."""
        for name in {name for context in contexts for name in context}:
            values = [context[name] for context in contexts if name in context]
            kinds = {self._signatures.of(v): v for v in values if not isinstance(v, Unknown)}
            seen = self._seen.setdefault(name, {})
            new = kinds.keys() - seen.keys()
            self._turns[name] = self._turns.get(name, 0) + 1 if new else 0
            seen |= {kind: kinds[kind] for kind in new}
        names = [name for name, turns in self._turns.items() if turns > ROUNDS]
        lasts = {name: list(self._seen[name].values())[-2:] for name in names}
        return {name: ", then ".join(map(show_value, last)) for name, last in lasts.items()}
