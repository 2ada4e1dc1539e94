"""The metrics tree: unreduced numbers that add.

A metric is a `Mean(total, weight)`; a plain array is a sum. Both merge by addition, over
microbatches, devices, steps and evaluation batches, so a mean of means cannot be written down.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

__all__ = ["Mean", "compute", "merge"]


@flax.struct.dataclass
class Mean:
    """A mean that has not been divided yet.

    The total may be any pytree of arrays: a gradient summed over a batch is a `Mean` too.

    Attributes:
        total: the weighted sum, an array or a pytree of arrays.
        weight: what to divide by, a scalar; for a loss, the number of supervised tokens.

    Example:
        >>> uneven = merge(Mean(total=6.0, weight=3.0), Mean(total=10.0, weight=1.0))
        >>> float(uneven.value)  # not (2 + 10) / 2
        4.0
    """

    total: Any
    weight: Any

    @classmethod
    def of(cls, values: Any, weights: Any = 1.0) -> Mean:
        """The weighted mean over all entries; an entry of weight 0 contributes nothing, even NaN.

        Args:
            values: an array of any shape; summed in float32 at least.
            weights: broadcastable to it.
        """
        values, weights = jnp.asarray(values), jnp.asarray(weights)
        dtype = jnp.promote_types(jnp.result_type(values, weights), jnp.float32)
        values = values.astype(dtype)
        weights = jnp.broadcast_to(weights.astype(dtype), values.shape)
        return cls(jnp.sum(jnp.where(weights != 0, values * weights, 0)), jnp.sum(weights))

    @property
    def value(self) -> Any:
        """`total / weight`; NaN where nothing was weighed."""
        return jax.tree.map(lambda total: jnp.divide(total, self.weight), self.total)


def merge(*trees: Any) -> Any:
    """Add metrics trees leaf by leaf.

    Args:
        *trees: one or more pytrees of one structure, with `Mean`s and sums at the leaves.

    Raises:
        ValueError: no tree, or trees of different structure.

    Example:
        >>> seen = {"loss": Mean(2.0, 1.0), "tokens": 1}
        >>> merge(seen, seen, seen)
        {'loss': Mean(total=6.0, weight=3.0), 'tokens': 3}
    """
    if not trees:
        raise ValueError("merge needs at least one metrics tree.")
    return reduce(lambda a, b: jax.tree.map(operator.add, a, b), trees)


def compute(tree: Any) -> Any:
    """Reduce a metrics tree: each `Mean` becomes its value, each sum stays.

    Example:
        >>> {k: float(v) for k, v in compute({"loss": Mean(6.0, 4.0), "tokens": 4.0}).items()}
        {'loss': 1.5, 'tokens': 4.0}
    """
    is_mean = lambda node: isinstance(node, Mean)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_mean(x) else x, tree, is_leaf=is_mean)
