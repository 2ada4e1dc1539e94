"""A program: device stages compiled as one XLA program, a stage itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crucible.kitchen import ledger
from crucible.kitchen.context import Context, Slot, gone
from crucible.kitchen.scope import reached
from crucible.kitchen.stage import advise, missing
from crucible.kitchen.tracing import describe_leaf, is_weak

__all__ = ["Program", "claim", "share", "share_given"]


class Program:
    """A jitted function from context to context; slots it replaces lend their memory to the new.

    It is traced once for each shape of what it reads and for each set of host objects that its
    stages close over. The ledger learns of every trace, and what made it necessary.

    Args:
        name: for messages, the ledger and profiles.
        needs: names it must find in the context.
        optional: names it takes if they are there.
        gives: names of what leaves it.
        dropped: names that its stages give and nobody reads afterwards.
        donates: names of what it needs and gives, whose memory is reused.
        body: from a context of tracers, and extras, to the values it gives, and what to return
            beside the context.
    """

    def __init__(
        self,
        name: str,
        *,
        needs: Sequence[str],
        optional: Sequence[str],
        gives: Sequence[str],
        dropped: Sequence[str],
        donates: Sequence[str],
        body: Callable[..., tuple[Mapping[str, Any], Any]],
    ):
        self.name, self.needs, self.optional = name, tuple(needs), tuple(optional)
        self.gives, self.dropped = tuple(gives), tuple(dropped)
        self.donates = frozenset(donates)
        self._body = body
        self._variants: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._seen: dict[str, str] = {}  # what was traced last, by leaf
        self._traced = False
        self._shared: frozenset[str] = frozenset()  # given, but perhaps not in memory of its own

    def __call__(self, context: Context, *extras: Any) -> tuple[Context, Any]:
        """The next context, and what the body returns beside it."""
        slots: Mapping[str, Slot] = {}
        donated: dict[str, Any] = {}
        try:
            slots, donated, kept, static = self._take(context)
            call = (self._variant(static), donated, kept, *extras)
            batch = _batch(donated, kept, *extras[:1])
            values, beside = ledger.timed(self.name, self._run, call, batch)
        except BaseException as error:
            self._failed(error, context, {n: slots[n] for n in donated if _is_deleted(donated[n])})
            raise
        if self._traced:
            self._traced = False
            self._shared |= _sharing(values, (donated, kept, extras))
        self._consume(slots, donated)
        return context.became(values, self.dropped, self._shared), beside

    def lower(self, context: Context, *extras: Any) -> Any:
        """The lowered function (`jax.stages.Lowered`) for a context, which may be abstract."""
        donated, kept, static = self._sort(context, lambda slot, donated: slot.value)[1:]
        return self._run(self._function(static).lower, donated, kept, *extras)

    def jaxpr(self, context: Context, *extras: Any) -> Any:
        """The closed jaxpr for a context, which may be abstract."""
        donated, kept, static = self._sort(context, lambda slot, donated: slot.value)[1:]
        return self._run(jax.make_jaxpr(self._function(static)), donated, kept, *extras)

    def _take(self, context: Context):
        def placed(slot, donated):
            if slot.device is None:
                slot.device = _place(slot.value)
            if donated and not slot.fresh:
                _own(slot)
            return slot.device

        return self._sort(context, placed)

    def _run(self, function: Callable[..., Any], donated: Any, kept: Any, *extras: Any) -> Any:
        """Call it; what turns out to be of no use to the results is kept, not donated."""
        try:
            return function(donated, kept, *extras)
        except _Useless as found:
            self.donates -= found.names
            for name in found.names:
                kept[name] = donated.pop(name)
        return function(donated, kept, *extras)

    def _failed(self, error: BaseException, context: Context, lost: Mapping[str, Slot]) -> None:
        for name, slot in lost.items():
            if _is_deleted(slot.value):
                self._consume(context.cells, [name])
            else:  # it was a copy that is lost
                slot.device, slot.fresh = None, False
        if not any(note.startswith("In stage") for note in getattr(error, "__notes__", ())):
            error.add_note(f"In stage {self.name!r}.")
        advise(error)
        reached(error, context, surely=True)  # not that of tracers

    def _sort(self, context: Context, value_of: Callable[[Slot, bool], Any]):
        """The slots it reads, their values to donate and to keep, and the resources."""
        slots, donated, kept, static = context.cells, {}, {}, {}
        for name in (*self.needs, *self.optional):
            slot = slots.get(name)
            if slot is None:
                if name in context.resources:
                    static[name] = context.resources[name]
                elif name in self.needs:
                    raise missing(f"Stage {self.name!r}", name, context)
            elif slot.consumed:
                raise gone(name, *slot.consumed)
            elif name in self.donates:
                donated[name] = value_of(slot, True)
            else:
                kept[name] = value_of(slot, False)
        return slots, donated, kept, static

    def _consume(self, slots: Mapping[str, Slot], names: Iterable[str]) -> None:
        step = slots["step"].value if "step" in slots else None
        for name in names:
            slots[name].consume(self.name, step)

    def _variant(self, static: Mapping[str, Any]) -> Callable[..., Any]:
        key = tuple([(name, id(value)) for name, value in static.items()]) if static else ()
        function = self._variants.get(key)
        if function is None:
            function = self._variants[key] = self._function(static)
        return function

    def _function(self, static: Mapping[str, Any]) -> Any:
        def traced(donated, kept, *extras):
            changed = self._compare({**donated, **kept}, static)
            with ledger.compiling(traced.__name__, changed):
                context = Context.of({**donated, **kept}, static)
                values, beside = self._body(context, *extras)
            if useless := {n for n in donated if not _fits(donated[n], values.get(n))}:
                raise _Useless(useless)
            self._traced = True
            return values, beside

        traced.__name__ = "".join(c if c.isalnum() else "_" for c in self.name)
        return jax.jit(traced, donate_argnums=0)

    def _compare(self, slots: Mapping[str, Any], static: Mapping[str, Any]) -> tuple[str, ...]:
        """What differs from the last trace, leaf by leaf."""
        now = {
            name + jax.tree_util.keystr(path): "weak " * is_weak(leaf) + describe_leaf(leaf)
            for name, value in slots.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
        }
        now |= {name: f"{type(value).__name__} {id(value):#x}" for name, value in static.items()}
        before, self._seen = self._seen, now
        if not before:
            return ()
        return tuple(
            f"{leaf} was {before.get(leaf, 'absent')}, is {now.get(leaf, 'absent')}"
            for leaf in sorted(before.keys() | now.keys())
            if before.get(leaf) != now.get(leaf)
        )


def _place(value: Any) -> Any:
    """NumPy arrays on the device, by an explicit transfer; numbers stay, jit takes them."""
    leaves, structure = jax.tree.flatten(value)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray | np.generic)]
    if not at:
        return value
    for i, array in zip(at, jax.device_put([leaves[i] for i in at]), strict=True):
        leaves[i] = array
    return jax.tree.unflatten(structure, leaves)


def claim(context: Context, names: Iterable[str]) -> None:
    """Let programs reuse the memory of slots that a workflow was called with.

    Not of those that share an array with something else in the context, or that came from NumPy
    (whose memory XLA:CPU may borrow): of these a program makes a copy first.
    """
    holders: dict[int, list[Slot | None]] = {}
    for slot in context.cells.values():
        placed = () if slot.device is slot.value else slot.device
        for leaf in jax.tree.leaves((slot.value, placed)):
            if isinstance(leaf, jax.Array):
                holders.setdefault(id(leaf), []).append(slot)
    for leaf in jax.tree.leaves(dict(context.resources)):
        if isinstance(leaf, jax.Array):
            holders.setdefault(id(leaf), []).append(None)
    for name in names:
        slot = context.cells.get(name)
        if slot is not None and not slot.consumed:
            leaves = jax.tree.leaves(slot.value)
            if not any(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves):
                slot.fresh, slot.device = True, slot.value
    for sharing in holders.values():
        if len(sharing) > 1:
            for slot in sharing:
                if slot is not None:
                    slot.fresh = False


def share(context: Context, names: Iterable[str]) -> None:
    """Learn that slots may no longer have their memory to themselves."""
    for name in names:
        if name in context.cells:
            context.cells[name].fresh = False


def share_given(
    before: Context, after: Context, reads: Iterable[str], gives: Iterable[str]
) -> None:
    """Learn that a host stage may have given the very arrays that it read.

    Their memory no longer belongs to the slot it read alone. What it gave is never taken for its
    own: the host may hold on to it.
    """
    read = [slot for name in reads if (slot := before.cells.get(name)) and slot.fresh]
    if not read:
        return
    values = [after[name] for name in gives if name in after and not after.same(name, before)]
    given = {id(leaf) for leaf in jax.tree.leaves(values)}
    for slot in read:
        if any(id(leaf) in given for leaf in jax.tree.leaves(slot.value)):
            slot.fresh = False


def _own(slot: Slot) -> None:
    """Move a slot into memory that nothing else uses, so that it can be donated.

    Each array is let go of as soon as it is copied, so that a state that fills most of the memory
    need not be there twice.
    """
    leaves, structure = jax.tree.flatten(slot.device)
    whole = slot.value is slot.device
    slot.device = None
    if whole:
        slot.value = None
    try:
        for i in range(len(leaves)):
            if isinstance(leaves[i], jax.Array):
                leaves[i] = jnp.copy(leaves[i])
        slot.fresh = True
    finally:
        slot.device = jax.tree.unflatten(structure, leaves)
        if whole:
            slot.value = slot.device


def _sharing(values: Mapping[str, Any], arguments: Any) -> frozenset[str]:
    """Names of results that are an argument's, or another result's, very array."""
    holders: dict[int, list[str]] = {id(leaf): [""] for leaf in jax.tree.leaves(arguments)}
    for name, value in values.items():
        for leaf in jax.tree.leaves(value):
            holders.setdefault(id(leaf), []).append(name)
    return frozenset(name for names in holders.values() if len(names) > 1 for name in names)


class _Useless(Exception):
    """What a program would be donated in vain, as it gives nothing of that shape back.

    No error: it never leaves this module.
    """

    def __init__(self, names: set[str]):
        super().__init__(names)
        self.names = names


def _fits(old: Any, new: Any) -> bool:
    """Whether a new value has room in the memory of the old one."""
    return sorted(map(describe_leaf, jax.tree.leaves(old))) == sorted(
        map(describe_leaf, jax.tree.leaves(new))
    )


def _is_deleted(value: Any) -> bool:
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(value))


def _batch(*values: Mapping[str, Any]) -> Any:
    """The batch, wherever it is."""
    for named in values:
        if "batch" in named:
            return named["batch"]
    return None
