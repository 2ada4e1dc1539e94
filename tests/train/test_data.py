import itertools
import json
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from crucible.train.data import bundled_conversations, from_examples, load, prefetch
from crucible.train.renderers import Rendered, chatml

NAMES = ("tokens", "targets", "weights", "positions", "segment_ids")


class Bytes:
    vocab_size = 258

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()

    def token_id(self, special):
        return 256 + ["<|im_start|>", "<|im_end|>"].index(special)


RENDERER = chatml(Bytes())


def numbered(count, length=4):
    """Examples that share no token with each other, all supervised."""
    tokens = np.arange(count * (length + 1)).reshape(count, length + 1)
    return [Rendered(row.astype(np.int32), np.ones(length + 1, np.float32)) for row in tokens]


def make(examples, *, row_length=4, batch_size=2, seed=0, vocab_size=10_000, **rest):
    rest |= {"row_length": row_length, "batch_size": batch_size}
    return from_examples(examples, seed=seed, vocab_size=vocab_size, **rest)


@pytest.fixture(scope="module")
def bundled():
    return load(
        bundled_conversations(),
        RENDERER,
        row_length=512,
        batch_size=8,
        seed=3,
        vocab_size=258,
        eval_fraction=0.05,
    )


def firsts(data, steps):
    """The first token of every row of these steps' batches."""
    return [int(t) for step in steps for t in data.batch_at(step)["tokens"][:, 0]]


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


# Values


def test_a_token_is_the_target_of_the_one_before_and_brings_its_weight():
    data = make([([1, 2, 3, 4], [0, 0, 1, 1])], row_length=3, batch_size=1)
    assert {name: rows.tolist() for name, rows in data.batch_at(0).items()} == {
        "tokens": [[1, 2, 3]],
        "targets": [[2, 3, 4]],
        "weights": [[0, 1, 1]],
        "positions": [[0, 1, 2]],
        "segment_ids": [[1, 1, 1]],
    }
    assert data.stats.num_truncated == 0


def test_what_is_too_long_is_cut_at_its_end_and_counted():
    data = make([([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 6], [0, 1])], row_length=2, batch_size=2)
    rows = {tuple(row) for row in data.batch_at(0)["tokens"].tolist()}
    assert rows == {(1, 2), (5, 0)}
    assert (data.stats.num_truncated, data.stats.num_cut_tokens) == (1, 1)
    assert data.stats.num_examples == data.stats.num_rows == 2
    assert str(data.stats) == (
        "2 examples in 2 rows of 2: 3 tokens (75.0% full), 2 supervised; "
        "1 truncated (-1 tokens), 0 unsupervised"
    )


def test_an_example_whose_answer_is_cut_off_stays_and_is_counted():
    data = make([([1, 2, 3, 4], [0, 0, 0, 1]), ([5, 6], [0, 1])], row_length=2, batch_size=2)
    assert data.stats.num_unsupervised == 1
    assert data.stats.num_examples == 2
    assert data.batch_at(0)["weights"].sum() == data.stats.num_supervised_tokens == 1


def test_batches_have_the_shapes_and_types_of_a_step(bundled):
    for batch in (bundled.batch_at(5), *bundled.eval_batches):
        assert tuple(batch) == NAMES
        assert {rows.shape for rows in batch.values()} == {(8, 512)}
        types = [np.int32, np.int32, np.float32, np.int32, np.int32]
        assert [rows.dtype for rows in batch.values()] == types


def test_targets_follow_tokens_within_every_segment_of_real_data(bundled):
    batch = bundled.batch_at(0)
    segments = batch["segment_ids"]
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    np.testing.assert_array_equal(batch["tokens"][:, 1:][inside], batch["targets"][:, :-1][inside])
    steps = np.diff(batch["positions"], axis=1)
    assert (steps[inside] == 1).all()
    begins = (segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] > 0)
    assert (batch["positions"][:, 1:][begins] == 0).all()
    assert (batch["tokens"][:, 1:][begins] == 256).all()  # <|im_start|>
    padding = segments == 0
    assert not any(rows[padding].any() for rows in batch.values())


def test_the_bundled_conversations_fill_their_rows_and_lose_nothing(bundled):
    assert bundled.stats.efficiency >= 0.98
    for stats in (bundled.stats, bundled.eval_stats):
        assert (stats.num_truncated, stats.num_cut_tokens, stats.num_unsupervised) == (0, 0, 0)


def test_the_statistics_are_those_of_the_batches():
    examples = [([7] * (n + 1), [0, *[1] * n]) for n in (1, 5, 3, 2, 2, 4)]
    data = make(examples, row_length=6, batch_size=1)
    epoch = [data.batch_at(step) for step in range(data.stats.num_rows)]
    assert sum((b["segment_ids"] > 0).sum() for b in epoch) == data.stats.num_tokens == 17
    assert sum(b["weights"].sum() for b in epoch) == data.stats.num_supervised_tokens == 17
    assert data.stats.efficiency == 17 / 18


def test_without_packing_each_example_has_a_row():
    data = make([([1, 2], [0, 1]), ([3, 4], [0, 1])], row_length=4, batch_size=2, pack=False)
    rows = sorted(data.batch_at(0)["tokens"].tolist())
    assert rows == [[1, 0, 0, 0], [3, 0, 0, 0]]
    assert data.stats.efficiency == 0.25


# Laws of batch_at


def test_a_batch_depends_on_the_step_alone_and_not_on_what_was_asked_before():
    data, again = make(numbered(7)), make(numbered(7))
    forward = [data.batch_at(step) for step in range(20)]
    for step in (19, 3, 3, 11, 0):
        assert same(again.batch_at(step), forward[step])


def test_the_order_is_the_same_on_every_machine():
    data = make(numbered(5, length=4), batch_size=5, seed=7)
    orders = [[token // 5 for token in firsts(data, [epoch])] for epoch in (0, 1, 1000)]
    assert orders == [[3, 4, 0, 2, 1], [1, 3, 2, 4, 0], [3, 0, 4, 2, 1]]


def test_a_batch_is_the_callers_own():
    data = make(numbered(4))
    batch = data.batch_at(0)
    before = {name: rows.copy() for name, rows in batch.items()}
    for rows in batch.values():
        rows[:] = 99
    assert same(data.batch_at(0), before)


def test_a_step_may_be_an_array():
    data = make(numbered(7))
    assert same(data.batch_at(jnp.int32(4)), data.batch_at(4))
    with pytest.raises(TypeError):
        data.batch_at(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step=-1 must be from 0 on"):
        data.batch_at(-1)


@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (8, 4), (1, 1), (5, 5)])
def test_every_epoch_shows_every_row_once_also_where_a_batch_lies_across_two(count, batch_size):
    data = make(numbered(count), batch_size=batch_size)
    seen = firsts(data, range(4 * count))
    expected = [5 * i for i in range(count)]
    for start in range(0, 4 * count, count):
        assert sorted(seen[start : start + count]) == expected


def test_epochs_and_seeds_are_all_in_different_orders():
    # Where epoch e is shuffled with seed + e, the second one is the next seed's first: 5, not 9.
    count, epochs, seeds = 64, 3, 3
    orders = set()
    for seed in range(seeds):
        data = make(numbered(count), batch_size=1, seed=seed)
        seen = firsts(data, range(epochs * count))
        orders |= {tuple(seen[i : i + count]) for i in range(0, epochs * count, count)}
    assert len(orders) == epochs * seeds


def test_a_batch_is_made_in_under_a_millisecond(bundled):
    bundled.batch_at(0)
    times = []
    for step in range(200):
        start = time.perf_counter()
        bundled.batch_at(step)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3  # 0.02 ms measured


def test_an_epoch_is_put_in_order_once(monkeypatch):
    data, argsort, calls = make(numbered(8)), np.argsort, []
    monkeypatch.setattr(np, "argsort", lambda *a, **k: calls.append(a) or argsort(*a, **k))
    firsts(data, range(8))
    assert len(calls) == 2  # two epochs of four batches


# Reading ahead


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def in_time(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def no_thread_is_left():
    return in_time(lambda: not prefetch_threads())


def test_reading_ahead_gives_the_batches_of_the_steps_from_any_start():
    data = make(numbered(7))
    for start in (0, 5):
        batches = list(itertools.islice(data.batches(start), 12))
        assert all(same(batch, data.batch_at(start + i)) for i, batch in enumerate(batches))


def test_steps_are_read_in_another_thread_and_two_at_most_ahead():
    read = []

    def batch_at(step):
        assert threading.current_thread() is not threading.main_thread()
        read.append(step)
        return step

    batches = prefetch(batch_at, 10)
    assert not read
    assert [next(batches) for _ in range(3)] == [10, 11, 12]
    assert in_time(lambda: len(read) >= 5)
    time.sleep(0.02)  # for a sixth, which must not come
    assert read == [10, 11, 12, 13, 14]
    batches.close()


@pytest.mark.parametrize("end", ["close", "forget", "never begun"])
def test_no_thread_is_left_behind(end):
    assert no_thread_is_left()
    batches = make(numbered(7)).batches()
    if end != "never begun":
        next(batches)
        assert prefetch_threads()
    if end == "close":
        batches.close()
    else:
        del batches
    assert no_thread_is_left()


def test_an_error_while_reading_ahead_is_raised_where_its_batch_would_have_come():
    def batch_at(step):
        if step == 2:
            raise OSError("the disk is gone")
        return step

    batches = prefetch(batch_at)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone") as error:
        next(batches)
    assert not hasattr(error.value, "__notes__")
    assert error.traceback[-1].name == "batch_at"
    assert no_thread_is_left()


def test_reading_ahead_begins_at_a_step():
    with pytest.raises(ValueError, match="start=-1"):
        prefetch(lambda step: step, -1)


# Held-out examples


def test_held_out_rows_are_covered_once_and_never_trained_on():
    data = make(numbered(10), batch_size=2, eval_fraction=0.3)
    assert data.eval_stats is not None
    assert (data.stats.num_examples, data.eval_stats.num_examples) == (7, 3)
    assert len(data.eval_batches) == 2
    segments = np.concatenate([batch["segment_ids"] for batch in data.eval_batches])
    tokens = np.concatenate([batch["tokens"] for batch in data.eval_batches])
    assert (segments[:, 0] > 0).tolist() == [True, True, True, False]
    held_out = tokens[:3, 0].tolist()
    trained = firsts(data, range(7))
    assert sorted(held_out + trained[:7]) == [5 * i for i in range(10)]
    filler = {name: rows[1] for name, rows in data.eval_batches[-1].items()}
    assert not any(rows.any() for rows in filler.values())


def test_what_is_held_out_is_numpys_permutation_of_the_seed():
    data = make(numbered(10), batch_size=1, eval_fraction=0.3, seed=42)
    held_out = [int(batch["tokens"][0, 0]) // 5 for batch in data.eval_batches]
    assert held_out == [0, 5, 6]  # PCG64(42) begins 5, 6, 0


def test_a_small_fraction_still_holds_out_one_and_none_holds_out_none():
    for fraction, trained in ((0.001, 9), (0.25, 8), (0.999, 1)):
        data = make(numbered(10), batch_size=1, eval_fraction=fraction)
        assert data.eval_stats is not None
        found = (data.stats.num_examples, data.eval_stats.num_examples)
        assert found == (trained, 10 - trained)
    data = make(numbered(10))
    assert data.eval_batches == ()
    assert data.eval_stats is None


# The fingerprint


def test_the_fingerprint_changes_with_anything_that_changes_the_rows():
    examples = numbered(4)
    weights = examples[1].weights.copy()
    weights[2] = 0
    variants = [
        make(examples),
        make(examples[:3]),
        make(examples[::-1]),
        make([examples[0], Rendered(examples[1].tokens, weights), *examples[2:]]),
        make([Rendered(examples[0].tokens + 1, examples[0].weights), *examples[1:]]),
        make(examples, row_length=5),
        make(examples, pack=False),
        make(examples, eval_fraction=0.25),
    ]
    assert len({data.fingerprint for data in variants}) == len(variants)
    assert make(examples, seed=1, batch_size=1).fingerprint == variants[0].fingerprint
    assert len(variants[0].fingerprint) == 64


def test_the_fingerprint_is_the_same_on_every_machine():
    data = make([([1, 2, 3], [0, 1, 0.5])], batch_size=1)
    assert data.fingerprint == "789ab83ef46d76a8086cfc6b8362800dd35a0393b896ae9ff089c3fa9d61136d"


# Messages


def write(tmp_path, *conversations):
    path = tmp_path / "chats.jsonl"
    lines = [
        json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})
        for messages in conversations
    ]
    path.write_text("\n".join(lines))
    return path


def test_a_file_without_answers_is_refused_with_its_roles(tmp_path):
    path = write(tmp_path, [("system", "A"), ("user", "B"), ("user", "C")], [("user", "D")])
    says = r"tokens in .*chats\.jsonl: its 2 conversations have 1 system, 3 user, 0 assistant"
    with pytest.raises(ValueError, match=says):
        load(path, RENDERER, row_length=8, batch_size=1, seed=0, vocab_size=258)


class Store:
    name = "a store"

    def __init__(self, path):
        self._path = path

    def rows(self):
        return map(json.loads, self._path.read_text().splitlines())


def test_a_store_makes_the_batches_of_a_file_with_the_same_rows(tmp_path):
    chats = [[("user", "Hi"), ("assistant", "Yes?")], [("user", "B"), ("assistant", "No")]]
    path = write(tmp_path, *chats, chats[0])
    settings = {"row_length": 32, "batch_size": 1, "seed": 0, "vocab_size": 258}
    file = load(path, RENDERER, **settings, eval_fraction=0.3)
    store = load(Store(path), RENDERER, **settings, eval_fraction=0.3)
    assert store.fingerprint == file.fingerprint
    assert all(same(store.batch_at(step), file.batch_at(step)) for step in range(6))
    assert same(store.eval_batches[0], file.eval_batches[0])


def test_a_store_without_answers_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"tokens in a store: its 1 conversations have 0 system"):
        load(
            Store(write(tmp_path, [("user", "A")])),
            RENDERER,
            row_length=8,
            batch_size=1,
            seed=0,
            vocab_size=258,
        )


def test_answers_that_are_all_cut_off_name_the_row_length(tmp_path):
    path = write(tmp_path, [("user", "A long question"), ("assistant", "Yes")])
    says = r"4 supervised ones were cut off: 1 examples are longer than row_length=16.*--row-length"
    with pytest.raises(ValueError, match=says):
        load(path, RENDERER, row_length=16, batch_size=1, seed=0, vocab_size=258)


def test_examples_without_a_weight_are_refused():
    with pytest.raises(ValueError, match=r"all 3 targets of the 2 examples to train on have"):
        make([([1, 2, 3], [1, 0, 0]), ([4, 5], [0, 0])], batch_size=1)
    held_out_by_seed_42 = 5
    examples = [([1, 2], [0, float(i != held_out_by_seed_42)]) for i in range(10)]
    with pytest.raises(ValueError, match=r"No supervised tokens: .*1 examples held out"):
        make(examples, eval_fraction=0.1, seed=42)


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Example 1 .* id 50 at position 2, outside \[0, 50\)"):
        make([([1, 2], [0, 1]), ([3, 4, 50], [0, 1, 1])], vocab_size=50)
    with pytest.raises(ValueError, match=r"Example 0 .* token id -100 at position 1"):
        make([([1, -100], [0, 1])])
    path = write(tmp_path, [("user", "A"), ("assistant", "B")])
    with pytest.raises(ValueError, match=r"id 256 at position 0.*Use the tokenizer that belongs"):
        load(path, RENDERER, row_length=8, batch_size=1, seed=0, vocab_size=256)


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"batch_size=4 .* 6 examples make 3 rows .*at most 3"):
        make(numbered(6), row_length=8, batch_size=4)
    make(numbered(6), row_length=8, batch_size=3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"row_length": 1}, "row_length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 2\*\*32\)"),
        ({"seed": 2**32}, "seed=4294967296 must be in"),
        ({"eval_fraction": 1.0}, r"eval_fraction=1.0 must be in \[0, 1\)"),
        ({"eval_fraction": -0.1}, "eval_fraction=-0.1"),
    ],
)
def test_an_argument_out_of_range_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        make(numbered(4), **change)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (([1, 2], [1, 1], [3]), "Example 0 .* 3 parts, but must be a pair"),
        (([1, 2], [1]), r"tokens of shape \(2,\) and weights of shape \(1,\)"),
        (([[1, 2]], [[1, 1]]), r"shape \(1, 2\)"),
        (([1], [1]), r"shape \(1,\) .* at least 2 tokens"),
        (([1.0, 2.0], [1, 1]), "type float64, but must have integers"),
        (([1, 2], [0, np.nan]), "weight nan at position 1"),
        (([1, 2], [np.inf, 1]), "weight inf at position 0"),
        (([1, 2], [0, -1]), "weight -1.0 at position 1"),
    ],
)
def test_an_example_that_cannot_be_trained_on_is_named(example, says):
    with pytest.raises(ValueError, match=says):
        make([example], batch_size=1)


def test_no_examples_and_nothing_left_to_train_on_are_refused():
    with pytest.raises(ValueError, match="No examples"):
        make([])
    with pytest.raises(ValueError, match=r"eval_fraction=0.5 of 1 example leaves nothing"):
        make(numbered(1), batch_size=1, eval_fraction=0.5)
