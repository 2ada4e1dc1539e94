"""Stages: pure functions that name what they need and what they give."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crucible.kitchen.context import Context
from crucible.kitchen.words import did_you_mean

__all__ = ["Stage", "stage"]


@dataclass(frozen=True, repr=False)
class Stage:
    """A function from context to context that says what it reads and writes.

    Made by `stage` from a function, and by the combinators (`sequence`, `repeat`, ...) from other
    stages. Calling one returns the next context; the one it was given is left as it was.
    """

    name: str
    needs: tuple[str, ...]
    """Names that must be in the context."""
    gives: tuple[str, ...]
    """Names that are certainly in the context afterwards."""
    run: Callable[[Context], Context] = field(compare=False)
    host: bool = False
    """Whether it touches the world outside JAX (files, tokenizers, services)."""
    fn: Callable[..., Any] | None = None
    """The plain function of its slots, for a stage made from one."""
    parts: tuple[Stage, ...] = ()
    """The stages that a combinator is made of."""
    expression: str = ""
    """The expression that makes it."""

    def __call__(self, context: Context) -> Context:
        """Run the stage.

        Raises:
            KeyError: the context lacks something it needs.
        """
        try:
            for name in self.needs:
                if name not in context:
                    raise KeyError(
                        f"Stage {self.name!r} needs {name!r}, which the context does not have."
                        + did_you_mean(name, context)
                    )
            return self.run(context)
        except Exception as error:
            if self.fn is not None:
                error.add_note(f"In stage {self.name!r}.")
            raise

    def __repr__(self) -> str:
        return self.expression or self.name


def stage(*gives: str, host: bool = False) -> Callable[[Callable[..., Any]], Stage]:
    """Make a function a stage. Its parameters name what it needs, the arguments what it gives.

    A parameter with a default is optional: it is taken from the context if it is there. The
    function returns one value per given name, a tuple if there are several, and nothing if there
    are none.

    Args:
        *gives: names of what it returns, in order.
        host: it does something that cannot be traced.

    Raises:
        TypeError: the function has `*args` or `**kwargs`, so its needs cannot be read; when run, it
            returns another number of values than it said.

    Example:
        >>> @stage("total")
        ... def add(left, right=1):
        ...     return left + right
        >>> add.needs, add.gives, add.fn(2, 3)
        (('left',), ('total',), 5)
        >>> add(Context(left=2))["total"]
        3
    """

    def decorate(fn: Callable[..., Any]) -> Stage:
        needs, optional = parameters_of(fn)

        def run(context: Context) -> Context:
            values = {name: context[name] for name in (*needs, *optional) if name in context}
            result = fn(**values)
            if not gives:
                return context
            results = (result,) if len(gives) == 1 else result
            if not isinstance(results, tuple) or len(results) != len(gives):
                raise TypeError(
                    f"Stage {name!r} said that it gives {', '.join(gives)}, but returned "
                    f"{_count(result)}. Return one value per name, in that order."
                )
            return context.replace(**dict(zip(gives, results, strict=True)))

        name = getattr(fn, "__name__", type(fn).__name__)
        return Stage(name, needs, gives, run, host, fn)

    if len(gives) == 1 and callable(gives[0]):
        raise TypeError("Write @stage(...) with parentheses: its arguments name what it gives.")
    return decorate


def parameters_of(fn: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a function's required and of its optional parameters."""
    required, optional = [], []
    for parameter in inspect.signature(fn).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{fn} takes {parameter}, so what it needs cannot be read. Name its parameters."
            )
        (required if parameter.default is parameter.empty else optional).append(parameter.name)
    return tuple(required), tuple(optional)


def _count(result: Any) -> str:
    if result is None:
        return "None"
    return f"{len(result)} values" if isinstance(result, tuple) else f"one {type(result).__name__}"
