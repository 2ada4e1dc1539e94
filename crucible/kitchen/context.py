"""The context: the immutable value that flows through a workflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from crucible.kitchen.words import did_you_mean

__all__ = ["Context"]

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, bool, int, float, complex)


def _is_arrays(value: Any) -> bool:
    if isinstance(value, Iterator):
        return False
    return all(isinstance(leaf, _ARRAYS) for leaf in jax.tree.leaves(value))


class _ByIdentity:
    """Host objects, compared by identity so that a context can be a jitted function's argument."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self._identity = frozenset((name, id(value)) for name, value in values.items())

    def __eq__(self, other):
        return isinstance(other, _ByIdentity) and self._identity == other._identity

    def __hash__(self):
        return hash(self._identity)


@jax.tree_util.register_pytree_with_keys_class
class Context(Mapping[str, Any]):
    """Named values, of which a stage takes what it needs and gives what it makes.

    A value that is a pytree of arrays or numbers is a *slot*: a leaf of the context, traceable. Any
    other (a config, a dataset, a tokenizer, a stream) is a *resource*: static, never traced. A
    context is never changed; `replace` makes the next one.

    Example:
        >>> context = Context(state={"w": np.zeros(3)}, tokenizer=object())
        >>> later = context.replace(step=1)
        >>> sorted(later), sorted(later.slots), "step" in context
        (['state', 'step', 'tokenizer'], ['state', 'step'], False)
        >>> jax.tree.leaves(later)
        [array([0., 0., 0.]), 1]
    """

    __slots__ = ("resources", "slots")

    slots: Mapping[str, Any]
    resources: Mapping[str, Any]

    def __init__(self, /, **values: Any):
        self._set({}, {})
        self._set(*self._sorted(values))

    def replace(self, /, **values: Any) -> Context:
        """The same context but for these values."""
        slots, resources = self._sorted(values)
        return self._make(slots, resources)

    def __getitem__(self, name: str) -> Any:
        if name in self.slots:
            return self.slots[name]
        if name in self.resources:
            return self.resources[name]
        raise KeyError(f"The context has no {name!r}.{did_you_mean(name, self)}")

    def __contains__(self, name: object) -> bool:
        return name in self.slots or name in self.resources

    def __iter__(self) -> Iterator[str]:
        yield from self.slots
        yield from self.resources

    def __len__(self) -> int:
        return len(self.slots) + len(self.resources)

    def __repr__(self) -> str:
        def show(value):
            shapes = [str(np.shape(leaf)) for leaf in jax.tree.leaves(value)]
            if len(shapes) == 1:
                return shapes[0]
            return f"{len(shapes)} arrays" if shapes else repr(value)

        parts = [f"{k}: {show(v)}" for k, v in self.slots.items()]
        parts += [f"{k}: {type(v).__name__}" for k, v in self.resources.items()]
        return f"Context({', '.join(parts)})"

    def __setattr__(self, name, value):
        raise AttributeError(f"A context is immutable: use context.replace({name}=...).")

    def tree_flatten_with_keys(self):
        """Slots are the leaves, by name; resources are static."""
        names = tuple(sorted(self.slots))
        children = [(jax.tree_util.DictKey(name), self.slots[name]) for name in names]
        return children, (names, _ByIdentity(self.resources))

    @classmethod
    def tree_unflatten(cls, static, children):
        """Rebuild from leaves, whatever a transformation has put there."""
        names, resources = static
        return cls._make(dict(zip(names, children, strict=True)), resources.values)

    def _sorted(self, values):
        slots, resources = dict(self.slots), dict(self.resources)
        for name, value in values.items():
            is_slot = _is_arrays(value)
            (slots if is_slot else resources)[name] = value
            (resources if is_slot else slots).pop(name, None)
        return slots, resources

    @classmethod
    def _make(cls, slots, resources):
        context = object.__new__(cls)
        context._set(slots, resources)
        return context

    def _set(self, slots, resources):
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "resources", resources)
