"""Renderers: conversations become tokens, and the weights say which of them are learned.

Headers and contents are tokenised apart, for training and for sampling alike, so that the model
samples after exactly the tokens it was trained to follow, and the weights lie on token bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from crucible.train.messages import ROLES, Conversation, Message, conversation

__all__ = ["Rendered", "Renderer", "Tokenizer", "chatml"]

Messages = Iterable[Message | Mapping[str, Any]]


class Tokenizer(Protocol):
    """What a renderer asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are in `[0, vocab_size)`."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text: no special token, whatever the text looks like."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...

    def token_id(self, special: str) -> int:
        """The id of a special token. Raises ValueError when there is none of that name."""
        ...


class Rendered(NamedTuple):
    """A conversation as the model sees it.

    Attributes:
        tokens: `[n]` int32.
        weights: `[n]` float32, 1 on each token to be predicted, 0 where not trained on.
    """

    tokens: np.ndarray
    weights: np.ndarray


class Renderer(NamedTuple):
    """A chat format: pure functions of the messages.

    Attributes:
        name: the format, for a run's metadata; two models that talk to each other share it.
        supervised: `messages -> Rendered`, a whole conversation to learn from.
        generation_prompt: `messages -> ids`, up to where the assistant speaks. It is a prefix of
            what `supervised` gives for the same messages and an answer.
        stop_tokens: sampling ends at any of these; each answer is trained to end with one.
    """

    name: str
    supervised: Callable[[Messages], Rendered]
    generation_prompt: Callable[[Messages], list[int]]
    stop_tokens: tuple[int, ...]


def chatml(tokenizer: Tokenizer, *, default_system: str | None = None) -> Renderer:
    r"""ChatML: `<|im_start|>ROLE\nCONTENT<|im_end|>\n` for each message.

    Weight 1 is on every assistant's content and on the `<|im_end|>` that closes it; 0 on headers,
    on the newline between messages and on the other roles. Text that spells a special token stays
    text.

    Args:
        tokenizer: must know `<|im_start|>` and `<|im_end|>`.
        default_system: a system message for conversations that do not begin with one.

    Raises:
        ValueError: the tokenizer lacks a special token or takes text for one; when called, messages
            that are not a conversation.

    References:
        The chat template of SmolLM2-Instruct, whose default system message is "You are a helpful AI
        assistant named SmolLM, trained by Hugging Face".

    Example:
        >>> class Characters:
        ...     vocab_size = 130
        ...     def encode(self, text): return [ord(c) for c in text]
        ...     def decode(self, ids): return "".join(chr(i) if i < 128 else "#" for i in ids)
        ...     def token_id(self, name): return {"<|im_start|>": 128, "<|im_end|>": 129}[name]
        >>> tokenizer = Characters()
        >>> tokens, weights = chatml(tokenizer).supervised(
        ...     [Message("user", "Hi"), Message("assistant", "Yes?")])
        >>> tokenizer.decode(tokens)
        '#user\nHi#\n#assistant\nYes?#\n'
        >>> tokenizer.decode(tokens[weights == 1])
        'Yes?#'
    """
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")

    def encode(text: str) -> list[int]:
        ids = list(tokenizer.encode(text))
        if start in ids or end in ids:
            raise ValueError(
                f"tokenizer.encode made a special token (id {start} or {end}) of ordinary text "
                f"{_shorten(text)!r}: a message could end its own turn. Let encode treat every "
                "text as ordinary."
            )
        return ids

    headers = {role: [start, *encode(f"{role}\n")] for role in ROLES}
    newline = encode("\n")

    def begin(messages: Messages) -> Conversation:
        messages = conversation(messages)
        if default_system is not None and messages[0].role != "system":
            return (Message("system", default_system), *messages)
        return messages

    def supervised(messages: Messages) -> Rendered:
        tokens: list[int] = []
        weights: list[float] = []
        for role, content in begin(messages):
            header, body = headers[role], [*encode(content), end]
            tokens += header + body + newline
            weight = 1.0 if role == "assistant" else 0.0
            weights += [0.0] * len(header) + [weight] * len(body) + [0.0] * len(newline)
        return Rendered(np.array(tokens, np.int32), np.array(weights, np.float32))

    def generation_prompt(messages: Messages) -> list[int]:
        tokens: list[int] = []
        for role, content in begin(messages):
            tokens += [*headers[role], *encode(content), end, *newline]
        return tokens + headers["assistant"]

    return Renderer("chatml", supervised, generation_prompt, (end,))


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
