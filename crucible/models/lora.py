"""LoRA: a low-rank correction kept apart from the weights it corrects.

The adapter is its own dict of parameters, the only thing trained and saved; the base travels
beside the state, frozen. `attach` joins the two into a tree that the decoder accepts wherever it
accepts plain parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

__all__ = ["Lora", "LoraConfig", "attach", "init_lora", "merge_lora", "project"]

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What a LoRA adapter corrects, and how strongly."""

    rank: int = 16
    """Rank of each correction; 0 = no adapter."""
    alpha: float = 32.0
    """The correction is scaled by alpha / rank."""
    targets: tuple[str, ...] = PROJECTIONS
    """Which projections are corrected: query, key, value, output, gate, up, down."""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} must be 0 (no adapter) or more.")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets={self.targets!r} names a projection twice.")
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets:
            raise ValueError(
                f"targets={self.targets!r} must be some of {', '.join(PROJECTIONS)}"
                + (f"; {unknown[0]!r} is none of them." if unknown else ".")
            )


@flax.struct.dataclass
class Lora:
    """A weight and its correction: `base + scale * a @ b`, never multiplied out."""

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)


def init_lora(config: LoraConfig, base: Mapping[str, Any], key: jax.Array) -> dict:
    """A new adapter, which changes nothing yet (`b` is zero).

    Args:
        config: its rank, strength and targets.
        base: the decoder parameters it will correct.
        key: a PRNG key.

    Returns:
        `{"layers": {name: {"a": [L, in, rank], "b": [L, rank, out]}}}` in float32.

    Raises:
        ValueError: the rank is 0: there is nothing to train.
    """
    if config.rank == 0:
        raise ValueError("rank=0 is no adapter. Choose a rank of at least 1.")
    adapter = {}
    for name in config.targets:
        layers, fan_in, fan_out = base["layers"][name].shape
        name_key = jax.random.fold_in(key, PROJECTIONS.index(name))
        a = jax.random.normal(name_key, (layers, fan_in, config.rank)) * fan_in**-0.5
        adapter[name] = {"a": a, "b": jnp.zeros((layers, config.rank, fan_out))}
    return {"layers": adapter}


def attach(base: Mapping[str, Any], adapter: Mapping[str, Any], config: LoraConfig) -> dict:
    """The base with its adapter, as parameters that the decoder can apply.

    Example:
        >>> from crucible.models import TINY, decoder
        >>> base = decoder(TINY).init(jax.random.key(0))
        >>> config = LoraConfig(rank=2)
        >>> joined = attach(base, init_lora(config, base, jax.random.key(1)), config)
        >>> type(joined["layers"]["query"]).__name__
        'Lora'
    """
    scale = config.alpha / config.rank
    layers = dict(base["layers"])
    for name, pair in adapter["layers"].items():
        layers[name] = Lora(layers[name], pair["a"], pair["b"], scale)
    return {**base, "layers": layers}


def merge_lora(base: Mapping[str, Any], adapter: Mapping[str, Any], config: LoraConfig) -> dict:
    """The base with its adapter multiplied out into plain weights, for taking away."""
    attached = attach(base, adapter, config)

    def multiply_out(weight):
        if not isinstance(weight, Lora):
            return weight
        correction = jnp.einsum("lir,lro->lio", weight.a, weight.b) * weight.scale
        return (weight.base + correction).astype(weight.base.dtype)

    return {**attached, "layers": {k: multiply_out(w) for k, w in attached["layers"].items()}}


def project(x: jax.Array, weight: jax.Array | Lora) -> jax.Array:
    """`x @ weight` in `x`'s type, where the weight may carry a LoRA correction.

    Args:
        x: `[N, in]`.
        weight: `[in, out]`, or a `Lora` over it.
    """
    if isinstance(weight, Lora):
        low_rank = (x @ weight.a.astype(x.dtype)) @ weight.b.astype(x.dtype)
        return x @ weight.base.astype(x.dtype) + low_rank * weight.scale
    return x @ weight.astype(x.dtype)
