"""Answering a misspelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence to end an error with: the closest known word, or all of them.

    Example:
        >>> did_you_mean("learning_rat", ["learning_rate", "seed"])
        " Did you mean 'learning_rate'?"
        >>> did_you_mean("zzz", ["seed", "batch"])
        ' There are: batch, seed.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" There are: {', '.join(known)}." if known else ""
