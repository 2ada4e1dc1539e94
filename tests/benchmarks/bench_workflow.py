"""What the workflow language costs the host: a two-stage workflow over the bare jitted loop.

Run by hand, on a quiet machine:   python tests/benchmarks/bench_workflow.py

Both loops run the same near-empty step. The workflow has two device stages (one program), a stage
that pushes metrics into a stream with a JSON Lines store, and an `every`. They take turns, and the
difference of each pair is taken. Goal: at most 60 microseconds a step. With chunks of 32 it is far
less than the bare loop. The second figure is the same at 4 M parameters, where nothing should be
measurable beside the step itself (bench_sft.py compares the whole recipe there).
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from crucible import kitchen, telemetry
from crucible.metrics import Mean


def parts(size):
    """A step in two halves, as functions and as stages."""

    def gradient(params, target):
        return jax.tree.map(lambda p, t: p - t, params, target)

    def update(params, grads):
        new = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return new, {"loss": Mean(jnp.sum(grads["w"][0]), jnp.ones(()))}

    names = ("w", "b", "scale")
    params = {name: jnp.zeros((size, 8)) for name in names}
    target = {name: jnp.ones((size, 8)) for name in names}
    return gradient, update, params, target


def bare(size):
    """The loop that one would write by hand, recording nothing."""
    gradient, update, params, target = parts(size)
    step = jax.jit(lambda p, t: update(p, gradient(p, t)), donate_argnums=0)
    held = [jax.tree.map(jnp.copy, params)]

    def turn(count):
        carry = held[0]
        for number in range(count):
            carry, metrics = step(carry, target)
            if number % 100 == 0:
                last = metrics
        held[0] = jax.block_until_ready(carry)
        return last

    return turn


def workflow(size, directory, closing, chunk):
    """The same in the workflow language, with telemetry and an `every`."""
    gradient, update, params, target = parts(size)
    stream = closing.enter_context(
        telemetry.Stream("bench", [telemetry.JsonlStore(Path(directory) / f"m{chunk}.jsonl")])
    )
    loop = kitchen.compile(
        kitchen.repeat(
            lambda count: count,
            kitchen.every(128, kitchen.stage(host=True)(lambda step: None)),
            kitchen.stage("grads")(gradient),
            kitchen.stage("params", "metrics")(update),
            kitchen.stage(host=True, many=lambda step, metrics: stream.push_many(step, metrics))(
                lambda step, metrics: stream.push(step, metrics)
            ),
            chunk=chunk,
        )
    )
    ledger = closing.enter_context(kitchen.Ledger("bench").recording())
    held = [kitchen.Context(params=jax.tree.map(jnp.copy, params), target=target)]

    def turn(count):
        held[0] = loop(held[0].replace(count=count))
        jax.block_until_ready(held[0]["params"])
        stream.flush()
        return ledger

    return turn


def measure(size, *, count, turns=15):
    """Print the difference at one size."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as closing:
        loops = {"bare": bare(size)}
        loops |= {f"chunk {k}": workflow(size, directory, closing, k) for k in (1, 32)}
        seconds = {name: [] for name in loops}
        for _ in range(turns + 2):
            for name, turn in loops.items():
                began = time.perf_counter()
                turn(count)
                seconds[name].append((time.perf_counter() - began) / count)
        kept = {name: values[2:] for name, values in seconds.items()}
        for name in list(loops)[1:]:
            extra = [b - a for a, b in zip(kept["bare"], kept[name], strict=True)]
            print(
                f"{3 * 8 * size:,} parameters, {name}: bare "
                f"{1e6 * statistics.median(kept['bare']):.1f} us a step, workflow "
                f"{1e6 * statistics.median(kept[name]):.1f} us, over it "
                f"{1e6 * statistics.median(extra):+.1f} us",
                flush=True,
            )


if __name__ == "__main__":
    measure(1, count=1024)
    measure(175_000, count=128)
