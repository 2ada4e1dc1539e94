"""Running a recipe: the run's directory, its stream of metrics, its result."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from crucible import telemetry, train
from crucible.kitchen.context import Context
from crucible.kitchen.recipe import Recipe, changes, override, to_json
from crucible.kitchen.stage import Stage
from crucible.kitchen.words import did_you_mean
from crucible.kitchen.workflow import check

__all__ = ["Kit", "Result", "Run", "run", "steps", "stored_config"]

METRICS = "metrics.jsonl"
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run's identity and its directory. It is made on disk by `open`, after all checks.

    Attributes:
        recipe: the recipe's name.
        workdir: the run's own directory.
        run_id: the directory's name.
        resumed: whether the directory holds an earlier attempt that is to be continued.
        closing: what must be closed when the run ends, however it ends.
    """

    recipe: str
    workdir: Path
    resumed: bool
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def run_id(self) -> str:
        """The directory's name."""
        return self.workdir.resolve().name

    def open(self, config: Any, *, first_step: int) -> telemetry.Stream:
        """Make the directory ours, write the config into it, and open the stream of metrics.

        Args:
            config: has `num_steps` and `log_every`.
            first_step: where the run starts.

        Raises:
            BlockingIOError: another process is running in the directory.
        """
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._lock()
        train.remove_leftovers(self.workdir)
        earlier = self._read_json("run.json") if self.resumed else {}
        attempt = earlier.get("attempt", -1) + 1
        before, now = self._read_json(CONFIG), to_json(config)
        same = {name: before[name] for name in ("workdir", "resume") if name in before}
        for line in changes(before, now | same) if before else ():
            print(f"Changed since the last attempt: {line}")
        self._write_json(CONFIG, now)
        about = {"recipe": self.recipe, "run_id": self.run_id, "attempt": attempt}
        self._write_json("run.json", about | {"versions": _versions()})
        console = telemetry.ConsoleSink(
            config.num_steps, start_step=first_step, every=config.log_every, title=self.recipe
        )
        store = telemetry.JsonlStore(self.workdir / METRICS)
        board = telemetry.TensorBoardSink(self.workdir / "tensorboard", every=config.log_every)
        stream = telemetry.Stream(self.run_id, [store, console, board], attempt=attempt)
        return self.closing.enter_context(stream)

    def _lock(self) -> None:
        """Held while the run is open; the system lets go of it however the process ends."""
        file = self.closing.enter_context((self.workdir / ".lock").open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"Another process is running in {self.workdir}. Wait until it is done, or choose "
                "another --workdir."
            ) from None

    def _read_json(self, name: str) -> dict:
        path = self.workdir / name
        return json.loads(path.read_text()) if path.exists() else {}

    def _write_json(self, name: str, value: Any) -> None:
        temporary = self.workdir / f".{name}.tmp"
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.rename(self.workdir / name)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run leaves.

    Attributes:
        context: the last context; `result.context["state"].params` are the trained parameters.
        history: `{metric: History(steps, values)}`, arrays, of all attempts of the run.
        workdir: the run's directory.
        seconds: how long it took.
    """

    context: Context = field(repr=False)
    history: Mapping[str, telemetry.History] = field(repr=False)
    workdir: Path
    seconds: float

    def plot(self, *metrics: str) -> Any:
        """Draw metrics over steps (by default the losses); returns the Matplotlib axes.

        Raises:
            ImportError: Matplotlib is not installed.
            KeyError: the run has no such metric.
        """
        for name in metrics:
            if name not in self.history:
                raise KeyError(f"The run has no metric {name!r}.{did_you_mean(name, self.history)}")
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise ImportError("plot() needs Matplotlib: pip install 'crucible-jax[plot]'") from None
        names = metrics or [name for name in ("loss", "eval/loss") if name in self.history]
        _, axes = plt.subplots(figsize=(7, 4))
        for name in names:
            marker = "o" if name.startswith("eval/") else None
            axes.plot(*self.history[name], label=name, marker=marker)
        axes.set(xlabel="step", ylabel="nats per token" if not metrics else "")
        axes.grid(alpha=0.3)
        axes.legend()
        return axes


class Kit(NamedTuple):
    """A recipe's parts, for a loop of your own.

    Attributes:
        steps: the jitted `train.Steps`; nothing is donated.
        state: the first state.
        batch_at: `step -> batch`.
        frozen: what the steps take beside the state, or None.
        context: everything else (`model`, `tokenizer`, `data`, `config`).
    """

    steps: train.Steps
    state: train.TrainState
    batch_at: Callable[[int], Any]
    frozen: Any
    context: Context


def run(recipe: Recipe, **overrides: Any) -> Result:
    """Run a recipe from beginning to end, or on from its last checkpoint (`resume=True`).

    Args:
        recipe: what to run. Its config may say `workdir` and `resume`.
        **overrides: fields of its config; a mapping changes fields of a nested one, as in
            `model={"layers": 4}`.

    Returns:
        The `Result`.

    Raises:
        TypeError: no such field.
        ValueError: a field, the data or the workflow is wrong; said before the first step.
        FileExistsError: the directory has a run in it, and `resume` is not set.
        FileNotFoundError: there is nothing to resume, or an input file is missing.
    """
    began = time.monotonic()
    config = override(recipe.config, overrides)
    workflow = recipe.workflow(config)
    current = _locate(recipe.name, config)
    context = Context(config=config, run=current)
    check(workflow, context)
    try:
        with current.closing:
            context = workflow(context)
    except (Exception, KeyboardInterrupt) as error:
        notes = getattr(error, "__notes__", ())
        if any(note.startswith("At ") for note in notes):  # it was training
            error.add_note(f"Run directory: {current.workdir}")
            saved = train.latest(current.workdir)
            error.add_note(
                f"Last checkpoint: step {saved.step}. Continue with --workdir {current.workdir} "
                "--resume."
                if saved
                else "No checkpoint was saved yet."
            )
        raise
    metrics = current.workdir / METRICS
    history = telemetry.history(metrics) if metrics.exists() else {}
    result = Result(
        context=context,
        history=history,
        workdir=current.workdir,
        seconds=time.monotonic() - began,
    )
    print(_summary(result))
    return result


def steps(recipe: Recipe, **overrides: Any) -> Kit:
    """A recipe's jitted functions, first state and batches, for a loop of your own.

    The loop below ends in the very parameters that `run` would end in:

    .. code-block:: python

        kit = kitchen.steps(RECIPE)
        state = kit.state
        for step in range(100):
            state, metrics = kit.steps.train_step(state, kit.batch_at(step), kit.frozen)

    Args:
        recipe: whose.
        **overrides: fields of its config, as in `run`.
    """
    config = override(recipe.config, overrides)
    context = Context(config=config, donate=False)
    for part in _leaves(recipe.workflow(config)):
        context = part(context)
        if all(name in context for name in ("steps", "state", "batch_at")):
            break
    frozen = context.get("frozen")
    return Kit(context["steps"], context["state"], context["batch_at"], frozen, context)


def _leaves(workflow: Stage):
    """The stages of nested sequences, in order."""
    for part in workflow.parts if workflow.name == "sequence" else (workflow,):
        yield from _leaves(part) if part.name == "sequence" else (part,)


def stored_config(name: str, config: Any) -> Any:
    """The config of the run that `config` asks to resume, as it was when the run was last started.

    Args:
        name: the recipe's.
        config: of the same class; its `workdir` says which run, by default the newest.

    Raises:
        FileNotFoundError: there is no such run.
    """
    earlier = _locate(name, config)
    stored = earlier._read_json(CONFIG)
    return override(config, stored | {"workdir": earlier.workdir, "resume": True})


def _workdir(name: str, config: Any) -> Path:
    runs = Path("runs") / name
    if getattr(config, "workdir", None) is not None:
        return Path(config.workdir).expanduser()
    if not getattr(config, "resume", False):
        return runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    earlier = [path for path in runs.glob("*") if _has_run(path)]
    if not earlier:
        raise FileNotFoundError(f"--resume: there is no run in {runs} to continue.")
    newest = max(earlier, key=lambda path: path.stat().st_mtime)
    print(f"Resuming the newest run of {name}: {newest}")
    return newest


def _locate(name: str, config: Any) -> Run:
    """Where the run goes, with every misunderstanding about it cleared up."""
    workdir = _workdir(name, config)
    nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"workdir={workdir}: {nearest} is a file. Choose another --workdir."
        )
    resume = bool(getattr(config, "resume", False))
    if _has_run(workdir) and not resume:
        raise FileExistsError(
            f"{workdir} has a run in it already. Continue it with --resume (resume=True), or start "
            "another in another directory with --workdir (workdir=...)."
        )
    if resume and not _has_run(workdir):
        raise FileNotFoundError(
            f"--resume: {workdir} has no run in it to continue. Leave --resume out to start one."
        )
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"Cannot write to {workdir}. Choose another --workdir.")
    return Run(recipe=name, workdir=workdir, resumed=resume)


def _has_run(workdir: Path) -> bool:
    return any((workdir / name).exists() for name in (CONFIG, METRICS, "checkpoints"))


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("crucible-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _summary(result: Result) -> str:
    said = []
    for name in ("loss", "eval/loss"):
        if name in result.history:
            values = result.history[name].values
            said.append(f"{name} {values[0]:.3f} → {values[-1]:.3f}")
    minutes, seconds = divmod(round(result.seconds), 60)
    done = f"Done in {minutes}:{seconds:02d}."
    return f"{done} {', '.join(said)}\nRun directory: {result.workdir}"
