"""Losses: arrays in, `Mean` out, float32 inside.

Axes: `...` any leading axes, usually `B` batch and `T` time; `V` vocabulary, `D` width. Weight 0
means "not trained on": such a position contributes nothing, neither a value nor a gradient, even
if its logits are NaN or its target is out of range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from crucible.metrics import Mean

__all__ = ["cross_entropy", "linear_cross_entropy", "next_token_loss"]

VOCABULARY_CHUNK = 8192  # columns of logits alive at a time


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Mean:
    r"""Cross-entropy of integer targets.

    .. math:: \sum_i w_i (\log \sum_v e^{z_{iv}} - z_{i t_i}) \; / \; \sum_i w_i

    Args:
        logits: `[..., V]`, any float type.
        targets: `[...]` integer token ids, in `[0, V)` wherever the weight is not 0.
        weights: `[...]`, 0 where not trained on.

    Returns:
        The mean over weights, in nats per token, unreduced.

    Raises:
        ValueError: the shapes do not belong together.

    Example:
        >>> even = jnp.zeros((1, 2, 4))
        >>> loss = cross_entropy(even, jnp.array([[1, -100]]), jnp.array([[1.0, 0.0]]))
        >>> round(float(loss.value), 4), float(loss.weight)  # log 4, one token
        (1.3863, 1.0)
    """
    _check_shapes("logits", logits, targets, weights)
    logits, targets, weights = _mask(logits.astype(jnp.float32), targets, weights)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return Mean(jnp.sum(nll * weights), jnp.sum(weights))


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int = VOCABULARY_CHUNK,
) -> Mean:
    """Cross-entropy of `hidden @ head.T` that never holds all the logits.

    The vocabulary is walked in chunks, forward with a running log-sum-exp and backward with the
    chunk's logits computed again: about a third more work on the head, and memory of
    `tokens * chunk` instead of `tokens * V`. Up to `chunk` entries it is the plain form.

    Args:
        hidden: `[..., D]`, any float type.
        head: `[V, D]`; products are taken in `hidden`'s type and summed in float32.
        targets: `[...]` integer token ids, in `[0, V)` wherever the weight is not 0.
        weights: `[...]`, 0 where not trained on.
        chunk: how many vocabulary entries are alive at a time.

    Returns:
        The mean over weights, in nats per token, unreduced.

    Raises:
        ValueError: the shapes do not belong together, or `chunk` is less than 1.

    References:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.

    Example:
        >>> hidden, head = jnp.ones((1, 3, 2)), jnp.ones((10, 2))
        >>> loss = linear_cross_entropy(hidden, head, jnp.ones((1, 3), int), jnp.ones((1, 3)))
        >>> round(float(loss.value), 4)  # log 10
        2.3026
    """
    _check_shapes("hidden", hidden, targets, weights)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 vocabulary entry.")
    if head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"head has shape {head.shape}, but must be [V, D] with D = {hidden.shape[-1]}, "
            f"hidden's last axis."
        )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    hidden, targets, weights = _mask(hidden, targets.reshape(-1), weights.reshape(-1))
    head = head.astype(hidden.dtype)
    if head.shape[0] <= chunk:
        logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
        return cross_entropy(logits, targets, weights)
    nll = _chunked_nll(chunk, hidden, head, targets)
    return Mean(jnp.sum(nll * weights), jnp.sum(weights))


def next_token_loss(features: Callable[..., jax.Array], head: Callable[[Any], jax.Array]):
    """The loss of a language model on a packed batch.

    Args:
        features: `(params, tokens, positions, segment_ids) -> [B, T, D]`.
        head: `params -> [V, D]`.

    Returns:
        A `LossFn`: `(params, batch, key) -> (loss, metrics)`. The batch holds `tokens`, `targets`,
        `weights` and, for packed rows, `positions` and `segment_ids` (0 = padding), all
        `[B, T]`. The metrics are `tokens`, the number that is not padding, and
        `supervised_tokens`, of a weight other than 0.
    """

    def loss_fn(params, batch, key):
        del key  # nothing here is random
        tokens, segments = batch["tokens"], batch.get("segment_ids")
        hidden = features(params, tokens, batch.get("positions"), segments)
        loss = linear_cross_entropy(hidden, head(params), batch["targets"], batch["weights"])
        return loss, {
            "tokens": jnp.asarray(tokens.size) if segments is None else jnp.sum(segments != 0),
            "supervised_tokens": jnp.sum(batch["weights"] != 0),
        }

    return loss_fn


def _check_shapes(name: str, array: jax.Array, targets: jax.Array, weights: jax.Array) -> None:
    try:
        chex.assert_equal_shape([targets, weights])
        chex.assert_shape(targets, array.shape[:-1])
    except AssertionError:
        raise ValueError(
            f"{name} {array.shape}, targets {targets.shape} and weights {weights.shape} do not "
            f"belong together: targets and weights must both be {name}'s leading axes, "
            f"{array.shape[:-1]}."
        ) from None


def _mask(array, targets, weights):
    """Make every position of weight 0 harmless: zero input, target 0 (the gradient is exact 0)."""
    used = weights != 0
    array = jnp.where(used[..., None], array, 0)
    return array, jnp.where(used, targets, 0), weights.astype(jnp.float32)


# The vocabulary in chunks. The last chunk is moved back to end at V, and the entries that it
# shares with its neighbour are switched off, so no padded copy of the head is ever made.


def _chunk_starts(vocabulary: int, chunk: int) -> jax.Array:
    return jnp.arange(0, vocabulary, chunk)


def _chunk_logits(chunk, hidden, head, start):
    """One chunk's rows of the head, logits (`-inf` where switched off) and first entry."""
    first = jnp.minimum(start, head.shape[0] - chunk)
    rows = jax.lax.dynamic_slice_in_dim(head, first, chunk)
    logits = jnp.einsum("nd,vd->nv", hidden, rows, preferred_element_type=jnp.float32)
    fresh = first + jnp.arange(chunk) >= start
    return rows, jnp.where(fresh[None], logits, -jnp.inf), first


def _nll(chunk, hidden, head, targets):
    return _chunked_nll_forward(chunk, hidden, head, targets)[0]


_chunked_nll = jax.custom_vjp(_nll, nondiff_argnums=(0,))


def _chunked_nll_forward(chunk, hidden, head, targets):
    def step(carry, start):
        top, total = carry
        _, logits, _ = _chunk_logits(chunk, hidden, head, start)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        total = total * jnp.exp(top - new_top) + jnp.sum(
            jnp.exp(logits - new_top[:, None]), axis=-1
        )
        return (new_top, total), None

    lowest = jnp.full(hidden.shape[0], jnp.finfo(jnp.float32).min)
    starts = _chunk_starts(head.shape[0], chunk)
    (top, total), _ = jax.lax.scan(step, (lowest, jnp.zeros_like(lowest)), starts)
    log_normaliser = top + jnp.log(total)
    chosen = jnp.sum(hidden.astype(jnp.float32) * head[targets].astype(jnp.float32), axis=-1)
    return log_normaliser - chosen, (hidden, head, targets, log_normaliser)


def _chunked_nll_backward(chunk, residuals, cotangent):
    hidden, head, targets, log_normaliser = residuals

    def step(carry, start):
        d_hidden, d_head = carry
        rows, logits, first = _chunk_logits(chunk, hidden, head, start)
        probability = jnp.exp(logits - log_normaliser[:, None])
        ids = first + jnp.arange(chunk)
        is_target = (targets[:, None] == ids[None]) & (ids >= start)[None]
        d_logits = ((probability - is_target) * cotangent[:, None]).astype(hidden.dtype)
        d_hidden = d_hidden + jnp.einsum(
            "nv,vd->nd", d_logits, rows, preferred_element_type=jnp.float32
        )
        d_rows = jnp.einsum("nv,nd->vd", d_logits, hidden).astype(head.dtype)
        d_rows = d_rows + jax.lax.dynamic_slice_in_dim(d_head, first, chunk)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_rows, first, 0)), None

    zeros = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(head))
    starts = _chunk_starts(head.shape[0], chunk)
    (d_hidden, d_head), _ = jax.lax.scan(step, zeros, starts)
    return d_hidden.astype(hidden.dtype), d_head, None


_chunked_nll.defvjp(_chunked_nll_forward, _chunked_nll_backward)
