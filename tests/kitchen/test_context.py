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


def test_text_dates_and_objects_in_numpy_arrays_are_not_traced():
    """JAX cannot hold them."""
    text = np.array(["a", "b"])
    context = Context(text=text, one=np.str_("a"), rows=np.array([None, object()]), nested=[text])
    assert not context.slots
    assert Context(day=np.datetime64("2020-01-01")).resources
    assert Context(half=np.zeros(2, jnp.bfloat16), mask=np.zeros(2, bool)).slots.keys() == {
        "half",
        "mask",
    }
    assert jax.jit(lambda context: context.replace(y=1))(context)["text"] is text


def test_a_name_that_changes_its_kind_is_in_it_once():
    context = Context(x="text", y=1).replace(x=2, y="text")
    assert (dict(context), len(context)) == ({"x": 2, "y": "text"}, 2)
    assert (set(context.slots), set(context.resources)) == ({"x"}, {"y"})
    assert (set(context.replace(x=3).resources), context["x"]) == ({"y"}, 2)
    assert not context.replace(y=np.zeros(2)).resources


def test_names_can_be_left_out():
    context = Context(x=1, name="run", y=2)
    assert dict(context.without("x", "name", "nobody")) == {"y": 2}
    assert dict(context) == {"x": 1, "name": "run", "y": 2}


def test_two_contexts_have_the_same_value_if_it_is_the_very_same():
    context = Context(x=np.zeros(2), name=object())
    other = context.replace(y=1)
    assert context.same("x", other)
    assert context.same("name", other)
    assert context.same("nobody", other)
    assert not context.same("y", other)
    assert not context.same("x", other.replace(x=np.zeros(2)))
    assert not context.same("name", other.replace(name=object()))
    assert not context.same("x", other.replace(x="text"))


def test_what_a_program_gave_replaces_both_kinds_and_drops_names():
    before = Context(x=1, kept=2, name="run", gone="text", gone_too=3)
    after = before.became({"x": 10, "name": 20, "new": 30}, ("gone", "gone_too"), {"new"})
    assert dict(after) == {"x": 10, "kept": 2, "name": 20, "new": 30}
    assert not after.resources
    assert [after.cells[name].fresh for name in ("x", "name", "new", "kept")] == [
        *(True, True, False, False)
    ]
    assert dict(before)["gone_too"] == 3
    assert before.became({"x": 0}, (), ()).resources is before.resources


def test_a_consumed_slot_says_who_took_it_wherever_it_is_read():
    older = Context(state=jnp.zeros(2), x=1)
    newer = older.replace(y=2)
    newer.cells["state"].consume("train_step", 7)
    for context in (older, newer):
        with pytest.raises(RuntimeError, match=r"stage 'train_step' reused its memory at step 7"):
            context["state"]
        assert "state" in context
        assert "state: consumed" in repr(context)
        assert context["x"] == 1
    assert older.replace(state=5)["state"] == 5
    unnumbered = Context(a=1)
    unnumbered.cells["a"].consume("f", None)
    with pytest.raises(RuntimeError, match=r"reused its memory\. Read it from"):
        unnumbered["a"]
