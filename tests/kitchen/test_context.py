import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crucible.kitchen import Context


def test_replacing_makes_a_new_context_and_leaves_the_old_one():
    old = Context(state={"w": jnp.zeros(2)})
    new = old.replace(state={"w": jnp.ones(2)}, step=3)
    assert float(old["state"]["w"][0]) == 0
    assert "step" not in old
    assert (float(new["state"]["w"][0]), new["step"]) == (1, 3)


def test_arrays_are_leaves_and_host_objects_are_static():
    tokenizer = object()
    context = Context(state=jnp.zeros(2), step=1, frozen=None, tokenizer=tokenizer, name="run")
    assert set(context.slots) == {"state", "step", "frozen"}
    assert set(context.resources) == {"tokenizer", "name"}
    assert len(jax.tree.leaves(context)) == 2


def test_a_name_that_changes_its_kind_moves():
    context = Context(params=jnp.zeros(2)).replace(params="gone")
    assert context["params"] == "gone"
    assert not context.slots


def test_a_context_crosses_jit_and_keeps_its_resources():
    tokenizer = object()
    context = Context(x=jnp.arange(3.0), tokenizer=tokenizer)
    traces = []

    @jax.jit
    def double(context):
        traces.append(context)
        return context.replace(x=context["x"] * 2)

    twice = double(double(context))
    assert twice["x"].tolist() == [0.0, 4.0, 8.0]
    assert twice["tokenizer"] is tokenizer
    assert len(traces) == 1


def test_a_context_is_immutable():
    with pytest.raises(AttributeError, match=r"use context.replace\(slots=...\)"):
        Context().slots = {}  # type: ignore[misc]


def test_a_misspelt_name_is_answered():
    with pytest.raises(KeyError, match=r"no 'stat'\. Did you mean 'state'"):
        Context(state=1)["stat"]


def test_it_prints_what_it_holds():
    context = Context(state={"a": jnp.zeros(2), "b": jnp.zeros(3)}, x=jnp.zeros((2, 3)), name="n")
    assert repr(context) == "Context(state: 2 arrays, x: (2, 3), name: str)"


def test_an_iterator_is_a_resource_and_a_numpy_scalar_or_a_shape_is_a_slot():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    context = Context(batches=iter([1, 2]), mixed=(1, "a"), rate=np.float32(0.5), shape=shape)
    assert set(context.resources) == {"batches", "mixed"}
    assert set(context.slots) == {"rate", "shape"}


def test_it_is_a_mapping_of_slots_and_resources():
    context = Context(x=1, name="run")
    assert dict(context) == {"x": 1, "name": "run"}
    assert len(context) == 2


def test_contexts_of_other_resources_are_traced_anew_and_of_another_order_are_not():
    traces = []

    @jax.jit
    def see(context):
        traces.append(sorted(context))
        return context["x"]

    a, b = object(), object()
    see(Context(x=jnp.ones(2), y=jnp.ones(3), first=a, second=b))
    see(Context(y=jnp.ones(3), x=jnp.ones(2), second=b, first=a))
    assert len(traces) == 1
    see(Context(x=jnp.ones(2), y=jnp.ones(3), first=b, second=a))
    assert len(traces) == 2


def test_a_leaf_is_found_under_its_name():
    paths = jax.tree_util.tree_leaves_with_path(Context(state={"w": 1.0}, name="run"))
    assert [jax.tree_util.keystr(path) for path, _ in paths] == ["['state']['w']"]
