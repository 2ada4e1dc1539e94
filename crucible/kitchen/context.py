"""The context: the immutable value that flows through a workflow."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from crucible.kitchen.words import did_you_mean

__all__ = ["Context", "Slot", "gone", "is_slot"]

_NUMPY = (np.ndarray, np.generic)
_ARRAYS = (jax.Array, *_NUMPY, jax.ShapeDtypeStruct, bool, int, float, complex)
_NOT_NUMBERS = "OSUMm"  # NumPy's objects, text and dates, which JAX cannot hold


class Slot:
    """A value of arrays, shared by every context that has it, so that all learn of its end.

    Attributes:
        value: a pytree of arrays or numbers.
        fresh: whether its buffers are known to belong to it alone.
        device: the value on the device, once a program has moved it there.
        consumed: the stage that took its buffers, and the step; empty while it is whole.
    """

    __slots__ = ("consumed", "device", "fresh", "value")

    def __init__(self, value: Any, fresh: bool = False):
        self.value = value
        self.fresh = fresh
        self.device = value if fresh else None
        self.consumed: tuple[Any, ...] = ()

    def consume(self, stage: str, step: Any) -> None:
        """Let go of the buffers, and remember who took them, at which step if that is known."""
        self.consumed, self.value, self.device = (stage, step), None, None


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

    A compiled workflow reuses the memory of slots that it replaces. Reading such a slot from an
    older context is a RuntimeError that says which stage consumed it, at which step.

    Example:
        >>> context = Context(state={"w": np.zeros(3)}, tokenizer=object())
        >>> later = context.replace(step=1)
        >>> sorted(later), sorted(later.slots), "step" in context
        (['state', 'step', 'tokenizer'], ['state', 'step'], False)
        >>> jax.tree.leaves(later)
        [array([0., 0., 0.]), 1]
    """

    __slots__ = ("_slots", "resources")

    _slots: dict[str, Slot]
    resources: Mapping[str, Any]

    def __init__(self, /, **values: Any):
        self._set({}, {})
        self._set(*self._sorted(values))

    def replace(self, /, **values: Any) -> Context:
        """The same context but for these values."""
        return self._make(*self._sorted(values))

    def without(self, *names: str) -> Context:
        """The same context but for the values of these names, which need not be in it."""
        return self._make(
            {k: v for k, v in self._slots.items() if k not in names},
            {k: v for k, v in self.resources.items() if k not in names},
        )

    def same(self, name: str, other: Context) -> bool:
        """Whether another context has the very same value of this name, or neither has one."""
        mine, theirs = self._slots.get(name), other._slots.get(name)
        return mine is theirs and self.resources.get(name) is other.resources.get(name)

    def became(
        self, values: Mapping[str, Any], dropped: Iterable[str], shared: Container[str]
    ) -> Context:
        """The context after a program gave these values, which are slots, in memory of their own.

        Args:
            values: by name.
            dropped: names that are in it no longer.
            shared: names of values that another slot's memory may hold.
        """
        slots = dict(self._slots)
        for name in dropped:
            slots.pop(name, None)
        for name, value in values.items():
            slots[name] = Slot(value, fresh=name not in shared)
        resources = self.resources
        if not resources.keys().isdisjoint((*values, *dropped)):
            resources = {k: v for k, v in resources.items() if k not in values and k not in dropped}
        return self._make(slots, resources)

    @property
    def cells(self) -> Mapping[str, Slot]:
        """What holds the slots, by name."""
        return self._slots

    @property
    def slots(self) -> Mapping[str, Any]:
        """The slots, by name."""
        return {name: self[name] for name in self._slots}

    def __getitem__(self, name: str) -> Any:
        slot = self._slots.get(name)
        if slot is not None:
            if slot.consumed:
                raise gone(name, *slot.consumed)
            return slot.value
        if name in self.resources:
            return self.resources[name]
        raise KeyError(f"The context has no {name!r}.{did_you_mean(name, self)}")

    def __contains__(self, name: object) -> bool:
        return name in self._slots or name in self.resources

    def __iter__(self) -> Iterator[str]:
        yield from self._slots
        yield from self.resources

    def __len__(self) -> int:
        return len(self._slots) + len(self.resources)

    def __repr__(self) -> str:
        def show(slot):
            if slot.consumed:
                return "consumed"
            shapes = [str(np.shape(leaf)) for leaf in jax.tree.leaves(slot.value)]
            if len(shapes) == 1:
                return shapes[0]
            return f"{len(shapes)} arrays" if shapes else repr(slot.value)

        parts = [f"{k}: {show(v)}" for k, v in self._slots.items()]
        parts += [f"{k}: {type(v).__name__}" for k, v in self.resources.items()]
        return f"Context({', '.join(parts)})"

    def __setattr__(self, name, value):
        raise AttributeError(f"A context is immutable: use context.replace({name}=...).")

    def tree_flatten_with_keys(self):
        """Slots are the leaves, by name; resources are static."""
        names = tuple(sorted(self._slots))
        children = [(jax.tree_util.DictKey(name), self[name]) for name in names]
        return children, (names, _ByIdentity(self.resources))

    @classmethod
    def tree_unflatten(cls, static, children):
        """Rebuild from leaves, whatever a transformation has put there."""
        names, resources = static
        return cls.of(dict(zip(names, children, strict=True)), resources.values)

    @classmethod
    def of(cls, slots: Mapping[str, Any], resources: Mapping[str, Any]) -> Context:
        """A context of values that are known to be slots and resources; nothing is looked at."""
        return cls._make({name: Slot(value) for name, value in slots.items()}, dict(resources))

    def _sorted(self, values):
        slots, resources = dict(self._slots), self.resources
        for name, value in values.items():
            if type(value) is int or is_slot(value):
                slots[name] = Slot(value)
                if name in resources:
                    resources = {k: v for k, v in resources.items() if k != name}
            else:
                resources = {**resources, name: value}
                slots.pop(name, None)
        return slots, resources

    @classmethod
    def _make(cls, slots, resources):
        context = object.__new__(cls)
        context._set(slots, resources)
        return context

    def _set(self, slots, resources):
        object.__setattr__(self, "_slots", slots)
        object.__setattr__(self, "resources", resources)


def is_slot(value: Any) -> bool:
    """Whether a context takes a value for arrays, and not for a host object."""
    if isinstance(value, Iterator):
        return False
    return all(
        isinstance(leaf, _ARRAYS)
        and not (isinstance(leaf, _NUMPY) and leaf.dtype.kind in _NOT_NUMBERS)
        for leaf in jax.tree.leaves(value)
    )


def gone(name: str, stage: str, step: Any) -> RuntimeError:
    """The error of reading a slot whose memory has been reused."""
    at = f" at step {step}" if isinstance(step, int) else ""
    return RuntimeError(
        f"{name!r} is gone from this context: stage {stage!r} reused its memory{at}. Read it from "
        "the context that the workflow returned, or make the first context again; to keep older "
        "contexts whole, compile with donate=False."
    )
