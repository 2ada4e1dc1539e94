"""Conversations from a file, from Hugging Face, or from a list, as `train.DatasetStore`s.

Making one of these reads nothing: files and networks are for `rows`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from crucible.train.messages import read_rows

__all__ = ["HfDataset", "JsonlDataset", "ListDataset"]


class JsonlDataset:
    """The rows of a JSON Lines file, checked in the words of `train.read_conversations`.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.name = f"jsonl:{path}"

    def __repr__(self) -> str:
        return f"JsonlDataset({str(self._path)!r})"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """The file's rows in order, with all their keys; the file is read at every call.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line is not a conversation.
        """
        return read_rows(self._path)


class HfDataset:
    """One split of a data set in the format of the library `datasets`, fetched at its first use.

    Args:
        name: of a data set on the Hugging Face hub, or a directory: one written by `save_to_disk`,
            or any other that `datasets.load_dataset` reads.
        split: as `datasets.load_dataset` takes it (`"train[:1000]"` too), or the name of one of a
            saved directory's splits.

    Raises:
        ValueError: the name or the split is empty.
    """

    def __init__(self, name: str | os.PathLike[str], split: str = "train") -> None:
        self._source, self._split = os.fspath(name), split
        self.name = f"hf:{self._source}:{split}"
        if not self._source or not split:
            raise ValueError(
                f"{self.name!r} lacks its {'split' if self._source else 'name'}. Write hf:NAME or "
                "hf:NAME:SPLIT."
            )

    def __repr__(self) -> str:
        return f"HfDataset({self._source!r}, {self._split!r})"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """The split's rows in order, with all their columns.

        Raises:
            ImportError: the library `datasets` is not installed.
            FileNotFoundError: there is no such data set, or it cannot be reached.
            ValueError: it has no such split.
        """
        return iter(self._dataset)

    @cached_property
    def _dataset(self) -> Any:
        try:
            datasets = importlib.import_module("datasets")  # not this module: the library
        except ImportError as error:
            raise ImportError(
                f"{self.name} needs the library datasets: pip install 'crucible-jax[hub]'."
            ) from error
        folder = Path(self._source)
        if (folder / "dataset_dict.json").exists():
            splits = datasets.load_from_disk(self._source)
            if self._split not in splits:
                raise ValueError(
                    f"{self._source} has no split {self._split!r}; its splits are "
                    f"{', '.join(sorted(splits))}. Choose one: hf:{self._source}:SPLIT."
                )
            return splits[self._split]
        if (folder / "state.json").exists():
            saved = datasets.load_from_disk(self._source)
            if self._split != (only := str(saved.split or "train")):
                raise ValueError(
                    f"{self._source} has no split {self._split!r}: what was saved there is a "
                    f"single data set, {only!r}. Choose it: hf:{self._source}:{only}."
                )
            return saved
        try:
            return datasets.load_dataset(self._source, split=self._split)
        except Exception as error:
            error.add_note(f"While loading the data set {self.name}.")
            raise


class ListDataset:
    """Rows held in memory: for notebooks and tests.

    Args:
        rows: each with a `messages` list; copied.
        name: what errors call it.

    Example:
        >>> ListDataset([{"messages": []}, {"text": "Hi"}], name="two").rows()
        ({'messages': []}, {'text': 'Hi'})
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], name: str = "list") -> None:
        self._rows = tuple(rows)
        self.name = name

    def __repr__(self) -> str:
        return f"ListDataset({len(self._rows)} rows, name={self.name!r})"

    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """All of them, in order."""
        return self._rows
