"""Conversations: who said what, read from JSON Lines with every mistake found at once.

A row that would train on something else than it says (a misspelt role, a `weight` that nobody
reads) is an error with its file and line, or its store and row, before anything is tokenised.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from crucible.train.ports import DatasetStore

__all__ = ["ROLES", "Conversation", "Message", "conversation", "read_conversations", "read_rows"]

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`.
        content: the text, which may be empty.
    """

    role: str
    content: str


Conversation = tuple[Message, ...]


def read_conversations(source: str | os.PathLike[str] | DatasetStore) -> list[Conversation]:
    """Read a JSON Lines file of `{"messages": [{"role": ..., "content": ...}, ...]}`, or a store.

    UTF-8, one conversation a line. Blank lines are skipped, and so are a row's other keys.

    Args:
        source: the file's path, or a store with such rows.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the source is neither.
        ValueError: the source holds no conversation, or a line is not valid; the message names the
            file and the line (or the store and the row), what is wrong and what to write instead.

    Example:
        >>> from crucible.train import data
        >>> first = read_conversations(data.bundled_conversations())[0]
        >>> first[0].role, first[-1].role
        ('user', 'assistant')
    """
    if isinstance(source, str | os.PathLike):
        return [checked for _, checked in _file(Path(source))]
    if not (callable(getattr(source, "rows", None)) and hasattr(source, "name")):
        raise TypeError(
            f"Conversations cannot be read from {_kind(source)}: give the path of a JSON Lines "
            "file, or a DatasetStore (an attribute 'name' and a method 'rows')."
        )
    conversations = [
        _checked(row, f"{source.name}, row {number} (from 0)", "the row")
        for number, row in enumerate(source.rows())
    ]
    if not conversations:
        raise ValueError(f"{source.name} holds no conversation: it gave no rows.")
    return conversations


def read_rows(path: str | os.PathLike[str]) -> Iterator[Mapping[str, Any]]:
    """The rows of such a file as they are, with all their keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row that `read_conversations` would refuse, in the same words.
    """
    return (row for row, _ in _file(Path(path)))


def conversation(
    messages: Iterable[Message | Mapping[str, Any]], *, where: str = "messages"
) -> Conversation:
    """Check messages, given as `Message`s or as dicts, and make a `Conversation` of them.

    Args:
        messages: one or more, in order.
        where: how errors call the place they come from.

    Raises:
        ValueError: no messages; a message that is not an object, lacks a key or has one too many;
            an unknown role; a content that is not text.

    Example:
        >>> conversation([{"role": "user", "content": "Hi"}])
        (Message(role='user', content='Hi'),)
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise ValueError(
            f"{where} is {_kind(messages)}, but must be a list of messages: "
            '[{"role": "user", "content": "Hi"}, ...].'
        )
    checked = tuple(_message(message, f"{where}[{i}]") for i, message in enumerate(messages))
    if not checked:
        raise ValueError(f"{where} is empty: a conversation needs at least one message.")
    return checked


def _file(path: Path) -> Iterator[tuple[Mapping[str, Any], Conversation]]:
    """Each row of a file, and the conversation in it."""
    if not path.exists():
        raise FileNotFoundError(f"No conversations at {path}: there is no such file.{_near(path)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give one JSON Lines file inside it.")
    is_empty = True
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the mark some editors write first
        if line.strip():
            is_empty = False
            row = _parsed(line, f"{path}:{number}")
            yield row, _checked(row, f"{path}:{number}", "the line")
    if is_empty:
        raise ValueError(
            f"{path} holds no conversation ({path.stat().st_size} bytes). Write one a line: "
            '{"messages": [{"role": "user", "content": "Hi"}, '
            '{"role": "assistant", "content": "Hello."}]}'
        )


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8. Save the "
            "file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}, column {error.colno}: not JSON: {error.msg}. Every line must be one whole "
            'object, {"messages": [...]}.'
        ) from None


def _checked(row: Any, where: str, noun: str) -> Conversation:
    """The conversation in a row; `noun` is what an error calls the row."""
    if not isinstance(row, Mapping) or "messages" not in row:
        is_object = isinstance(row, Mapping)
        found = f"an object with the keys {sorted(map(str, row))}" if is_object else _kind(row)
        raise ValueError(f'{where}: {noun} is {found}, but must be {{"messages": [...]}}.')
    return conversation(row["messages"], where=f"{where}: messages")


def _message(message: Any, where: str) -> Message:
    if isinstance(message, Message):
        message = message._asdict()
    if not isinstance(message, Mapping):
        raise ValueError(
            f'{where} is {_kind(message)}, but must be {{"role": ..., "content": ...}}.'
        )
    if missing := [key for key in Message._fields if key not in message]:
        raise ValueError(f"{where} has no {missing[0]!r}; its keys are {sorted(message)}.")
    if unknown := [key for key in message if key not in Message._fields]:
        raise ValueError(
            f"{where} has a key {unknown[0]!r} that nothing here reads; a message has 'role' and "
            "'content' only. Remove the key, or write what it means into the content."
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        close = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}.{hint}")
    if not isinstance(content, str):
        raise ValueError(f"{where} has a content that is {_kind(content)}, but must be text.")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half a character (a lone surrogate, U+{ord(content[error.start]):04X}) "
            f"at position {error.start} of its content. Repair or remove it."
        ) from None
    return Message(role, content)


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _near(path: Path) -> str:
    """A file beside it whose name is close, as a hint."""
    if not path.parent.is_dir():
        return f" Nor is there a folder {path.parent}."
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""
