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
        ({"rank": 0}, "rank=0"),
        ({"targets": ("q",)}, "'q' is none of them"),
        ({"targets": ()}, "()"),
    ],
)
def test_impossible_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.LoraConfig(**options)
