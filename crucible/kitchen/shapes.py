"""What a plan knows of values: the shapes of their arrays, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from crucible.kitchen.context import Context, is_slot
from crucible.kitchen.tracing import describe_leaf, is_weak

__all__ = [
    "Signatures",
    "Unknown",
    "few",
    "is_abstract",
    "show_bytes",
    "show_count",
    "show_value",
    "show_values",
    "size_of",
]


@dataclass(frozen=True)
class Unknown:
    """A value of which a plan knows nothing.

    Attributes:
        giver: the stage that gives it.
        why: what to say of the giver, for a reader whose shapes cannot be checked; empty if the
            giver's own problem says it.
    """

    giver: str
    why: str = ""


@dataclass
class Signatures:
    """What can be compared of values and contexts, asked once for each value."""

    _known: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def of(self, value: Any) -> Any:
        """A value's structure, shapes and types; its identity, if it is not of arrays."""
        if id(value) not in self._known:
            self._known[id(value)] = value, _signed(value)  # held, so that its id stays its own
        return self._known[id(value)][1]

    def of_context(self, context: Context, names: Iterable[str] | None = None) -> Any:
        """Those of all values of a context, or of some."""
        names = context if names is None else [name for name in names if name in context]
        return frozenset((name, self.of(context[name])) for name in names)

    def unique(
        self, contexts: Iterable[Context], names: Iterable[str] | None = None
    ) -> list[Context]:
        """One of each kind of context, told apart by all of their values or by some."""
        names = None if names is None else tuple(names)
        first: dict[Any, Context] = {}
        for context in contexts:
            first.setdefault(self.of_context(context, names), context)
        return list(first.values())


def _signed(value: Any) -> Any:
    if not is_slot(value):
        return value if isinstance(value, Unknown) else id(value)
    leaves, structure = jax.tree.flatten(value)
    weak = [is_weak(x) for x in leaves]
    return structure, tuple(zip(map(describe_leaf, leaves), weak, strict=True))


def few(contexts: Sequence[Context], most: int, signatures: Signatures) -> list[Context]:
    """At most so many contexts, first those in which some value is what it is in none before."""
    if len(contexts) <= most:
        return list(contexts)
    seen: set[Any] = set()
    chosen, others = [], []
    names = {name for context in contexts for name in context}
    for context in contexts:
        items = {*signatures.of_context(context), *(n for n in names if n not in context)}
        (others if items <= seen else chosen).append(context)
        seen |= items
    return [*chosen, *others][:most]


def is_abstract(value: Any) -> bool:
    """Whether it has shapes in place of arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))


def size_of(value: Any) -> int:
    """Bytes of a pytree of arrays or of their shapes."""

    def size(leaf: Any) -> int:
        aval = jax.typeof(leaf)
        if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
            aval = jax.eval_shape(jax.random.key_data, leaf)
        return aval.size * aval.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(value))


def show_value(value: Any) -> str:
    """A value by its shapes: `float32[8, 128]`, `25 arrays (12.3 MB)`, or its type."""
    if isinstance(value, Unknown):
        return "?"
    if value is None:
        return "None"
    leaves = jax.tree.leaves(value)
    if not leaves or not is_slot(value):
        return type(value).__name__
    if len(leaves) == 1:
        return describe_leaf(leaves[0])
    return f"{len(leaves)} arrays ({show_bytes(size_of(value))})"


def show_values(values: Mapping[str, Any]) -> str:
    """Named values by their shapes."""
    return ", ".join(f"{name}: {show_value(value)}" for name, value in values.items())


def show_bytes(count: float) -> str:
    """`12.3 MB`."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def show_count(count: float) -> str:
    """`12.3 M`."""
    return _scaled(count, ("", "k", "M", "G", "T", "P", "E")).rstrip()


def _scaled(count: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {units[-1]}"
