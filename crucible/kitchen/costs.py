"""What a program would cost: FLOPs from its jaxpr, memory and donation from the compiler."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

from jax.extend import core

__all__ = ["compiled_costs", "count_flops"]


def count_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products and convolutions of a jaxpr.

    XLA's own analysis counts the body of a loop once, however often it runs; here a `scan` counts
    each turn. A `while` loop, whose length nobody knows, counts one; a `cond` its dearest branch.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((4, 8))
        >>> def turn(total, _):
        ...     return total + x @ x.T, None
        >>> f = lambda total: jax.lax.scan(turn, total, None, length=10)[0]
        >>> count_flops(jax.make_jaxpr(f)(jnp.zeros((4, 4))))  # 10 x 2 x 4 x 8 x 4
        2560
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_flops(equation) for equation in jaxpr.eqns)


def _flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        out = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // out
    inner = [count_flops(jaxpr) for jaxpr in _jaxprs(params.values())]
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


def compiled_costs(lowered: Any, donated_bytes: int) -> dict[str, Any]:
    """Compile a lowered program and ask what it takes.

    Args:
        lowered: `jax.stages.Lowered`.
        donated_bytes: what it is offered to reuse.

    Returns:
        Bytes of arguments, outputs and temporaries, and of all of them together (`peak_bytes`, what
        is reused counted once); whether all that was donated is reused; seconds of compiling. What
        the backend does not tell is absent.
    """
    began = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    costs: dict[str, Any] = {"compile_seconds": time.perf_counter() - began}
    if memory is None:
        return costs
    names = {
        "argument_bytes": "argument_size_in_bytes",
        "output_bytes": "output_size_in_bytes",
        "temporary_bytes": "temp_size_in_bytes",
    }
    costs |= {ours: int(getattr(memory, theirs)) for ours, theirs in names.items()}
    reused = int(memory.alias_size_in_bytes)
    costs["peak_bytes"] = sum(costs[name] for name in names) - reused
    costs["donated_bytes"] = donated_bytes
    costs["donation_achieved"] = reused >= donated_bytes
    return costs
