import json
import os
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crucible import train
from tests.conftest import REPOSITORY


@pytest.fixture
def state():
    steps = train.make_steps(lambda *_: None, optax.adamw(0.1))
    params = {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.array([1.5], jnp.bfloat16)}
    return steps.init(params, 7)


def same(a, b):
    def equal(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return x.dtype == y.dtype and np.array_equal(x, y)

    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jax.tree.leaves(jax.tree.map(equal, a, b))
    )


def test_what_is_restored_is_what_was_saved(tmp_path, state):
    saved = train.save(tmp_path, 3, state, {"config": {"seed": 1}})
    target = jax.tree.map(jnp.zeros_like, state.replace(key=jax.random.key(0)))
    restored, checkpoint = train.restore(tmp_path, target)
    assert same(restored, state)
    assert checkpoint == saved
    assert (checkpoint.step, checkpoint.metadata) == (3, {"config": {"seed": 1}})


def test_an_abstract_target_is_enough(tmp_path, state):
    train.save(tmp_path, 0, state)
    assert same(train.restore(tmp_path, jax.eval_shape(lambda: state))[0], state)


def test_the_latest_is_by_step_and_any_step_can_be_asked_for(tmp_path, state):
    for step in (5, 20, 100):
        train.save(tmp_path, step, state.replace(step=jnp.asarray(step, jnp.int32)))
    assert [c.step for c in train.list_checkpoints(tmp_path)] == [5, 20, 100]
    assert train.latest(tmp_path).step == 100
    assert int(train.restore(tmp_path, state)[0].step) == 100
    assert int(train.restore(tmp_path, state, step=20)[0].step) == 20
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of step 7 \(steps saved: 5, 20, 100"
    ):
        train.restore(tmp_path, state, step=7)


def test_a_run_without_checkpoints_has_no_latest(tmp_path, state):
    assert train.latest(tmp_path) is None
    assert train.list_checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train.restore(tmp_path, state)


def test_every_difference_is_listed_by_path_and_nothing_is_cast(tmp_path, state):
    train.save(tmp_path, 1, state.params)
    wrong = {"w": jnp.zeros((2, 3), jnp.bfloat16), "extra": jnp.zeros(1)}
    with pytest.raises(ValueError, match="does not fit") as caught:
        train.restore(tmp_path, wrong)
    text = str(caught.value)
    assert "['w']: float32[2, 3] in the checkpoint, the state has bfloat16[2, 3]" in text
    assert "['extra']: not in the checkpoint" in text
    assert "['half']: bfloat16[1] in the checkpoint, not in the state" in text


def test_another_shape_of_the_same_size_is_refused(tmp_path):
    train.save(tmp_path, 1, {"w": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"float32\[2, 3\].*float32\[3, 2\]"):
        train.restore(tmp_path, {"w": jnp.zeros((3, 2))})


def test_the_index_has_a_line_per_checkpoint(tmp_path, state):
    for step in (1, 2):
        train.save(tmp_path, step, state, {"note": step})
    lines = [json.loads(x) for x in (tmp_path / "checkpoints.jsonl").read_text().splitlines()]
    assert [(x["step"], x["path"], x["metadata"]) for x in lines] == [
        (1, "checkpoints/00000001", {"note": 1}),
        (2, "checkpoints/00000002", {"note": 2}),
    ]


def test_what_is_not_a_whole_checkpoint_is_not_listed(tmp_path, state):
    train.save(tmp_path, 1, state)
    directory = tmp_path / "checkpoints"
    (directory / "12").mkdir()
    (directory / "00000013").mkdir()
    (directory / "00000013" / "checkpoint.json").write_text('{"step": 13')
    (directory / ".tmp-14-abc").mkdir()
    (directory / "stray").write_text("")
    assert [c.step for c in train.list_checkpoints(tmp_path)] == [1]


def test_a_saved_step_is_never_written_over(tmp_path, state):
    train.save(tmp_path, 1, state)
    with pytest.raises(FileExistsError, match="step 1 of this run is already saved"):
        train.save(tmp_path, 1, state.replace(step=state.step + 1))
    assert same(train.restore(tmp_path, state)[0], state)


@pytest.mark.parametrize("broken", ["sync", "payload"])
def test_a_failed_save_leaves_nothing_behind(tmp_path, state, monkeypatch, broken):
    train.save(tmp_path, 1, state)

    def fail(*_):
        raise OSError("No space left on device")

    if broken == "sync":
        monkeypatch.setattr("crucible.train.checkpoints._sync_tree", fail)
    else:
        monkeypatch.setattr("orbax.checkpoint.v1.save", fail)
    with pytest.raises(OSError, match="No space left"):
        train.save(tmp_path, 2, state)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    assert len((tmp_path / "checkpoints.jsonl").read_text().splitlines()) == 1


def test_everything_reaches_the_disk_before_the_name_does(tmp_path, state, monkeypatch):
    events = []
    sync, rename = os.fsync, os.rename

    def watch_sync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def watch_rename(source, target):
        events.append(f"-> {target}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr("pathlib.os.rename", watch_rename)
    final = train.save(tmp_path, 2, state).path
    at = events.index(f"-> {final}")
    temporary = next(e for e in events if e.endswith("checkpoint.json")).rsplit("/", 1)[0]
    written = [temporary, *(f"{temporary}/{p.relative_to(final)}" for p in final.rglob("*"))]
    assert set(written) <= set(events[:at])
    assert str(final.parent) in events[at:]
    assert str(tmp_path / "checkpoints.jsonl") in events[at:]


@pytest.mark.parametrize("step", [-1, 1.0, "2"])
def test_impossible_steps_are_refused(tmp_path, state, step):
    with pytest.raises((ValueError, TypeError)):
        train.save(tmp_path, step, state)
    assert not (tmp_path / "checkpoints").exists()


def test_metadata_must_be_json_and_nothing_is_written_if_it_is_not(tmp_path, state):
    for metadata in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            train.save(tmp_path, 1, state, metadata)
    assert not (tmp_path / "checkpoints").exists()


def test_ctrl_c_during_a_save_is_heeded_afterwards(tmp_path, state, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    original = ocp.save

    def interrupted(path, tree):
        signal.raise_signal(signal.SIGINT)
        original(path, tree)

    monkeypatch.setattr("orbax.checkpoint.v1.save", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.save(tmp_path, 1, state)
    assert signal.getsignal(signal.SIGINT) is before
    assert same(train.restore(tmp_path, state)[0], state)


def test_saving_works_in_a_thread(tmp_path, state):
    thread = threading.Thread(target=train.save, args=(tmp_path, 1, state))
    thread.start()
    thread.join()
    assert train.latest(tmp_path).step == 1


KILLED = """
import sys, jax.numpy as jnp
from crucible import train
step = 0
while True:
    train.save(sys.argv[1], step, {"w": jnp.full((256, 1024), float(step))})
    print(step, flush=True)
    step += 1
"""


def test_a_kill_while_saving_loses_no_acknowledged_checkpoint(tmp_path):
    for attempt, seconds in enumerate((0.05, 0.11, 0.17)):
        run = tmp_path / str(attempt)
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(run)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        child.stdout.readline()
        threading.Event().wait(seconds)
        child.kill()
        acknowledged = [0, *(int(line) for line in child.communicate()[0].split())]
        target = {"w": jnp.zeros((256, 1024))}
        for checkpoint in train.list_checkpoints(run):
            restored, _ = train.restore(run, target, step=checkpoint.step)
            assert (np.asarray(restored["w"]) == checkpoint.step).all()
        assert train.latest(run).step >= acknowledged[-1]


def test_a_second_ctrl_c_during_a_save_is_heeded_at_once(tmp_path, state, monkeypatch):
    reached = []

    def interrupted_twice(path, tree):
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")

    monkeypatch.setattr("orbax.checkpoint.v1.save", interrupted_twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.save(tmp_path, 1, state)
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is before
    assert train.list_checkpoints(tmp_path) == []
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_whole_checkpoint_that_was_never_renamed_does_not_exist(tmp_path, state):
    """What a kill just before the rename leaves behind."""
    final = train.save(tmp_path, 14, state).path
    final.rename(final.with_name(".tmp-14-abc"))
    assert train.list_checkpoints(tmp_path) == []
    again = train.save(tmp_path, 14, state)
    assert train.list_checkpoints(tmp_path) == [again]


@pytest.mark.parametrize("text", ["{}", "[]", '"words"', "null", '{"step": 13, "metadata": {}}'])
def test_a_manifest_that_says_something_else_is_no_checkpoint(tmp_path, state, text):
    train.save(tmp_path, 1, state)
    other = tmp_path / "checkpoints" / "00000013"
    other.mkdir()
    (other / "checkpoint.json").write_text(text)
    assert [c.step for c in train.list_checkpoints(tmp_path)] == [1]


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """Two leaves of one name, which a checkpoint could not tell apart."""

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey("w"), jnp.zeros(1))] * 2, None

    @classmethod
    def tree_unflatten(cls, static, leaves):
        return cls()


def test_two_leaves_of_one_name_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"Two leaves of the state are called \['w'\]"):
        train.save(tmp_path, 1, Twins())
    assert not (tmp_path / "checkpoints").exists()


def test_what_a_killed_save_left_is_not_in_the_way_of_the_next(tmp_path, state, monkeypatch):
    places = []

    def killed(path, tree):
        places.append(path)
        raise OSError("cut")

    monkeypatch.setattr("orbax.checkpoint.v1.save", killed)
    for _ in range(2):
        with pytest.raises(OSError, match="cut"):
            train.save(tmp_path, 1, state)
    assert len(set(places)) == 2
