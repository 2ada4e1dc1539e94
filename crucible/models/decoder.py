"""A decoder-only transformer as a pair of pure functions over plain nested dicts.

It covers the Llama architecture as Hugging Face defines it: RMSNorm, rotary positions with
Llama-3 scaling, grouped-query attention, SwiGLU, a tied or untied head. Layers are stacked on
their leading axis and scanned, so compile time does not grow with depth.

Axes: `B` batch, `T` time, `V` vocabulary, `D` width, `H` query heads, `G` key and value heads,
`K` head size, `F` feed-forward width, `L` layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crucible.models.lora import project

__all__ = ["TINY", "Decoder", "DecoderConfig", "RopeScaling", "decoder"]

UNROLLED_LAYERS = 4  # up to here unrolling beats scanning on CPU, and compile time stays small


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3 scaling of rotary frequencies, for contexts longer than the pre-trained one."""

    factor: float = 8.0
    """How much slower the low frequencies turn."""
    low_frequency_factor: float = 1.0
    """Wavelengths above `original_max_length / low_frequency_factor` tokens are fully scaled."""
    high_frequency_factor: float = 4.0
    """Wavelengths below `original_max_length / high_frequency_factor` tokens are kept."""
    original_max_length: int = 8192
    """The pre-trained context, in tokens."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder. The defaults are a tiny byte-level model (`models.TINY`)."""

    vocab_size: int = 259
    """Number of token ids (`V`); 259 is the byte tokenizer's."""
    width: int = 128
    """Residual width (`D`)."""
    layers: int = 2
    """Number of blocks (`L`)."""
    heads: int = 4
    """Query heads (`H`)."""
    kv_heads: int = 2
    """Key and value heads (`G`); divides `heads`."""
    head_dim: int | None = None
    """Size of one head (`K`); by default width / heads."""
    mlp_width: int = 384
    """Inner width of the feed-forward block (`F`)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 scaling of the rotary frequencies."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tied_head: bool = True
    """Whether the output head is the embedding."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What blocks compute in: float32 or bfloat16 (norms and softmax stay in float32)."""

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be a whole number, at least 1.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}: each key head "
                "serves the same number of query heads."
            )
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width}. Choose a divisor, or "
                "give head_dim."
            )
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"The head size {self.head_size} must be even for rotary positions.")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be positive.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'.")

    @property
    def head_size(self) -> int:
        """Size of one head, `K`."""
        return self.head_dim if self.head_dim is not None else self.width // self.heads


TINY = DecoderConfig()
"""About 0.4 million parameters over bytes: learns on a laptop in a minute or two."""


class Decoder(NamedTuple):
    """A decoder's pure functions.

    Attributes:
        config: its shape.
        init: `key -> params`.
        apply: `(params, tokens, positions=None, segment_ids=None) -> logits`, `[B, T, V]` float32.
        features: the same up to the final norm, `[B, T, D]`; for losses that never build the
            logits.
        head: `params -> [V, D]`, the output head.
    """

    config: DecoderConfig
    init: Callable[[jax.Array], dict]
    apply: Callable[..., jax.Array]
    features: Callable[..., jax.Array]
    head: Callable[[dict], jax.Array]


def decoder(config: DecoderConfig) -> Decoder:
    """Build a decoder's functions from its shape.

    `positions` default to `0 .. T - 1`. A token attends to itself and to earlier tokens of its
    own segment; without `segment_ids` the whole row is one segment.

    Example:
        >>> model = decoder(TINY)
        >>> params = model.init(jax.random.key(0))
        >>> model.apply(params, jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 259)
    """

    def init(key):
        return _init(config, key)

    def features(params, tokens, positions=None, segment_ids=None):
        return _features(config, params, tokens, positions, segment_ids)

    def head(params):
        return params["embed"] if config.tied_head else params["head"]

    def apply(params, tokens, positions=None, segment_ids=None):
        hidden = features(params, tokens, positions, segment_ids)
        weights = head(params).astype(hidden.dtype)
        return jnp.einsum("btd,vd->btv", hidden, weights, preferred_element_type=jnp.float32)

    return Decoder(config, init, apply, features, head)


def _init(config: DecoderConfig, key: jax.Array) -> dict:
    """Normal weights of deviation 1/sqrt(fan-in); outputs into the residual shrink with depth."""
    size, layers = config.head_size, config.layers
    shapes = {
        "query": (config.width, config.heads * size),
        "key": (config.width, config.kv_heads * size),
        "value": (config.width, config.kv_heads * size),
        "output": (config.heads * size, config.width),
        "gate": (config.width, config.mlp_width),
        "up": (config.width, config.mlp_width),
        "down": (config.mlp_width, config.width),
    }
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate([*shapes, "embed", "head"])}
    residual = {"output", "down"}

    def matrix(name):
        fan_in, fan_out = shapes[name]
        scale = (2 * layers) ** -0.5 if name in residual else 1.0
        return jax.random.normal(keys[name], (layers, fan_in, fan_out)) * (scale * fan_in**-0.5)

    params: dict[str, Any] = {
        "embed": jax.random.normal(keys["embed"], (config.vocab_size, config.width)) * 0.02,
        "layers": {
            "attention_norm": jnp.ones((layers, config.width)),
            "mlp_norm": jnp.ones((layers, config.width)),
            **{name: matrix(name) for name in shapes},
        },
        "final_norm": jnp.ones(config.width),
    }
    if not config.tied_head:
        params["head"] = jax.random.normal(keys["head"], (config.vocab_size, config.width)) * 0.02
    return params


def _features(config, params, tokens, positions, segment_ids) -> jax.Array:
    batch, time = tokens.shape
    dtype = jnp.dtype(config.dtype)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(time), (batch, time))
    cos, sin = _rotary(config, positions)
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    size = config.head_size

    def block(x, layer):  # x: [B*T, D], since two-dimensional products are faster on CPU
        h = _rms_norm(x, layer["attention_norm"], config.norm_epsilon)
        query = project(h, layer["query"]).reshape(batch, time, config.heads, size)
        key = project(h, layer["key"]).reshape(batch, time, config.kv_heads, size)
        value = project(h, layer["value"]).reshape(batch, time, config.kv_heads, size)
        attended = jax.nn.dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value, mask=mask, is_causal=True
        )
        x = x + project(attended.reshape(batch * time, config.heads * size), layer["output"])
        h = _rms_norm(x, layer["mlp_norm"], config.norm_epsilon)
        gated = jax.nn.silu(project(h, layer["gate"])) * project(h, layer["up"])
        return x + project(gated, layer["down"]), None

    if config.remat:
        block = jax.checkpoint(block)
    x = params["embed"][tokens].astype(dtype).reshape(batch * time, config.width)
    unroll = config.layers if config.layers <= UNROLLED_LAYERS else 1
    x, _ = jax.lax.scan(block, x, params["layers"], unroll=unroll)
    x = _rms_norm(x, params["final_norm"], config.norm_epsilon)
    return x.reshape(batch, time, config.width)


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + epsilon)
    return normed.astype(x.dtype) * scale.astype(x.dtype)[None]


def _rotary(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles, both `[B, T, 1, K/2]`."""
    frequencies = jnp.asarray(_frequencies(config), jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per token of each pair of head dimensions, `[K/2]`."""
    exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / config.head_size
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + K/2) of `x`, `[B, T, H, K]`, by the position's angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)
