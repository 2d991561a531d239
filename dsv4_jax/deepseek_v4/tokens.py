"""Text to tokens and back, token by token: by a checkpoint's tokenizer.json, or bytes where there is none."""

from __future__ import annotations

import codecs
import importlib
import os
from pathlib import Path
from typing import Any, Protocol

from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError


class TextStream(Protocol):
    """Text of tokens as they come. What is not a whole character yet is held back."""

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became whole."""
        ...


class Tokenizer(Protocol):
    """Turns text into token ids, and token ids into text."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around every text."""
        ...

    def stream(self) -> TextStream:
        """A stream for one text."""
        ...


def load_tokenizer(folder: str | os.PathLike[str], vocabulary: int) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, or ``ByteTokenizer`` where it has no tokenizer.json.

    Args:
      folder: of the checkpoint.
      vocabulary: the model's token ids are 0 .. vocabulary - 1.

    Raises:
      CheckpointError: the tokenizer cannot be read, or has ids that the model does not.
      ImportError: there is a tokenizer.json, and the package ``tokenizers`` is not installed.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.exists():
        if vocabulary < 256:
            raise CheckpointError(f"{folder} has no tokenizer.json, and {vocabulary} token ids are too few for bytes.")
        return ByteTokenizer()
    tokenizer = FileTokenizer(file)
    if tokenizer.vocabulary > vocabulary:
        raise CheckpointError(f"{file} has {tokenizer.vocabulary} token ids, the model {vocabulary}.")
    return tokenizer


class ByteTokenizer:
    """A token is a byte of UTF-8; token ids from 256 on stand for nothing and become U+FFFD."""

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def stream(self) -> TextStream:
        """A stream for one text."""
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        if token < 256:
            return self._decoder.decode(bytes([token]))
        return self.finish() + "\N{REPLACEMENT CHARACTER}"

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileTokenizer:
    """A tokenizer.json, read by the package ``tokenizers``.

    Raises:
      CheckpointError: it cannot be read.
      ImportError: the package is not installed.
    """

    def __init__(self, file: Path) -> None:
        try:
            tokenizers: Any = importlib.import_module("tokenizers")
        except ImportError as error:
            raise ImportError(
                f"{file} is read by the package tokenizers, which is missing: pip install 'dsv4-jax[text]'."
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            self._tokenizer.no_padding()  # a text is all of its tokens, and nothing else
            self._tokenizer.no_truncation()
            ids = [*self._tokenizer.get_vocab(with_added_tokens=True).values(), *self.encode("")]
        except BaseException as error:
            # The package raises nothing more special, and what its Rust panics with is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"{file} is no tokenizer: {error}") from error
        self._vocabulary = max(ids, default=-1) + 1

    @property
    def vocabulary(self) -> int:
        """Its token ids are below this; not all of them need be there."""
        return self._vocabulary

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around every text."""
        return self._tokenizer.encode(text).ids

    def stream(self) -> TextStream:
        """A stream for one text."""
        return _FileStream(self._tokenizer)


class _FileStream:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream: Any = importlib.import_module("tokenizers.decoders").DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            return ""
        self._held.clear()
        return text

    def finish(self) -> str:
        text = self._tokenizer.decode(self._held) if self._held else ""
        self._held.clear()
        return text
