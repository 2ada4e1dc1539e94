"""Values of several steps as one, with a leading axis, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crucible.kitchen.context import is_slot
from crucible.kitchen.tracing import describe_leaf

__all__ = ["cut", "stack", "unstack"]


def stack(rows: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """Rows of named values as one, with a leading axis of `size`.

    Missing rows are the last one again. Python numbers keep their weak type.

    Raises:
        TypeError: a value is not of arrays.
        ValueError: a value changes its shape.

    Example:
        >>> stack([{"x": np.float32(1.0)}, {"x": np.float32(2.0)}], 3)["x"]
        Array([1., 2., 2.], dtype=float32)
    """
    rows = [*rows, *[rows[-1]] * (size - len(rows))]
    return {name: _stacked(name, [row[name] for row in rows]) for name in rows[0]}


def _stacked(name: str, values: list[Any]) -> Any:
    def join(path, *leaves):
        if len({np.shape(leaf) for leaf in leaves}) > 1:
            shapes = dict.fromkeys(map(describe_leaf, leaves))
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {' and '.join(shapes)} within one chunk. "
                "What is fed to its steps must keep its shape: pad it, or leave chunk out."
            )
        if isinstance(leaves[0], np.ndarray | np.generic):
            return jax.device_put(np.stack(leaves))
        return jnp.stack([jnp.asarray(leaf) for leaf in leaves])

    for value in values:
        if not is_slot(value):
            raise TypeError(
                f"{name!r} is a {type(value).__name__}: the steps of a chunk can be fed with "
                "arrays only. Turn it into arrays, or leave chunk out."
            )
    return jax.tree_util.tree_map_with_path(join, *values)


def cut(rows: Any, count: int) -> Any:
    """The first rows."""
    return jax.tree.map(lambda x: x if x.shape[0] == count else x[:count], rows)


def unstack(rows: Any, count: int) -> list[Any]:
    """The first rows, each by itself, in one dispatch."""
    return _split(rows)[:count] if jax.tree.leaves(rows) else [rows] * count


@jax.jit
def _split(rows: Any) -> list[Any]:
    size = jax.tree.leaves(rows)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], rows) for i in range(size)]
