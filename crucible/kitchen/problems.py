"""What a plan finds wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from crucible.kitchen.context import Context
from crucible.kitchen.stage import Stage
from crucible.kitchen.wiring import unmet

__all__ = ["Problem", "Problems"]


class Problem(NamedTuple):
    """Something that would fail.

    Attributes:
        stage: where.
        message: what, with the shapes.
        error: the exception that the run would raise.
    """

    stage: str
    message: str
    error: Exception


class Problems:
    """What has been found wrong, each once."""

    def __init__(self, found: Iterable[Problem] = ()):
        self._found = list(found)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, stage: str, error: Exception, where: str = "") -> None:
        """What a stage raises, if that has not been said; `where` becomes a note on it."""
        notes = [n for n in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in n]
        if where and not any(note.startswith("In stage") for note in notes):
            notes.insert(0, where)
        if notes or hasattr(error, "__notes__"):
            error.__notes__ = notes
        message = str(error)
        if not isinstance(error, ValueError) or not message:
            message = f"{type(error).__name__}: {message}".removesuffix(": ")
        if message not in {problem.message for problem in self._found}:
            self._found.append(Problem(stage, message, error))

    def missing(self, workflow: Stage, who: str, name: str, context: Context) -> None:
        """Somebody in a workflow does not find what he needs."""
        self.add(who, ValueError(unmet(who, name, workflow, context)))
