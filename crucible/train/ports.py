"""Ports: what training asks of the outside world, as Protocols with few members.

Adapters live in `crucible.kitchen.adapters`; anything with these members is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

__all__ = ["DatasetStore"]


class DatasetStore(Protocol):
    """Where conversations come from, when it is not a file. `train.load` takes one.

    Attributes:
        name: what errors and records call it, such as `"hf:HuggingFaceH4/no_robots:train"`.

    Example:
        >>> from crucible import train
        >>> class Greetings:
        ...     name = "greetings"
        ...     def rows(self):
        ...         yield {"messages": [{"role": "user", "content": "Hi"}]}
        >>> train.read_conversations(Greetings())
        [(Message(role='user', content='Hi'),)]
    """

    @property
    def name(self) -> str:
        """What errors and records call it."""
        ...

    def rows(self) -> Iterable[Mapping[str, Any]]:
        """The raw rows, each with a `messages` list, in the same order whenever it is called."""
        ...
