"""A thread that makes items ahead of who consumes them."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

from crucible.kitchen.context import Context
from crucible.kitchen.scope import fresh_journal, reached

__all__ = ["Producer"]

PATIENCE = 30.0  # seconds that a loop waits for its producer to finish


class Producer:
    """A thread that makes items ahead, and a bounded buffer of them.

    Leaving its `with` block ends the thread. An error of the producer is raised where its next item
    would have come.

    Args:
        make: makes the next item; StopIteration says that there is none. It is called when there is
            room for what it makes.
        size: of the buffer.
        name: of the thread.
        close: called in the thread at its end.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        size: int,
        name: str,
        close: Callable[[], None] | None = None,
    ):
        self._make, self._size, self._name, self._close = make, size, name, close
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()
        self._closed = self._ended = False
        self._error: BaseException | None = None
        scope = contextvars.copy_context()
        self._thread = threading.Thread(target=scope.run, args=(self._run,), name=name, daemon=True)

    def _run(self) -> None:
        _, end = fresh_journal()
        try:
            while self._has_room():
                item = self._make()
                with self._changed:
                    self._items.append(item)
                    self._changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:
            self._error = error
        finally:
            end()
            with self._changed:
                self._ended = True
                self._changed.notify_all()
        if self._close is not None:
            self._close()

    def _has_room(self) -> bool:
        """Wait until there is room for an item; False when nobody wants one any more."""
        with self._changed:
            while len(self._items) >= self._size and not self._closed:
                self._changed.wait()
            return not self._closed

    def take(self, context: Context, where: str, index: str, number: int) -> tuple[Any] | None:
        """The next item, in a tuple, or None at the end.

        Args:
            context: how far the run has come, for an error of the producer.
            where: a note on such an error.
            index: the name of the loop's number, for another.
            number: that number.
        """
        try:
            with self._changed:
                while not self._items and not self._ended:
                    self._changed.wait()
                if self._items:
                    item = self._items.popleft()
                    self._changed.notify_all()
                    return (item,)
            if self._error is None:
                return None
            if where:
                self._error.add_note(where)
            raise self._error
        except BaseException as error:
            reached(error, context, surely=True)
            error.add_note(f"At {index} {number}.")
            raise

    def __enter__(self) -> Producer:
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C just now
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(RuntimeError):  # it has not begun yet, and will end at once
            self._thread.join(PATIENCE)
        if self._thread.is_alive():
            warnings.warn(
                f"The producer of {self._name} is still busy after {PATIENCE:g} s, and is left to "
                "end by itself.",
                RuntimeWarning,
                stacklevel=2,
            )
