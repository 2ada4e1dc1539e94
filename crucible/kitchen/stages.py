"""The standard stages: thin lifts of what train, models and telemetry do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from crucible import train
from crucible.kitchen.recipe import changes, to_json
from crucible.kitchen.runner import Run
from crucible.kitchen.stage import stage
from crucible.metrics import merge

__all__ = [
    "evaluate",
    "init_state",
    "log_metrics",
    "make_steps",
    "next_batch",
    "open_run",
    "restore",
    "save_checkpoint",
    "steps_taken",
    "train_step",
]

IDENTITY = ("model", "lora", "seed", "row_length", "batch_size")  # fields that a run cannot change


@stage("steps", host=True)
def make_steps(config: Any, loss_fn: Any, donate: bool = True):
    """Build the jitted functions of the run, with AdamW."""
    schedule = train.warmup_decay(
        config.learning_rate, warmup_steps=config.warmup_steps, decay_steps=config.decay_steps
    )
    return train.make_steps(
        loss_fn,
        train.adamw(schedule, weight_decay=config.weight_decay),
        microbatches=config.microbatches,
        max_grad_norm=config.max_grad_norm or None,
        schedule=schedule,
        donate=donate,
    )


@stage("state", "params", host=True)
def init_state(config: Any, steps: train.Steps, params: Any):
    """The first state; it owns a copy of the parameters, so the context lets go of them."""
    return steps.init(params, jax.random.key(config.seed)), None


@stage("state", "first_step", host=True)
def restore(config: Any, run: Run, state: train.TrainState, data: Any):
    """The state to start from: the last checkpoint's if the run is resumed, else the first."""
    if not run.resumed:
        return state, 0
    last = train.latest(run.workdir)
    if last is None:
        print(f"{run.workdir} has no checkpoint yet: starting from step 0.")
        return state, 0
    _must_be_the_same_run(run, config, last.metadata)
    restored, checkpoint = train.restore(run.workdir, state)
    saved = last.metadata.get("data_fingerprint")
    if saved != data.fingerprint:
        raise ValueError(
            f"The data is not what {run.workdir} was trained on (fingerprint "
            f"{data.fingerprint[:12]}, was {str(saved)[:12]}): the run could not go on where it "
            "stopped. Restore the data and its options, or start a new run in another --workdir."
        )
    print(f"Restored step {checkpoint.step} from {checkpoint.path}.")
    if checkpoint.step >= config.num_steps:
        print(
            f"It has all of its {config.num_steps} steps (--num-steps): nothing is left to train."
        )
    return restored, checkpoint.step


def _must_be_the_same_run(run: Run, config: Any, saved_with: Mapping[str, Any]) -> None:
    """Settings that decide which model is trained on which batches cannot change under way."""
    was, now = saved_with.get("config", {}), to_json(config)
    shared = [name for name in IDENTITY if name in was and name in now]
    differing = changes({name: was[name] for name in shared}, {name: now[name] for name in shared})
    if differing:
        raise ValueError(
            f"{run.workdir} was trained with other settings, so it could not go on where it "
            "stopped:\n  " + "\n  ".join(differing) + "\nResume with the settings it was started "
            "with, or start a new run in another --workdir."
        )


@stage("stream", "batches", host=True)
def open_run(config: Any, run: Run, data: Any, first_step: int):
    """Open the run's directory and metrics, and start reading batches ahead."""
    batches = data.batches(first_step)
    run.closing.callback(batches.close)
    return run.open(config, first_step=first_step), batches


@stage("batch", host=True)
def next_batch(batches: Any):
    """The step's batch, on its way to the device."""
    return jax.device_put(next(batches))


@stage("state", "metrics")
def train_step(steps: train.Steps, state: train.TrainState, batch: Any, frozen: Any = None):
    """One optimizer step."""
    return steps.train_step(state, batch, frozen)


@stage(host=True)
def log_metrics(stream: Any, step: int, metrics: Any):
    """Hand the step's metrics to the stream, without waiting for them."""
    stream.push(step, metrics)


@stage(host=True)
def evaluate(
    steps: train.Steps,
    state: train.TrainState,
    data: Any,
    stream: Any,
    step: int,
    frozen: Any = None,
):
    """Measure the held-out batches; they add up, so their sizes do not matter."""
    seen = [
        steps.eval_step(state.params, jax.device_put(batch), frozen) for batch in data.eval_batches
    ]
    if seen:
        stream.push(step, {"eval": merge(*seen)})


@stage(host=True)
def save_checkpoint(
    run: Run, config: Any, state: train.TrainState, data: Any, stream: Any, step: int
):
    """Save the state, unless this very step is saved already; metrics reach the disk first."""
    if any(checkpoint.step == step for checkpoint in train.list_checkpoints(run.workdir)):
        return
    stream.flush()
    metadata = {"config": to_json(config), "data_fingerprint": data.fingerprint}
    train.save(run.workdir, step, state, metadata)


@stage("step", host=True)
def steps_taken(state: train.TrainState):
    """The step that the state is at, when the loop is over."""
    return int(state.step)
