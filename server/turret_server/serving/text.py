"""The text of an answer, token by token, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from turret_server.serving.codec import TextCodec

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens of the prompt that are decoded with the answer, at least.
_NUM_BEFORE = 8
# Decoded tokens that are kept: more than a character has bytes.
_NUM_KEPT = 16
# The longest run of bytes in which stop strings are looked for before it ends.
_NUM_PENDING = 256


class Decoder:
    """Decodes tokens one by one; the text continues that of the tokens `before` them.

    What it returns adds up to the text of all tokens without that of the tokens before. That is more than the
    texts of single tokens: decoders drop the space at the beginning of a text, and join bytes to characters.
    So a window of the last tokens is decoded, the end of which may change with the next token: incomplete
    characters, and bytes that are decoded together.
    """

    def __init__(self, codec: TextCodec, before: Sequence[int]) -> None:
        self._codec = codec
        self._window = _last_tokens(codec, before)
        self._num_shown = len(codec.decode(self._window))
        # The window's tokens before this one may be dropped: no later token changes what they decode to.
        self._num_settled = len(self._window)

    def push(self, token_id: int) -> str:
        """Add a token; returns the new text that no later token changes."""
        self._window.append(token_id)
        if self._codec.is_open(token_id):
            return ""
        text = self._codec.decode(self._window)
        # Only the last one may become a character.
        certain = text.removesuffix(_REPLACEMENT)
        new, self._num_shown = certain[self._num_shown :], max(len(certain), self._num_shown)
        if new and certain == text:
            self._settle()
        elif len(self._window) > 4 * _NUM_KEPT:
            # It never ends with a whole character. Only the last bytes matter for those to come.
            del self._window[:-_NUM_KEPT]
            self._num_shown = len(self._codec.decode(self._window).removesuffix(_REPLACEMENT))
            self._num_settled = 0
        return new

    def pending(self) -> str:
        """The text of bytes that are held back, if they are characters; they may still become others."""
        if not self._codec.is_open(self._window[-1]) or len(self._window) > _NUM_PENDING:
            return ""
        text = self._codec.decode(self._window)[self._num_shown :]
        return "" if _REPLACEMENT in text else text

    def finish(self) -> str:
        """The text that was held back, after the last token."""
        return self._codec.decode(self._window)[self._num_shown :]

    def _settle(self) -> None:
        """The window is decoded without a change to come. Its last tokens, which have text, are enough."""
        if len(self._window) > _NUM_KEPT:
            del self._window[: self._num_settled]
            self._num_shown = len(self._codec.decode(self._window))
        self._num_settled = len(self._window)


def _last_tokens(codec: TextCodec, token_ids: Sequence[int]) -> list[int]:
    """The last tokens that have text, from the beginning of a character on."""
    num_tokens = _NUM_BEFORE
    while num_tokens < len(token_ids):
        last = list(token_ids[-num_tokens:])
        if not codec.is_open(last[0]) and codec.decode(last):
            return last
        num_tokens *= 2
    return list(token_ids)


class TextStream:
    """The text of one request's answer.

    Text that may be the beginning of a stop string is held back. After a stop string no more text is
    returned, and `stopped_by` is that string. In the text of the first `min_tokens` tokens none begins.
    """

    def __init__(
        self,
        codec: TextCodec,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str],
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """With `include_stop` the text ends with the stop string, not before it."""
        self._decoder = Decoder(codec, prompt_token_ids)
        self._stop = stop
        self._include_stop = include_stop
        self._num_unchecked = min_tokens if stop else 0
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """Add a token; returns the new text."""
        if self._num_unchecked:
            self._num_unchecked -= 1
            return self._decoder.push(token_id)
        out = self._advance(self._decoder.push(token_id))
        # A line break may be a byte: a stop string of it ends the answer now and not with the next word.
        if self._stop and self.stopped_by is None and (pending := self._decoder.pending()):
            out += self._stop_in(self._held + pending)
        return out

    def finish(self) -> str:
        """The text that was held back, after the last token."""
        if self.stopped_by is not None:
            return ""
        out = self._advance(self._decoder.finish())
        return out if self.stopped_by is not None else out + self._held

    def _advance(self, piece: str) -> str:
        self._held += piece
        certain = self._stop_in(self._held)
        if self.stopped_by is not None:
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _stop_in(self, text: str) -> str:
        """Stop before the first stop string in a text, and return what precedes it; "" if there is none."""
        found = [(index, stop) for stop in self._stop if (index := text.find(stop)) >= 0]
        if not found:
            return ""
        index, self.stopped_by = min(found)
        self._held = ""
        return text[: index + len(self.stopped_by) * self._include_stop]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
