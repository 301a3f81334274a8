"""Text and tokens: encoding prompts, decoding tokens as they come, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextCodec(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    backend_tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class TextStream:
    """Decodes the tokens of one request incrementally.

    Incomplete characters, and text that may be the beginning of a stop string, are held back. After a stop
    string no more text is returned, and `stopped` is True.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str]) -> None:
        self._codec = codec
        self._stop = stop
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._decoded = ""
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the new text."""
        self._token_ids.append(token_id)
        piece = self._decoder.step(self._codec.backend_tokenizer, token_id) or ""
        self._decoded += piece
        return self._advance(piece)

    def finish(self) -> str:
        """The text that was held back, after the last token."""
        if self.stopped:
            return ""
        whole = self._codec.decode(self._token_ids, skip_special_tokens=True)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        out = self._advance(rest)
        if not self.stopped:
            out += self._held
        return out

    def _advance(self, piece: str) -> str:
        self._held += piece
        found = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
