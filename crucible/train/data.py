"""Data: a batch is a pure function of the step.

Examples are rendered, shifted, packed and checked once, before the first step. Then
`batch_at(step)` depends on the data, the seed and the step alone, so a checkpoint holds no
iterator, and any step can be made again.

Every batch is a dict of `[B, T]` arrays: `tokens` int32, `targets` int32 (the token after),
`weights` float32 (of the target; 0 = not trained on), `positions` int32 (from 0 within an example)
and `segment_ids` int32 (1, 2, ... within a row). Padding has token, weight and segment 0.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import operator
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from crucible.train import packing
from crucible.train.messages import ROLES, read_conversations
from crucible.train.ports import DatasetStore
from crucible.train.renderers import Rendered, Renderer

__all__ = ["Batch", "Data", "Stats", "bundled_conversations", "from_examples", "load", "prefetch"]

Batch = dict[str, np.ndarray]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What became of the examples. Nothing is dropped that is not counted here.

    Attributes:
        num_examples: examples, all of which are in the rows.
        num_truncated: examples that lost tokens at their end to fit a row.
        num_cut_tokens: the tokens they lost.
        num_unsupervised: examples without a supervised token (any more): they teach nothing.
        num_tokens: tokens in the rows, padding not counted.
        num_supervised_tokens: targets of a weight other than 0.
        num_rows, row_length: rows, and the tokens in each, padding counted.
        num_supervised_stops: of the supervised targets, those that end an answer; None where it is
            not known which tokens do.
    """

    num_examples: int
    num_truncated: int
    num_cut_tokens: int
    num_unsupervised: int
    num_tokens: int
    num_supervised_tokens: int
    num_rows: int
    row_length: int
    num_supervised_stops: int | None = None

    @property
    def efficiency(self) -> float:
        """The fraction of the rows' tokens that is not padding."""
        return self.num_tokens / (self.num_rows * self.row_length)

    def __str__(self) -> str:
        cut = f" (-{self.num_cut_tokens:,} tokens)" if self.num_truncated else ""
        return (
            f"{self.num_examples:,} examples in {self.num_rows:,} rows of {self.row_length:,}: "
            f"{self.num_tokens:,} tokens ({self.efficiency:.1%} full), "
            f"{self.num_supervised_tokens:,} supervised; {self.num_truncated:,} truncated{cut}, "
            f"{self.num_unsupervised:,} unsupervised"
        )


@dataclass(frozen=True, eq=False)
class Data:
    """Batches by step, and what is known of them.

    Attributes:
        batch_at: `step -> batch`, pure, for any step from 0 on. Every epoch is another permutation
            of the rows, and a batch may lie across two epochs.
        eval_batches: the held-out rows, each once, in batches of the same shape; the last is filled
            up with padding.
        stats: what became of the examples to train on.
        eval_stats: the same for the held-out ones, None where nothing is held out.
        fingerprint: SHA-256, in hexadecimal, of all examples, of which are held out and of how they
            are laid in rows. With the seed and the batch size it decides every batch.
        batch_size: rows in a batch.
    """

    batch_at: Callable[[int], Batch]
    eval_batches: tuple[Batch, ...]
    stats: Stats
    eval_stats: Stats | None
    fingerprint: str
    batch_size: int

    def epoch_at(self, step: int) -> int:
        """How many times the data has been gone through when the batch of a step begins."""
        return step * self.batch_size // self.stats.num_rows

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """`batch_at(start)`, `batch_at(start + 1)`, ..., without end, read ahead in a thread."""
        return prefetch(self.batch_at, start)


def bundled_conversations() -> Path:
    """The conversations that come with crucible: real ones, in English (see NOTICE beside them)."""
    return Path(str(importlib.resources.files("crucible.train"))) / "bundled/conversations.jsonl"


def load(
    source: str | os.PathLike[str] | DatasetStore,
    renderer: Renderer,
    *,
    row_length: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
    pack: bool = True,
    eval_fraction: float = 0.0,
) -> Data:
    """Batches of a file or a store of conversations.

    Args:
        source: the path of a JSON Lines file, see `messages.read_conversations`, or a
            `DatasetStore`. The same rows make the same batches, wherever they come from.
        renderer: makes tokens of a conversation.
        row_length: tokens in a row, `T`; what is longer is cut at its end, and counted.
        batch_size: rows in a batch, `B`.
        seed: decides the order of the rows, and which conversations are held out.
        vocab_size: the model's; every token must lie below it.
        pack: several examples a row, or one.
        eval_fraction: the part of the conversations to hold out, at least one if not 0.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the source is neither.
        ValueError: a line or row that is not a conversation; no supervised token; a token outside
            the vocabulary; fewer rows than a batch needs; an argument out of range.
    """
    conversations = read_conversations(source)
    examples = [renderer.supervised(messages) for messages in conversations]
    if not any(example.weights.any() for example in examples):
        roles = Counter(message.role for messages in conversations for message in messages)
        name = source if isinstance(source, str | os.PathLike) else source.name
        raise ValueError(
            f"No supervised tokens in {name}: its {len(conversations)} conversations have "
            f"{', '.join(f'{roles[role]} {role}' for role in ROLES)} messages, and the renderer "
            f"{renderer.name!r} trains on none of them. Give the answers to learn the role "
            "'assistant'."
        )
    return from_examples(
        examples,
        row_length=row_length,
        batch_size=batch_size,
        seed=seed,
        vocab_size=vocab_size,
        pack=pack,
        eval_fraction=eval_fraction,
        stop_tokens=renderer.stop_tokens,
    )


def from_examples(
    examples: Iterable[Rendered | tuple[ArrayLike, ArrayLike]],
    *,
    row_length: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
    pack: bool = True,
    eval_fraction: float = 0.0,
    stop_tokens: Sequence[int] = (),
) -> Data:
    """Batches of examples that are tokens already: `load` without the file and the renderer.

    Args:
        examples: pairs of tokens `[n]` and weights `[n]`; the weight of a token counts where the
            token is the target, so the first one's never does.
        row_length: as for `load`, like all that follow.
        batch_size: rows in a batch.
        seed: decides the order, and what is held out.
        vocab_size: every token must lie below it.
        pack: several examples a row, or one.
        eval_fraction: the part to hold out.
        stop_tokens: those that end an answer, to be counted.

    Raises:
        ValueError: as for `load`; or an example that is not such a pair.

    Example:
        >>> examples = [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]
        >>> data = from_examples(examples, row_length=4, batch_size=1, seed=0, vocab_size=16)
        >>> for name, rows in data.batch_at(0).items():
        ...     print(name, rows[0].tolist())
        tokens [5, 6, 8, 0]
        targets [6, 7, 9, 0]
        weights [1.0, 1.0, 1.0, 0.0]
        positions [0, 1, 0, 0]
        segment_ids [1, 1, 2, 0]
        >>> print(data.stats)
        2 examples in 1 rows of 4: 3 tokens (75.0% full), 3 supervised; 0 truncated, 0 unsupervised
    """
    _check_arguments(row_length, batch_size, seed, eval_fraction)
    checked = [_check_example(i, example, vocab_size) for i, example in enumerate(examples)]
    if not checked:
        raise ValueError("No examples: there is nothing to make a batch of.")
    held_out = _held_out(len(checked), eval_fraction, seed)
    fingerprint = _fingerprint(checked, held_out, row_length, pack)
    training = [example for i, example in enumerate(checked) if i not in held_out]
    rows, stats = _rows(training, row_length, pack, "to train on", stop_tokens)
    if stats.num_rows < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is more than there are rows: {stats.num_examples} examples "
            f"make {stats.num_rows} rows of {row_length} tokens. Take a batch size of at most "
            f"{stats.num_rows} (--batch-size), a shorter row length, or more data."
        )
    eval_batches, eval_stats = (), None
    if held_out:
        kept = [checked[i] for i in sorted(held_out)]
        eval_rows, eval_stats = _rows(
            kept, row_length, pack, "held out for evaluation", stop_tokens
        )
        eval_batches = _cover(eval_rows, batch_size)
    batch_at = _batch_at(rows, batch_size, seed)
    return Data(batch_at, eval_batches, stats, eval_stats, fingerprint, batch_size)


def prefetch(batch_at: Callable[[int], T], start: int = 0) -> Generator[T, None, None]:
    """Yield `batch_at(start)`, `batch_at(start + 1)`, ..., two steps ahead, in a thread.

    The thread begins with the first batch and ends when the iterator is closed or forgotten. What
    `batch_at` raises is raised where its batch would have come.

    Args:
        batch_at: any pure function of the step.
        start: the first step, from 0 on.

    Raises:
        ValueError: `start` is negative.

    Example:
        >>> batches = prefetch(lambda step: step**2, start=3)
        >>> next(batches), next(batches)
        (9, 16)
        >>> batches.close()
    """
    start = operator.index(start)
    if start < 0:
        raise ValueError(f"start={start} must be a step from 0 on.")
    return _read_ahead(batch_at, start)


def _read_ahead(batch_at: Callable[[int], Any], start: int) -> Generator[Any, None, None]:
    import grain

    def outcome(step):  # an error as a value: grain would add notes of its own to it
        try:
            return batch_at(int(step)), None
        except Exception as error:
            return None, error

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    steps = grain.MapDataset.range(start, sys.maxsize).map(outcome)
    iterator = iter(steps.to_iter_dataset(options))
    try:
        for batch, error in iterator:
            if error is not None:
                raise error
            yield batch
    finally:
        iterator.close()


def _batch_at(rows: Batch, batch_size: int, seed: int) -> Callable[[int], Batch]:
    num_rows = len(rows["tokens"])

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        # Raw bits, since another version of NumPy may change Generator.permutation. Not grain's
        # shuffle: it walks up to 65,536 numbers for each row, 0.5 ms a row where there are 100.
        bits = np.random.PCG64([seed, epoch]).random_raw(num_rows)
        return np.argsort(bits, kind="stable")

    def batch_at(step: int) -> Batch:
        """The batch of a step; the arrays are the caller's own."""
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step={step} must be from 0 on.")
        epoch, first = divmod(step * batch_size, num_rows)
        chosen = order(epoch)[first : first + batch_size]
        if missing := batch_size - len(chosen):
            chosen = np.concatenate([chosen, order(epoch + 1)[:missing]])
        return {name: values[chosen] for name, values in rows.items()}

    return batch_at


def _rows(
    examples: Sequence[Rendered],
    row_length: int,
    pack: bool,
    purpose: str,
    stop_tokens: Sequence[int],
) -> tuple[Batch, Stats]:
    """Shift, cut and lay out: all rows `[num_rows, row_length]`."""
    shifted = [(t[:-1][:row_length], t[1:][:row_length], w[1:][:row_length]) for t, w in examples]
    lengths = np.array([len(tokens) for tokens, _, _ in shifted])
    supervised = np.array([np.count_nonzero(weights) for _, _, weights in shifted])
    cut = np.array([len(tokens) - 1 for tokens, _ in examples]) - lengths
    if not supervised.any():
        before = sum(np.count_nonzero(weights[1:]) for _, weights in examples)
        raise ValueError(
            f"No supervised tokens: all {lengths.sum()} targets of the {len(examples)} examples "
            f"{purpose} have weight 0, so there is nothing to learn from. "
            + (
                f"The {before} supervised ones were cut off: {np.count_nonzero(cut)} examples are "
                f"longer than row_length={row_length}. Take a longer row length (--row-length)."
                if before
                else "Give the tokens to learn a weight of 1."
            )
        )
    plan = (packing.pack if pack else packing.pad)(lengths, row_length)
    names = ("tokens", "targets", "weights")
    rows = packing.fill(plan, dict(zip(names, zip(*shifted, strict=True), strict=True)))
    stats = Stats(
        num_examples=len(examples),
        num_truncated=int(np.count_nonzero(cut)),
        num_cut_tokens=int(cut.sum()),
        num_unsupervised=int(np.count_nonzero(supervised == 0)),
        num_tokens=int(lengths.sum()),
        num_supervised_tokens=int(supervised.sum()),
        num_rows=plan.num_rows,
        row_length=row_length,
        num_supervised_stops=(
            int(np.count_nonzero(np.isin(rows["targets"], stop_tokens) & (rows["weights"] != 0)))
            if stop_tokens
            else None
        ),
    )
    return rows, stats


def _cover(rows: Batch, batch_size: int) -> tuple[Batch, ...]:
    """Every row once, in order; the last batch is filled up with rows of padding."""
    num_rows = len(rows["tokens"])
    filler = ((0, -num_rows % batch_size), (0, 0))
    padded = {name: np.pad(values, filler) for name, values in rows.items()}
    return tuple(
        {name: values[start : start + batch_size] for name, values in padded.items()}
        for start in range(0, num_rows, batch_size)
    )


def _held_out(num_examples: int, fraction: float, seed: int) -> frozenset[int]:
    if not fraction:
        return frozenset()
    if num_examples < 2:
        raise ValueError(
            f"eval_fraction={fraction} of 1 example leaves nothing to train on; give at least 2."
        )
    count = min(max(1, round(fraction * num_examples)), num_examples - 1)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_examples)
    return frozenset(order[:count].tolist())


def _fingerprint(
    examples: Sequence[Rendered], held_out: frozenset[int], row_length: int, pack: bool
) -> str:
    digest = hashlib.sha256(f"row_length={row_length} pack={bool(pack)}".encode())
    for i, (tokens, weights) in enumerate(examples):
        digest.update(f" {i} {len(tokens)} {i in held_out}:".encode())
        digest.update(tokens.astype("<i4").tobytes())
        digest.update(weights.astype("<f4").tobytes())
    return digest.hexdigest()


def _check_arguments(row_length: int, batch_size: int, seed: int, eval_fraction: float) -> None:
    if row_length < 2:
        raise ValueError(f"row_length={row_length} must be at least 2 tokens (--row-length).")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1 row (--batch-size).")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be in [0, 2**32).")
    if not 0 <= eval_fraction < 1:
        raise ValueError(
            f"eval_fraction={eval_fraction} must be in [0, 1): a part of the examples."
        )


def _check_example(
    number: int, example: Rendered | tuple[ArrayLike, ArrayLike], vocab_size: int
) -> Rendered:
    where = f"Example {number} (from 0)"
    if len(example) != 2:
        raise ValueError(f"{where} has {len(example)} parts, but must be a pair (tokens, weights).")
    tokens, weights = np.asarray(example[0]), np.asarray(example[1], np.float32)
    if tokens.ndim != 1 or tokens.shape != weights.shape or len(tokens) < 2:
        raise ValueError(
            f"{where} has tokens of shape {tokens.shape} and weights of shape {weights.shape}, but "
            "must be one sequence of at least 2 tokens, with a weight for each."
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{where} has tokens of type {tokens.dtype}, but must have integers.")
    if (at := _first((tokens < 0) | (tokens >= vocab_size))) is not None:
        raise ValueError(
            f"{where} has the token id {tokens[at]} at position {at}, outside [0, {vocab_size}): "
            f"the model's vocabulary has {vocab_size} entries. Use the tokenizer that belongs to "
            "the model, or a model with a larger vocabulary."
        )
    if (at := _first(~((weights >= 0) & np.isfinite(weights)))) is not None:
        raise ValueError(
            f"{where} has the weight {weights[at]} at position {at}, but weights must be finite "
            "and not negative; 0 = not trained on."
        )
    return Rendered(tokens.astype(np.int32), weights)


def _first(wrong: np.ndarray) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None
