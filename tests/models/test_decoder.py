import dataclasses
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crucible import models

CONFIG = models.DecoderConfig(
    vocab_size=31, width=16, layers=3, heads=4, kv_heads=2, mlp_width=24, norm_epsilon=1e-6
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 31)


@pytest.fixture(scope="module")
def params():
    return models.decoder(CONFIG).init(jax.random.key(0))


def numpy_decoder(config, params, tokens):
    """The architecture once more, for one row, in float64 and with plain loops over heads."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    time, size = len(tokens), config.head_size

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def rotate(x):
        angles = np.arange(time)[:, None] * config.rope_theta ** (-np.arange(0, size, 2) / size)
        a, b = x[:, : size // 2], x[:, size // 2 :]
        return np.concatenate(
            [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], 1
        )

    x = p["embed"][tokens]
    for i in range(config.layers):
        layer = jax.tree.map(lambda w, i=i: w[i], p["layers"])
        h = norm(x, layer["attention_norm"])
        heads = []
        for head in range(config.heads):
            group = head // (config.heads // config.kv_heads)
            q = rotate((h @ layer["query"])[:, head * size : (head + 1) * size])
            k = rotate((h @ layer["key"])[:, group * size : (group + 1) * size])
            v = (h @ layer["value"])[:, group * size : (group + 1) * size]
            scores = q @ k.T / np.sqrt(size) + np.triu(np.full((time, time), -np.inf), 1)
            e = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(e / e.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, 1) @ layer["output"]
        h = norm(x, layer["mlp_norm"])
        gate = h @ layer["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
    return norm(x, p["final_norm"]) @ p["embed"].T


def perturbed(params):
    """Norm weights away from one, so that leaving one out is seen."""
    keys = iter(jax.random.split(jax.random.key(5), 100))
    return jax.tree.map(lambda x: x * jax.random.uniform(next(keys), x.shape, minval=0.5), params)


def test_the_logits_equal_an_independent_implementation(params):
    params = perturbed(params)
    logits = models.decoder(CONFIG).apply(params, TOKENS)
    for row in range(2):
        expected = numpy_decoder(CONFIG, params, np.asarray(TOKENS[row]))
        np.testing.assert_allclose(logits[row], expected, atol=2e-6)


def test_a_token_sees_itself_and_the_past_only(params):
    model = models.decoder(CONFIG)
    a = model.apply(params, TOKENS)
    b = model.apply(params, TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 31))
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (jnp.abs(a - b).max(axis=(0, 2))[7:] > 1e-6).all()


def test_packed_examples_do_not_see_each_other(params):
    model = models.decoder(CONFIG)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    row = TOKENS[:1]
    packed = model.apply(params, row, positions, segments)
    other = model.apply(params, row.at[0, 2].set((row[0, 2] + 1) % 31), positions, segments)
    np.testing.assert_array_equal(packed[:, 5:], other[:, 5:])
    for start, stop in ((0, 5), (5, 9)):
        alone = model.apply(params, row[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-6)
    chex.assert_tree_all_finite(packed)


def test_remat_and_scanning_change_no_value_and_no_gradient(params):
    def run(config):
        loss = lambda p: jnp.square(models.decoder(config).apply(p, TOKENS)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    plain = run(CONFIG)
    chex.assert_trees_all_close(plain, run(dataclasses.replace(CONFIG, remat=True)), rtol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["crucible.models.decoder"], "UNROLLED_LAYERS", 0)
        chex.assert_trees_all_close(plain, run(CONFIG), rtol=1e-4)


def test_remat_recomputes(params):
    """Fewer residuals are kept between the passes."""
    deep = dataclasses.replace(CONFIG, layers=12)

    def residual_bytes(config):
        model = models.decoder(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        f = jax.jit(jax.grad(lambda p, t: model.apply(p, t).sum()))
        tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
        return f.lower(shapes, tokens).compile().memory_analysis().temp_size_in_bytes

    kept = residual_bytes(deep)
    assert residual_bytes(dataclasses.replace(deep, remat=True)) < kept / 2


def test_the_program_does_not_grow_with_depth():
    def program_size(layers):
        model = models.decoder(dataclasses.replace(CONFIG, layers=layers))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return len(
            jax.jit(jax.grad(lambda p: model.apply(p, TOKENS).sum())).lower(shapes).as_text()
        )

    assert program_size(64) < 1.05 * program_size(8)


def test_an_untied_head_is_a_parameter_of_its_own():
    model = models.decoder(dataclasses.replace(CONFIG, tied_head=False))
    params = model.init(jax.random.key(0))
    gradient = jax.grad(lambda p: model.apply(p, TOKENS).sum())(params)
    assert jnp.abs(gradient["head"]).max() > 0
    assert model.head(params) is params["head"]


def test_features_times_head_are_the_logits(params):
    model = models.decoder(CONFIG)
    by_hand = model.features(params, TOKENS) @ model.head(params).T
    np.testing.assert_allclose(by_hand, model.apply(params, TOKENS), atol=1e-6)


def test_bfloat16_blocks_come_close_and_return_float32_logits(params):
    model = models.decoder(dataclasses.replace(CONFIG, dtype="bfloat16"))
    logits = model.apply(params, TOKENS)
    exact = models.decoder(CONFIG).apply(params, TOKENS)
    assert logits.dtype == jnp.float32
    assert 1e-6 < jnp.abs(logits - exact).max() < 0.05


def test_low_frequencies_are_slowed_and_high_ones_kept():
    from crucible.models.decoder import _frequencies

    scaling = models.RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=64
    )
    config = dataclasses.replace(CONFIG, head_dim=32, rope_theta=500_000.0)
    plain = _frequencies(config)
    scaled = _frequencies(dataclasses.replace(config, rope_scaling=scaling))
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[0], 1.0)
    np.testing.assert_allclose(ratio[-1], 8.0, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-6).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"width": 18}, "heads=4 does not divide width=18"),
        ({"head_dim": 3}, "must be even"),
        ({"layers": 0}, "layers=0"),
        ({"dtype": "float16"}, "'float32' or 'bfloat16'"),
    ],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def test_first_weights_have_the_deviation_of_their_fan_in_and_the_residual_ones_less():
    config = models.DecoderConfig(
        vocab_size=300, width=64, layers=4, heads=4, kv_heads=2, mlp_width=192, tied_head=False
    )
    params = models.decoder(config).init(jax.random.key(0))
    expected = dict.fromkeys(("query", "key", "value", "gate", "up"), 64**-0.5)
    expected |= {"output": 64**-0.5 / 8**0.5, "down": 192**-0.5 / 8**0.5}
    for name, deviation in expected.items():
        np.testing.assert_allclose(params["layers"][name].std((1, 2)), deviation, rtol=0.06)
    for name in ("embed", "head"):
        np.testing.assert_allclose(params[name].std(), 0.02, rtol=0.03)


def test_no_two_first_weights_are_the_same_numbers():
    config = dataclasses.replace(CONFIG, tied_head=False, mlp_width=16, kv_heads=4)
    params = models.decoder(config).init(jax.random.key(0))
    heads = [np.asarray(params[name])[:16] for name in ("embed", "head")]
    layers = [np.asarray(w)[i] for w in params["layers"].values() if w.ndim == 3 for i in range(3)]
    signs = [np.sign(w).tobytes() for w in (*heads, *layers)]
    assert len(set(signs)) == 2 + 7 * 3


def test_scaled_frequencies_are_those_of_llama_3():
    """Wavelength by wavelength, as the reference implementation has it."""
    from crucible.models.decoder import _frequencies

    scaling = models.RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=1024
    )
    config = dataclasses.replace(CONFIG, head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    kinds = []
    for i, scaled in enumerate(_frequencies(config)):
        frequency = 500_000.0 ** (-2 * i / 64)
        wavelength = 2 * np.pi / frequency
        if wavelength < 1024 / 4:
            kind, expected = "kept", frequency
        elif wavelength > 1024 / 1:
            kind, expected = "slowed", frequency / 8
        else:
            smooth = (1024 / wavelength - 1) / (4 - 1)
            kind, expected = "between", (1 - smooth) * frequency / 8 + smooth * frequency
        np.testing.assert_allclose(scaled, expected, rtol=1e-5)
        kinds.append(kind)
    assert set(kinds) == {"kept", "between", "slowed"}


def test_norms_angles_and_logits_are_of_float32_in_a_bfloat16_model(params):
    from crucible.models.decoder import _rms_norm, _rotary

    x = jax.random.normal(jax.random.key(2), (32, 64)).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True))
    normed = np.asarray(_rms_norm(x, jnp.ones(64), 0.0), np.float64)
    np.testing.assert_allclose(normed, exact, rtol=2**-8)  # rounded once, at the end

    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    late = jnp.array([[1000, 1001]])  # one and the same in bfloat16
    chex.assert_trees_all_equal(_rotary(half, late), _rotary(CONFIG, late))

    model = models.decoder(half)
    features, head = (
        np.asarray(a.astype(jnp.bfloat16), np.float64)
        for a in (model.features(params, TOKENS), model.head(params))
    )
    np.testing.assert_allclose(model.apply(params, TOKENS), features @ head.T, atol=1e-6)
