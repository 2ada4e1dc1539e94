import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crucible import models

MODEL = models.decoder(models.DecoderConfig(vocab_size=31, width=16, heads=4, mlp_width=24))
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
CONFIG = models.LoraConfig(rank=3, alpha=6.0, targets=("query", "down"))


@pytest.fixture(scope="module")
def base():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def adapter(base):
    fresh = models.init_lora(CONFIG, base, jax.random.key(2))
    keys = iter(jax.random.split(jax.random.key(3), 9))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) * 0.1, fresh)


def test_a_fresh_adapter_changes_nothing(base):
    fresh = models.init_lora(CONFIG, base, jax.random.key(2))
    joined = models.attach(base, fresh, CONFIG)
    np.testing.assert_array_equal(MODEL.apply(joined, TOKENS), MODEL.apply(base, TOKENS))


def test_only_the_targets_have_an_adapter_of_the_rank(base):
    fresh = models.init_lora(CONFIG, base, jax.random.key(2))
    shapes = jax.tree.map(jnp.shape, fresh, is_leaf=lambda x: hasattr(x, "shape"))
    assert shapes == {
        "layers": {
            "query": {"a": (2, 16, 3), "b": (2, 3, 16)},
            "down": {"a": (2, 24, 3), "b": (2, 3, 16)},
        }
    }


def test_an_attached_adapter_equals_merged_weights(base, adapter):
    attached = MODEL.apply(models.attach(base, adapter, CONFIG), TOKENS)
    merged = models.merge_lora(base, adapter, CONFIG)
    np.testing.assert_allclose(attached, MODEL.apply(merged, TOKENS), atol=1e-5)
    by_hand = base["layers"]["query"][1] + 2.0 * (
        adapter["layers"]["query"]["a"][1] @ adapter["layers"]["query"]["b"][1]
    )
    np.testing.assert_allclose(merged["layers"]["query"][1], by_hand, atol=1e-6)
    assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_the_gradient_reaches_the_adapter_as_if_weights_were_merged(base, adapter):
    def loss(join):
        return lambda a: jnp.square(MODEL.apply(join(base, a, CONFIG), TOKENS)).sum()

    attached = jax.grad(loss(models.attach))(adapter)
    merged = jax.grad(loss(models.merge_lora))(adapter)
    chex.assert_trees_all_close(attached, merged, rtol=1e-3, atol=1e-5)


def test_attaching_leaves_the_base_as_it_was(base, adapter):
    before = dict(base["layers"])
    models.attach(base, adapter, CONFIG)
    assert all(base["layers"][name] is before[name] for name in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"targets": ("q",)}, "'q' is none of them"),
        ({"targets": ()}, "()"),
    ],
)
def test_impossible_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.LoraConfig(**options)


def test_a_fresh_adapter_is_random_of_its_fan_in_and_other_for_each_projection(base):
    config = models.LoraConfig(rank=64)
    layers = models.init_lora(config, base, jax.random.key(2))["layers"]
    for name, fan_in in (("query", 16), ("key", 16), ("down", 24)):
        np.testing.assert_allclose(layers[name]["a"].std(), fan_in**-0.5, rtol=0.1)
        assert not layers[name]["b"].any()
    signs = [np.sign(pair["a"][i]).tobytes() for pair in layers.values() for i in range(2)]
    assert len(set(signs)) == 2 * 7


def test_a_fresh_adapter_can_learn(base):
    fresh = models.init_lora(CONFIG, base, jax.random.key(2))
    loss = lambda a: jnp.square(MODEL.apply(models.attach(base, a, CONFIG), TOKENS)).sum()  # noqa: E731
    gradient = jax.grad(loss)(fresh)
    for pair in gradient["layers"].values():
        assert jnp.abs(pair["b"]).max() > 0


def test_the_first_values_of_a_projection_do_not_depend_on_the_other_targets(base):
    key = jax.random.key(2)
    both = models.init_lora(models.LoraConfig(targets=("query", "down")), base, key)
    alone = models.init_lora(models.LoraConfig(targets=("down",)), base, key)
    chex.assert_trees_all_equal(both["layers"]["down"], alone["layers"]["down"])


def test_merged_weights_and_projections_keep_their_types(base, adapter):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merged = models.merge_lora(half, adapter, CONFIG)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, half)
    x = jnp.ones((3, 16), jnp.bfloat16)
    wide = jax.tree.map(lambda w: w[0], models.attach(base, adapter, CONFIG)["layers"]["query"])
    assert models.lora.project(x, wide).dtype == jnp.bfloat16
    assert models.lora.project(x, wide.base).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        models.lora.project(x, wide).astype(jnp.float32),
        models.lora.project(x.astype(jnp.float32), wide),
        atol=0.05,
    )


def test_an_adapter_of_rank_zero_is_none(base):
    with pytest.raises(ValueError, match="rank=0 is no adapter"):
        models.init_lora(models.LoraConfig(rank=0), base, jax.random.key(0))
