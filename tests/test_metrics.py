import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.metrics import Mean, compute, merge

numbers = st.floats(-100, 100, width=32)
weights = st.floats(0.125, 8, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(numbers, weights), min_size=1), min_size=1, max_size=5))
def test_merging_parts_equals_the_mean_of_all(parts):
    merged = merge(*(Mean.of(*map(jnp.array, zip(*part, strict=True))) for part in parts))
    values, w = np.array([pair for part in parts for pair in part], np.float64).T
    np.testing.assert_allclose(merged.value, (values * w).sum() / w.sum(), rtol=1e-4, atol=1e-4)


def test_merging_is_not_a_mean_of_means():
    uneven = merge(Mean(6.0, 3.0), Mean(10.0, 1.0))
    assert float(uneven.value) == 4.0


def test_a_value_of_weight_zero_contributes_nothing_even_if_it_is_nan():
    mean = Mean.of(jnp.array([2.0, jnp.nan]), jnp.array([1.0, 0.0]))
    assert (float(mean.total), float(mean.weight)) == (2.0, 1.0)


def test_what_was_not_weighed_has_no_value():
    assert jnp.isnan(Mean(jnp.zeros(()), jnp.zeros(())).value)


def test_a_mean_of_a_tree_divides_every_leaf_and_merges_like_any_other():
    gradient = Mean({"w": jnp.array([2.0, 4.0]), "b": jnp.array(6.0)}, 2.0)
    doubled = merge(gradient, gradient)
    np.testing.assert_array_equal(doubled.value["w"], gradient.value["w"])
    assert float(doubled.value["b"]) == 3.0
    assert doubled.weight == 4.0


def test_metrics_trees_cross_jit_scan_and_psum():
    def body(carry, x):
        return merge(carry, {"loss": Mean.of(x), "tokens": x.size}), None

    zero = {"loss": Mean(jnp.zeros(()), jnp.zeros(())), "tokens": 0}
    xs = jnp.arange(6.0).reshape(3, 2)
    scanned = compute(jax.jit(lambda xs: jax.lax.scan(body, zero, xs)[0])(xs))
    assert {k: float(v) for k, v in scanned.items()} == {"loss": 2.5, "tokens": 6.0}
    summed = jax.vmap(lambda x: jax.lax.psum({"loss": Mean.of(x)}, "i"), axis_name="i")(xs)
    assert float(summed["loss"].value[0]) == 2.5


def test_merge_of_nothing_says_what_it_needs():
    with pytest.raises(ValueError, match="at least one metrics tree"):
        merge()


def test_a_negative_weight_counts_as_what_it_is():
    mean = Mean.of(jnp.array([2.0, 5.0]), jnp.array([-1.0, 2.0]))
    assert (float(mean.total), float(mean.weight)) == (8.0, 1.0)


def test_every_value_weighs_one_unless_told_otherwise():
    mean = Mean.of(jnp.array([2.0, 4.0, 9.0]))
    assert (float(mean.total), float(mean.weight)) == (15.0, 3.0)
