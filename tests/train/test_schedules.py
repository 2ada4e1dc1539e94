import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crucible import train


def test_warm_up_rises_to_the_peak_without_a_step_at_zero():
    rate = train.warmup_decay(1.0, warmup_steps=4)
    np.testing.assert_allclose([rate(s) for s in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])


def test_the_cosine_ends_at_a_tenth_and_stays_there():
    rate = train.warmup_decay(2.0, warmup_steps=2, decay_steps=8)
    np.testing.assert_allclose([rate(s) for s in (2, 6, 10, 50)], [2.0, 1.1, 0.2, 0.2], rtol=1e-5)


def test_without_warm_up_or_decay_the_rate_is_constant():
    rate = train.warmup_decay(0.5)
    assert {float(rate(s)) for s in (0, 1, 1000)} == {0.5}


def test_weight_decay_leaves_norms_alone():
    params = {
        "embed": jnp.ones((4, 2)),
        "final_norm": jnp.ones(2),
        "layers": {"norm": jnp.ones((3, 2)), "query": jnp.ones((3, 2, 2))},
    }
    optimizer = train.adamw(0.1, weight_decay=0.5)
    zeros = jax_zeros(params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert float(moved["embed"][0, 0]) == pytest.approx(0.95)
    assert float(moved["layers"]["query"][0, 0, 0]) == pytest.approx(0.95)
    assert float(moved["final_norm"][0]) == 1.0
    assert float(moved["layers"]["norm"][0, 0]) == 1.0


def jax_zeros(tree):
    return optax.tree.zeros_like(tree)


def test_the_cosine_ends_at_the_fraction_asked_for():
    rate = train.warmup_decay(2.0, decay_steps=8, final_fraction=0.5)
    np.testing.assert_allclose([rate(0), rate(8), rate(99)], [2.0, 1.0, 1.0], rtol=1e-6)


def test_adamw_takes_the_published_step_and_decays_nothing_by_default():
    """Two steps in NumPy: b1 0.9, b2 0.95, epsilon 1e-8; tiny gradients show the epsilon."""
    optimizer = train.adamw(0.1)
    params = {"w": jnp.full((2, 2), 3.0)}
    state, w, m, v = optimizer.init(params), 3.0, 0.0, 0.0
    for t, g in enumerate((1e-6, -3e-6), start=1):
        updates, state = optimizer.update({"w": jnp.full((2, 2), g)}, state, params)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = -0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        np.testing.assert_allclose(updates["w"], step, rtol=1e-4)
        params, w = optax.apply_updates(params, updates), w + step
    np.testing.assert_allclose(params["w"], w, rtol=1e-6)
