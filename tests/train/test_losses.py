import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crucible import train

KEYS = jax.random.split(jax.random.key(0), 4)


def example(vocabulary=29, tokens=(3, 5), width=8):
    hidden = jax.random.normal(KEYS[0], (*tokens, width))
    head = jax.random.normal(KEYS[1], (vocabulary, width))
    targets = jax.random.randint(KEYS[2], tokens, 0, vocabulary)
    weights = jnp.round(jax.random.uniform(KEYS[3], tokens) * 2, 1)
    return hidden, head, targets, weights.at[0, 0].set(0.0)


def oracle(logits, targets, weights):
    """NumPy, float64: total, weight."""
    z = np.asarray(logits, np.float64)
    top = z.max(-1, keepdims=True)
    log_p = z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    return (nll * np.asarray(weights)).sum(), np.asarray(weights, np.float64).sum()


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jitted", "eager"])
def test_cross_entropy_equals_the_oracle(transform):
    hidden, head, targets, weights = example()
    logits = hidden @ head.T
    loss = transform(train.cross_entropy)(logits, targets, weights)
    total, weight = oracle(logits, targets, weights)
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    np.testing.assert_allclose(loss.weight, weight, rtol=1e-6)


def test_even_logits_cost_the_log_of_the_vocabulary():
    loss = train.cross_entropy(jnp.zeros((2, 3, 7)), jnp.ones((2, 3), int), jnp.ones((2, 3)))
    np.testing.assert_allclose(loss.value, np.log(7), rtol=1e-6)


@pytest.mark.parametrize(
    ("vocabulary", "chunk"), [(2, 1), (29, 7), (29, 28), (29, 29), (30, 10), (70, 64)]
)
def test_the_chunked_form_equals_the_plain_one_in_value_and_gradient(vocabulary, chunk):
    hidden, head, targets, weights = example(vocabulary)

    def plain(hidden, head):
        return train.cross_entropy(hidden @ head.T, targets, weights).total

    def chunked(hidden, head):
        return train.linear_cross_entropy(hidden, head, targets, weights, chunk=chunk).total

    a, grads_a = jax.value_and_grad(plain, (0, 1))(hidden, head)
    b, grads_b = jax.value_and_grad(chunked, (0, 1))(hidden, head)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(grads_a, grads_b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64], ids=["chunked", "plain"])
def test_a_masked_position_contributes_nothing_not_even_a_nan_gradient(chunk):
    hidden, head, targets, weights = example()
    spoilt = hidden.at[0, 0].set(jnp.nan)
    outside = targets.at[0, 0].set(-100)

    def total(hidden, head, targets):
        return train.linear_cross_entropy(hidden, head, targets, weights, chunk=chunk).total

    clean, clean_grads = jax.value_and_grad(total, (0, 1))(hidden, head, targets)
    value, grads = jax.value_and_grad(total, (0, 1))(spoilt, head, outside)
    assert float(value) == float(clean)
    np.testing.assert_array_equal(grads[0][0, 0], 0)
    for a, b in zip(grads, clean_grads, strict=True):
        np.testing.assert_array_equal(a, b)


def test_masked_nan_logits_leave_value_and_gradient_alone():
    hidden, head, targets, weights = example()
    logits = (hidden @ head.T).at[0, 0].set(jnp.nan)
    value, grad = jax.value_and_grad(lambda z: train.cross_entropy(z, targets, weights).total)(
        logits
    )
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("chunk", [8, 64], ids=["chunked", "plain"])
def test_extreme_logits_give_no_nan(chunk):
    hidden = jnp.array([[[1e4], [-1e4], [0.0]]])
    head = jnp.linspace(-1, 1, 29)[:, None]
    targets, weights = jnp.array([[28, 28, 3]]), jnp.ones((1, 3))

    def total(hidden):
        return train.linear_cross_entropy(hidden, head, targets, weights, chunk=chunk).total

    value, grad = jax.value_and_grad(total)(hidden)
    np.testing.assert_allclose(value, 0 + 2e4 + np.log(29), rtol=1e-5)
    assert jnp.isfinite(grad).all()


def test_low_precision_inputs_are_reduced_in_float32():
    hidden, head, targets, weights = example()
    halves = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    exact = train.linear_cross_entropy(
        *(x.astype(jnp.float32) for x in halves), targets, weights, chunk=8
    )
    loss, grads = jax.value_and_grad(
        lambda h, w: train.linear_cross_entropy(h, w, targets, weights, chunk=8).total, (0, 1)
    )(*halves)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, exact.total, rtol=1e-2)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def test_chunking_takes_at_most_an_eighth_of_the_plain_forms_memory():
    vocabulary, width, tokens = 151_936, 1024, 4096
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, tokens, width), jnp.float32),
            ((vocabulary, width), jnp.float32),
            ((1, tokens), jnp.int32),
            ((1, tokens), jnp.float32),
        )
    ]

    def temporary_bytes(loss):
        gradient = jax.jit(jax.value_and_grad(lambda *a: loss(*a).total, (0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    chunked = temporary_bytes(train.linear_cross_entropy)
    plain = temporary_bytes(lambda h, w, t, m: train.cross_entropy(h @ w.T, t, m))
    assert chunked * 8 <= plain


def test_a_frozen_head_costs_no_gradient_memory():
    """LoRA differentiates the hidden states only."""
    vocabulary, width, tokens = 49_152, 576, 64
    f = jax.jit(jax.grad(lambda h, w, t, m: train.linear_cross_entropy(h, w, t, m).total))
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    )
    temporary = f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary < vocabulary * width * 4 / 2


def test_shapes_that_do_not_belong_together_are_named():
    with pytest.raises(ValueError, match=r"logits \(2, 3, 7\), targets \(2, 3\) and weights \(2,"):
        train.cross_entropy(jnp.zeros((2, 3, 7)), jnp.zeros((2, 3), int), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"head has shape \(7, 5\).*D = 4"):
        train.linear_cross_entropy(
            jnp.zeros((1, 2, 4)), jnp.zeros((7, 5)), jnp.zeros((1, 2), int), jnp.ones((1, 2))
        )
    with pytest.raises(ValueError, match="chunk=0"):
        train.linear_cross_entropy(
            jnp.zeros((1, 2, 4)),
            jnp.zeros((7, 4)),
            jnp.zeros((1, 2), int),
            jnp.ones((1, 2)),
            chunk=0,
        )


def test_negative_weights_push_away():
    hidden, head, targets, weights = example()
    signed = weights.at[1].multiply(-1.0)
    total, weight = oracle(hidden @ head.T, targets, signed)
    for chunk in (7, 64):
        loss = train.linear_cross_entropy(hidden, head, targets, signed, chunk=chunk)
        np.testing.assert_allclose(loss.total, total, rtol=1e-4)
        np.testing.assert_allclose(loss.weight, weight, rtol=1e-5)


def test_logits_of_low_precision_are_reduced_as_if_they_were_float32():
    hidden, head, targets, weights = example()
    logits = (hidden @ head.T).astype(jnp.bfloat16)
    loss = train.cross_entropy(logits, targets, weights)
    assert loss.total.dtype == jnp.float32
    total, _ = oracle(logits.astype(jnp.float32), targets, weights)
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64], ids=["chunked", "plain"])
def test_products_of_low_precision_are_summed_in_float32(chunk):
    hidden, head, targets, weights = example(width=64)
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    loss = train.linear_cross_entropy(hidden, head, targets, weights, chunk=chunk)
    wide = [np.asarray(x, np.float64) for x in (hidden, head)]
    total, _ = oracle(wide[0] @ wide[1].T, targets, weights)
    np.testing.assert_allclose(loss.total, total, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 64], ids=["chunked", "plain"])
def test_products_are_taken_in_the_hidden_states_type(chunk):
    """Two rows of the head that are one and the same in bfloat16."""
    head = jnp.array([[1.0], [1.0 + 2**-10]])
    hidden = jnp.full((1, 1), 16.0, jnp.bfloat16)
    loss = train.linear_cross_entropy(hidden, head, jnp.zeros(1, int), jnp.ones(1), chunk=chunk)
    np.testing.assert_allclose(loss.total, np.log(2), rtol=1e-4)


@pytest.mark.parametrize("level", [-500.0, 500.0])
def test_only_differences_between_logits_matter_to_the_chunked_form(level):
    hidden, head = jnp.full((1, 1), level), jnp.ones((9, 1))
    loss = train.linear_cross_entropy(hidden, head, jnp.zeros(1, int), jnp.ones(1), chunk=4)
    np.testing.assert_allclose(loss.total, np.log(9), rtol=1e-4)


def test_targets_that_are_not_the_leading_axes_are_named():
    with pytest.raises(ValueError, match=r"targets \(2, 4\).*leading axes, \(2, 3\)"):
        train.cross_entropy(jnp.zeros((2, 3, 7)), jnp.zeros((2, 4), int), jnp.ones((2, 4)))


def test_the_next_token_loss_hands_positions_and_segments_on_and_counts_tokens():
    _, head, targets, weights = example(tokens=(2, 6))
    table = jax.random.normal(jax.random.key(9), (29, 8))
    batch = {
        "tokens": targets,
        "targets": (targets + 1) % 29,
        "weights": weights.at[1].multiply(-1.0),
        "positions": jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]),
        "segment_ids": jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]),
    }

    def features(params, tokens, positions=None, segment_ids=None):
        positions = jnp.zeros_like(tokens) if positions is None else positions
        segment_ids = jnp.zeros_like(tokens) if segment_ids is None else segment_ids
        return params["table"][tokens] * (1 + positions + 10 * segment_ids)[..., None]

    def check(batch):
        params = {"table": table, "head": head}
        loss, metrics = train.next_token_loss(features, lambda p: p["head"])(params, batch, None)
        packing = (batch.get("positions"), batch.get("segment_ids"))
        logits = features(params, batch["tokens"], *packing) @ head.T
        expected = train.cross_entropy(logits, batch["targets"], batch["weights"])
        np.testing.assert_allclose(loss.total, expected.total, rtol=1e-5)
        assert metrics["supervised_tokens"] == np.count_nonzero(batch["weights"])
        return metrics["tokens"]

    assert check(batch) == 11
    plain = {name: batch[name] for name in ("tokens", "targets", "weights")}
    assert check(plain) == 12
