"""What the recipe costs over a hand-written loop: same model, optimizer and batches, one process.

Run by hand, on a quiet machine:   python tests/benchmarks/bench_sft.py

The two take turns of a few steps each, and the ratio of each pair of turns is taken, so that a
noisy neighbour disturbs both alike. The recipe has all its telemetry on: JSON Lines, console and
TensorBoard. Goal: at most 1.03 at 4 M parameters, and 1.10 at 0.1 M.
"""

import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from crucible import kitchen, models, train

SHAPES = {
    "0.1 M": models.DecoderConfig(width=64, layers=2, heads=4, kv_heads=2, mlp_width=192),
    "4 M": models.DecoderConfig(
        vocab_size=4096, width=256, layers=4, heads=4, kv_heads=2, mlp_width=768
    ),
}


def hand_written(kit, config):
    """The loop that one would write without crucible: the same arithmetic, nothing recorded."""
    model, schedule = (
        kit.context["model"],
        train.warmup_decay(config.learning_rate, warmup_steps=10),
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), train.adamw(schedule, weight_decay=config.weight_decay)
    )

    def loss_fn(params, batch):
        logits = model.apply(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(nll * batch["weights"]) / jnp.sum(batch["weights"])

    @jax.jit
    def begin(params):
        return params, optimizer.init(params)

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    carry = list(begin(jax.tree.map(jnp.copy, kit.state.params)))

    def turn(first, last):
        for number in range(first, last):
            *carry[:], _ = step(*carry, kit.batch_at(number))
        jax.block_until_ready(carry)

    return turn


def recipe_loop(recipe, config, closing):
    """The workflow's own loop, compiled, a few steps at a time."""
    whole = kitchen.supervised(config)
    *setup, guarded = whole.parts
    inside = guarded.parts[0].parts
    at = next(i for i, part in enumerate(inside) if part.kind == "repeat")
    Path(config.workdir).mkdir()
    run = kitchen.Run(recipe="bench", workdir=Path(config.workdir), resumed=False)
    context = kitchen.compile(kitchen.sequence(*setup))(kitchen.Context(config=config, run=run))
    for part in inside[:at]:
        context = part(context)
    closing.callback(context["stream"].close)
    closing.callback(context["batches"].close)
    body = kitchen.repeat(lambda last: last, *inside[at].parts, start=lambda first: first)
    loop, held = kitchen.compile(body), [context]
    closing.enter_context(kitchen.Ledger("bench").recording())

    def turn(first, last):
        held[0] = loop(held[0].replace(first=first, last=last))
        jax.block_until_ready(held[0]["state"])

    return turn


def measure(name, shape, *, turns=10, steps=10):
    """Print the ratio of one shape."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as closing:
        config = kitchen.SupervisedConfig(
            model=shape,
            row_length=128,
            num_steps=turns * steps,
            eval_every=0,
            save_every=0,
            workdir=Path(directory) / "run",
        )
        recipe = kitchen.Recipe(name="bench", workflow=kitchen.supervised, config=config)
        kit = kitchen.steps(recipe)
        size = sum(leaf.size for leaf in jax.tree.leaves(kit.state.params))
        with contextlib.redirect_stdout(io.StringIO()):
            loops = [hand_written(kit, config), recipe_loop(recipe, config, closing)]
            seconds = [[], []]
            for turn in range(turns + 2):
                order = (0, 1) if turn % 2 else (1, 0)
                for which in order:
                    began = time.perf_counter()
                    loops[which](turn * steps, (turn + 1) * steps)
                    seconds[which].append((time.perf_counter() - began) / steps)
            closing.close()
        hand, ours = (values[2:] for values in seconds)  # two turns to compile and settle
        ratio = statistics.median(b / a for a, b in zip(hand, ours, strict=True))
        print(
            f"{name}: {size:,} parameters, {config.batch_size}x{config.row_length} tokens: "
            f"hand-written {1e3 * statistics.median(hand):.2f} ms a step, "
            f"recipe {1e3 * statistics.median(ours):.2f} ms, ratio {ratio:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    for name, shape in SHAPES.items():
        measure(name, shape)
