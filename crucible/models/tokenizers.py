"""Text to token ids and back.

Plain text never becomes a control token: `encode` spells a literal `<|im_end|>` out, so no message
can end its own turn. Renderers place control tokens by id, with `token_id`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = [
    "ByteTokenizer",
    "HFTokenizer",
    "Tokenizer",
    "tokenizer_from_file",
    "tokenizer_from_gguf",
]

REPLACEMENT = "\ufffd"  # what stands for bytes or ids that are no text


class Tokenizer(Protocol):
    """What a model's text side can do; `ByteTokenizer` and `HFTokenizer` are two."""

    @property
    def name(self) -> str:
        """Says which vocabulary this is; two tokenizers of one name give the same ids."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added at either end and never a special token.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair.
        """
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 and ids past the vocabulary become U+FFFD.

        Args:
            ids: one sequence of ids: a list, or a one-dimensional array.
            skip_special: leave special tokens out instead of writing their names.

        Raises:
            ValueError: the ids are not one sequence of integers >= 0.
        """
        ...

    def token_id(self, special: str) -> int:
        """The id of a special token, such as `<|im_end|>`.

        Raises:
            ValueError: there is no such special token.
        """
        ...


BYTE_SPECIALS = {"<|pad|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then `<|pad|>`, `<|im_start|>` and `<|im_end|>`.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("hé")
        [104, 195, 169]
        >>> tokenizer.decode([104, 195, 169, tokenizer.token_id("<|im_end|>")])
        'hé<|im_end|>'
    """

    name: str = field(default="bytes", init=False)
    vocab_size: int = field(default=259, init=False)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """See `Tokenizer.decode`."""
        specials = {i: b"" if skip_special else s.encode() for s, i in BYTE_SPECIALS.items()}
        unknown = REPLACEMENT.encode()
        pieces = (bytes([i]) if i < 256 else specials.get(i, unknown) for i in _id_list(ids))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_id(self, special: str) -> int:
        """See `Tokenizer.token_id`."""
        return _special_id(special, BYTE_SPECIALS, self.name)


class HFTokenizer:
    """A `tokenizers.Tokenizer` as a `Tokenizer`; build it with `tokenizer_from_file`.

    Truncation, padding and begin-of-text tokens that the tokenizer brings are switched off: a
    renderer says what stands where. Tokens that its vocabulary adds without calling them special
    (`<think>` in some) are ordinary text, as in transformers.
    """

    def __init__(self, backend: Any):
        # Both switches live outside the tokenizer's JSON, so that a copy would lose them: see
        # `__reduce__`.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        added = backend.get_added_tokens_decoder()
        self._specials = {token.content: i for i, token in sorted(added.items())}
        unknown = getattr(backend.model, "unk_token", None)  # a model may write it for any text
        self._forbidden = frozenset(
            i for i, token in added.items() if token.special and token.content != unknown
        )

    def __reduce__(self):
        return HFTokenizer, (self._backend,)

    def __repr__(self) -> str:
        return f"HFTokenizer({self.name!r})"

    @property
    def name(self) -> str:
        """The model's kind, the size and a digest of the vocabulary: `bpe-49152-1c2d3e4f`."""
        return f"{type(self._backend.model).__name__.lower()}-{self.vocab_size}-{self._digest}"

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return self._vocab_size

    @cached_property
    def _digest(self) -> str:
        entries = sorted((i, token) for token, i in self._backend.get_vocab().items())
        return hashlib.sha256(repr(entries).encode()).hexdigest()[:8]

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        text.encode("utf-8")  # tokenizers answers half a surrogate pair with a puzzling TypeError
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self._forbidden.isdisjoint(ids):
            found = next(i for i in ids if i in self._forbidden)
            raise ValueError(
                f"Tokenizer {self.name!r} can only spell {self._backend.id_to_token(found)!r} in "
                f"this text as special token {found}, which text must never produce. Remove it "
                "from the text."
            )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """See `Tokenizer.decode`."""
        runs: list[list[int]] = [[]]  # cut at unknown ids, which the backend drops in silence
        for i in _id_list(ids):
            if self._backend.id_to_token(i) is None:
                runs.append([])
            else:
                runs[-1].append(i)
        texts = (self._backend.decode(run, skip_special_tokens=skip_special) for run in runs)
        return REPLACEMENT.join(texts)

    def token_id(self, special: str) -> int:
        """See `Tokenizer.token_id`."""
        return _special_id(special, self._specials, self.name)


def tokenizer_from_file(path: str | Path) -> HFTokenizer:
    """Read a `tokenizer.json`, or the one in a directory.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not a tokenizer that the `tokenizers` library can read.
        ImportError: the `tokenizers` library is not installed.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Other formats (tokenizer.model, vocab.json) become one with "
            "transformers: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."
        )
    tokenizers = _tokenizers("hf")
    try:
        return HFTokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}.") from error


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> HFTokenizer:
    """Build the byte-level BPE tokenizer that a GGUF file's metadata describes.

    How text is cut into words before merging is a name there (`tokenizer.ggml.pre`), not data; only
    `smollm` is known here. A wrong cut gives other ids without any error, so others are refused.

    Args:
        metadata: the file's `tokenizer.ggml.*` keys and values.

    Raises:
        ValueError: another kind of tokenizer, or an incomplete one.
        ImportError: the `tokenizers` library is not installed.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre != "smollm":
        raise ValueError(
            f"The GGUF tokenizer tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={pre!r} is "
            "not known: only model 'gpt2' (byte-level BPE) with pre 'smollm' is. Load the model's "
            "Hugging Face directory, with its tokenizer.json, instead."
        )
    keys = ("tokens", "token_type", "merges")
    missing = [key for key in keys if not metadata.get(f"tokenizer.ggml.{key}")]
    if missing:
        raise ValueError(
            f"The GGUF tokenizer lacks {', '.join(f'tokenizer.ggml.{key}' for key in missing)}."
        )
    tokens, types, merges = (metadata[f"tokenizer.ggml.{key}"] for key in keys)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(vocab) != len(tokens):
        raise ValueError(
            f"The GGUF tokenizer is damaged: {len(tokens)} tokens, of which {len(vocab)} differ, "
            f"and {len(types)} token types."
        )
    return _smollm(vocab, types, merges)


UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # GGUF token types


def _smollm(vocab: dict[str, int], types: list[int], merges: list[str]) -> HFTokenizer:
    tokenizers = _tokenizers("smollm2")
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"The GGUF tokenizer's merges do not fit its tokens: {error}.") from error
    # As llama.cpp and SmolLM2's own tokenizer.json have it. transformers 5.23 reads this GGUF
    # without the first step, which cuts spaces before a digit differently.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    added = [
        tokenizers.AddedToken(token, normalized=False, special=kinds[kind])
        for token, kind in zip(vocab, types, strict=True)
        if kind in kinds
    ]
    backend.add_tokens(added)
    return HFTokenizer(backend)


def _tokenizers(extra: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "This model's text side needs the tokenizers library: "
            f"pip install 'crucible-jax[{extra}]'."
        ) from error
    return tokenizers


def _id_list(ids: Iterable[int]) -> list[int]:
    array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"decode takes one sequence of integer ids, not shape {array.shape} of {array.dtype}. "
            "Decode a batch row by row."
        )
    if array.min() < 0:
        where = int(np.argmax(array < 0))
        raise ValueError(f"ids[{where}] is {array[where]}; an id is >= 0. Drop padding first.")
    return array.tolist()


def _special_id(special: str, specials: Mapping[str, int], name: str) -> int:
    if special in specials:
        return specials[special]
    close = difflib.get_close_matches(special, specials, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(repr(token) for token in list(specials)[:20]) or "none"
    more = f" and {len(specials) - 20} more" if len(specials) > 20 else ""
    raise ValueError(
        f"Tokenizer {name!r} has no special token {special!r}.{hint} It has {shown}{more}."
    )
