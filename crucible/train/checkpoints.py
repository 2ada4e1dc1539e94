"""Checkpoints: Orbax writes and reads the arrays, and the commit is ours.

A checkpoint is a directory `checkpoints/<step>` below the run's own. It appears by one rename,
after everything in it has reached the disk, so a checkpoint that can be seen is whole. Whether a
step exists is asked of the disk each time; `checkpoints.jsonl` is the index for people and tools.
This is the only module that knows Orbax. Local file systems only.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = [
    "Checkpoint",
    "hold_interrupts",
    "latest",
    "list_checkpoints",
    "remove_leftovers",
    "restore",
    "save",
]

FORMAT = 1
INDEX = "checkpoints.jsonl"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk."""

    step: int
    """Optimizer steps taken when it was saved."""
    path: Path
    """Its directory."""
    metadata: Mapping[str, Any]
    """What the run wanted remembered beside the arrays, as JSON."""
    saved_at: str
    """When it was saved, ISO-8601, UTC."""


def save(
    run: str | Path, step: int, state: Any, metadata: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Save a state, whole or not at all, and wait until it is on disk.

    Ctrl-C is heeded when the checkpoint is complete; a second one at once.

    Args:
        run: the run's directory; it is made if need be.
        step: optimizer steps taken.
        state: a pytree of arrays.
        metadata: anything that JSON can say.

    Returns:
        The `Checkpoint`.

    Raises:
        FileExistsError: the run already has a checkpoint of this step.
        TypeError: the metadata is not JSON, or the step is not an integer.
        ValueError: the step is negative, or two leaves have the same name.
    """
    from orbax.checkpoint import v1 as ocp

    step = operator.index(step)
    if step < 0:
        raise ValueError(f"step={step} must not be negative.")
    manifest = {
        "format": FORMAT,
        "step": step,
        "saved_at": datetime.now(UTC).isoformat(),
        "leaves": _leaf_table(state),
        "metadata": dict(metadata or {}),
    }
    text = json.dumps(manifest, indent=1, allow_nan=False)
    final = _directory(run) / f"{step:08d}"
    if _read(final) is not None:
        raise FileExistsError(f"{final} exists: step {step} of this run is already saved.")
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # whatever it is, it is no checkpoint; it is kept, out of the way
        final.rename(final.with_name(f".damaged-{step}-{uuid.uuid4().hex[:8]}"))
    temporary = final.with_name(f".tmp-{step}-{uuid.uuid4().hex[:8]}")
    entry = {"name": final.name, "path": f"checkpoints/{final.name}"}
    entry |= {k: manifest[k] for k in ("step", "saved_at", "metadata")}
    with hold_interrupts():
        try:
            ocp.save(str(temporary.absolute()), state)
            (temporary / "checkpoint.json").write_text(text)
            _sync_tree(temporary)
            temporary.rename(final)
            _sync(final.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _append_index(Path(run) / INDEX, entry)
    return Checkpoint(
        step=step, path=final, metadata=manifest["metadata"], saved_at=manifest["saved_at"]
    )


def restore(run: str | Path, target: Any, step: int | None = None) -> tuple[Any, Checkpoint]:
    """Read a state back, exactly.

    Args:
        run: the run's directory.
        target: a state of the same structure, shapes and types, of arrays or of
            `jax.ShapeDtypeStruct`s; arrays are restored onto the devices that these are on.
        step: which checkpoint; by default the latest.

    Returns:
        The state and the `Checkpoint` it came from.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the target differs from what was saved, with every difference listed by path;
            nothing is cast, padded or cut.
    """
    from orbax.checkpoint import v1 as ocp

    found = list_checkpoints(run)
    chosen = [c for c in found if step is None or c.step == step]
    if not chosen:
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        have = ", ".join(str(c.step) for c in found) or "none"
        raise FileNotFoundError(f"{run} has {what} (steps saved: {have}).")
    checkpoint = chosen[-1]
    manifest = json.loads((checkpoint.path / "checkpoint.json").read_text())
    differences = _differences(manifest["leaves"], _leaf_table(target))
    if differences:
        raise ValueError(
            f"The state does not fit the checkpoint {checkpoint.path}:\n  "
            + "\n  ".join(differences)
            + "\nRestore with the model and optimizer it was saved with."
        )
    abstract = jax.tree.map(_abstract, target)
    return ocp.load(str(checkpoint.path.absolute()), abstract), checkpoint


def latest(run: str | Path) -> Checkpoint | None:
    """The checkpoint of the highest step, or None."""
    return next(reversed(list_checkpoints(run)), None)


def list_checkpoints(run: str | Path) -> list[Checkpoint]:
    """All whole checkpoints of a run, by rising step."""
    directory = _directory(run)
    if not directory.is_dir():
        return []
    found = [_read(path) for path in directory.iterdir() if path.name.isdigit()]
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def _directory(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint in a directory, or None if it holds none."""
    try:
        manifest = json.loads((path / "checkpoint.json").read_text())
        return Checkpoint(
            step=manifest["step"],
            path=path,
            metadata=manifest["metadata"],
            saved_at=manifest["saved_at"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_leftovers(run: str | Path) -> None:
    """Remove what a killed save left behind; only for the one process that writes this run."""
    for path in _directory(run).glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = leaf if hasattr(leaf, "shape") else np.asarray(leaf)
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaf_table(state: Any) -> dict[str, list]:
    """`{path: [shape, dtype]}` of every leaf."""
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if not hasattr(leaf, "shape"):
            leaf = np.asarray(leaf)
        if name in table:
            raise ValueError(f"Two leaves of the state are called {name}.")
        table[name] = [list(leaf.shape), str(leaf.dtype)]
    return table


def _differences(saved: Mapping[str, list], wanted: Mapping[str, list]) -> list[str]:
    def say(entry):
        shape, dtype = entry
        return f"{dtype}[{', '.join(map(str, shape))}]"

    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            lines.append(f"{name}: not in the checkpoint, the state has {say(wanted[name])}")
        elif name not in wanted:
            lines.append(f"{name}: {say(saved[name])} in the checkpoint, not in the state")
        elif saved[name] != wanted[name]:
            lines.append(
                f"{name}: {say(saved[name])} in the checkpoint, the state has {say(wanted[name])}"
            )
    return lines


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Hold the first Ctrl-C back until the block is done (in the main thread, which gets them)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    held = []

    def hold(number, frame):
        held.append((number, frame))
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):  # also if the block has failed: its error is the context
            before(*held[0])


def _append_index(path: Path, entry: Mapping[str, Any]) -> None:
    line = json.dumps(entry, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
