"""Stages: pure functions that name what they need and what they give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from crucible.kitchen import ledger, scope
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
    optional: tuple[str, ...] = ()
    """Names that are taken from the context if they are there."""
    host: bool = False
    """Whether it touches the world outside JAX (files, tokenizers, services)."""
    fn: Callable[..., Any] | None = None
    """The plain function of its slots, for a stage made from one."""
    plan: bool | Callable[..., Any] = False
    """What a plan does with a host stage: runs it (True), or this function in its place."""
    rollback: Callable[..., Any] | None = None
    """Undoes it, if the scope it was completed in fails."""
    many: Callable[..., Any] | None = None
    """Does it for several steps at once: given their range, and stacked values."""
    kind: str = "stage"
    """`stage`, or the combinator that made it."""
    parts: tuple[Stage, ...] = ()
    """The stages that a combinator is made of."""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What a combinator was given beside stages."""
    again: Callable[..., Stage] | None = field(default=None, compare=False)
    """Makes the same combination of other parts."""
    expression: str = ""
    """The expression that makes it."""

    @property
    def reads(self) -> tuple[str, ...]:
        """All names that it may take from the context."""
        return self.needs + self.optional

    def __call__(self, context: Context) -> Context:
        """Run the stage.

        Raises:
            KeyError: the context lacks something it needs.
        """
        for name in self.needs:
            if name not in context:
                raise missing(f"Stage {self.name!r}", name, context)
        return self.run(context)

    def __repr__(self) -> str:
        return self.expression or self.name

    def _repr_mimebundle_(self, include=None, exclude=None):
        """A notebook shows a workflow as a picture, and a stage as its name."""
        if not self.parts:
            return {"text/plain": repr(self)}
        from crucible.kitchen.draw import draw

        return {"text/plain": repr(self), "image/svg+xml": draw(self)}


def stage(
    *gives: str,
    host: bool = False,
    plan: bool | Callable[..., Any] = False,
    rollback: Callable[..., Any] | None = None,
    many: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Stage]:
    """Make a function a stage. Its parameters name what it needs, the arguments what it gives.

    A parameter with a default is optional: it is taken from the context if it is there. The
    function returns one value per given name, a tuple if there are several, and nothing if there
    are none.

    Args:
        *gives: names of what it returns, in order.
        host: it does something that cannot be traced. Other stages are *device* stages: pure
            functions of arrays, which a compiled workflow traces with JAX.
        plan: for a host stage, how a plan learns what it gives. True: it is quick and changes
            nothing, so the plan runs it, and the run does not run it again. A function: its
            stand-in, whose parameters name what it needs itself, and which returns arrays or
            `jax.ShapeDtypeStruct`s of the same shapes. False: the plan cannot know.
        rollback: undoes it, when the scope (sequence, turn of a loop, branch) in which it was
            completed fails: called in reverse order of completion. Its parameters name values of
            the context as it was then; `error` is the exception.
        many: for a host stage in a loop that runs several steps per dispatch (`repeat(chunk=)`):
            does the same for all of them at once. It has the same parameters, of which the loop's
            number is a `range`, and whatever changes by the step has a leading axis for it.

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
    if len(gives) == 1 and callable(gives[0]):
        raise TypeError("Write @stage(...) with parentheses: its arguments name what it gives.")
    if (plan or many) and not host:
        raise TypeError("plan and many are for host stages: add host=True, or leave them out.")

    def decorate(fn: Callable[..., Any]) -> Stage:
        needs, optional = parameters_of(fn)
        name = getattr(fn, "__name__", type(fn).__name__)

        def run(context: Context) -> Context:
            try:
                values = take(context, needs, optional, f"Stage {name!r}")
                result = ledger.timed(name, fn, values, values.get("batch"))
                given = _named(result)
            except BaseException as error:
                explain(error, context, f"In stage {name!r}.")
                raise
            context = context.replace(**given) if gives else context
            if rollback is not None:
                scope.completed(made, context)
            return context

        def _named(result: Any) -> Mapping[str, Any]:
            if not gives:
                return {}
            results = (result,) if len(gives) == 1 else result
            if not isinstance(results, tuple) or len(results) != len(gives):
                raise TypeError(
                    f"Stage {name!r} said that it gives {', '.join(gives)}, but returned "
                    f"{_count(result)}. Return one value per name, in that order."
                )
            return dict(zip(gives, results, strict=True))

        made = Stage(
            name,
            needs,
            gives,
            run,
            optional=optional,
            host=host,
            fn=fn,
            plan=plan,
            rollback=rollback,
            many=many,
        )
        return made

    return decorate


def take(
    context: Context, needs: Sequence[str], optional: Sequence[str], who: str
) -> dict[str, Any]:
    """The values that `who` takes from the context."""
    for name in needs:
        if name not in context:
            raise missing(who, name, context)
    values = {name: context[name] for name in needs}
    for name in optional:
        if name in context:
            values[name] = context[name]
    return values


def missing(who: str, name: str, context: Context) -> KeyError:
    """The error of a stage that does not find what it needs."""
    return KeyError(
        f"{who} needs {name!r}, which the context does not have." + did_you_mean(name, context)
    )


def explain(error: BaseException, context: Context, where: str) -> None:
    """Note on an error where it arose, and how far the context had come."""
    if not hasattr(error, "_crucible_context"):
        error._crucible_context = context  # type: ignore[attr-defined]
        error.add_note(where)


def advise(error: BaseException) -> None:
    """Say what to do about Python code that asks for the value of a traced array."""
    asks = jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError
    if isinstance(error, (*asks, jax.errors.TracerIntegerConversionError)):
        error.add_note(
            "A stage runs on the device unless it says host=True: it is traced, with shapes in "
            "place of values. If it prints, records or decides in Python, declare it @stage(..., "
            "host=True); else use jnp.where or jax.lax.cond."
        )


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
