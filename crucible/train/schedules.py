"""Learning rates and optimizers, as functions of the step alone.

No schedule here depends on how many steps a run happens to take, so a run that is resumed for
more steps equals one that was that long from the beginning.
"""

from __future__ import annotations

import jax
import optax

__all__ = ["adamw", "warmup_decay"]


def warmup_decay(
    learning_rate: float,
    *,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_fraction: float = 0.1,
) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine down to a fraction.

    Args:
        learning_rate: the peak.
        warmup_steps: step `s` of the warm-up takes `(s + 1) / warmup_steps` of the peak, so that
            no step is wasted at zero.
        decay_steps: how many steps after the warm-up the cosine takes; 0 stays at the peak.
        final_fraction: where the cosine ends, as a fraction of the peak.

    Returns:
        `step -> learning rate`.

    Example:
        >>> rate = warmup_decay(1.0, warmup_steps=4, decay_steps=10)
        >>> [round(float(rate(step)), 2) for step in (0, 1, 4, 9, 14, 99)]
        [0.25, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    peak = (
        optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=final_fraction)
        if decay_steps
        else optax.constant_schedule(learning_rate)
    )
    if not warmup_steps:
        return peak
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([warmup, peak], [warmup_steps])


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW with the settings language models are trained with (b1 0.9, b2 0.95).

    Weight decay is for matrices: vectors are left alone, and whatever is called a norm, a scale or
    a bias (stacked over layers, these have two dimensions too).

    Args:
        learning_rate: a number, or a function of the step.
        weight_decay: multiplied by the learning rate, as in PyTorch.
    """

    def is_decayed(path, leaf):
        name = str(getattr(path[-1], "key", "")) if path else ""
        return leaf.ndim >= 2 and not any(word in name for word in ("norm", "scale", "bias"))

    def decayed(params):
        return jax.tree_util.tree_map_with_path(is_decayed, params)

    return optax.adamw(
        learning_rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay, mask=decayed
    )
