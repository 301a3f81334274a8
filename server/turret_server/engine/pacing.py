"""How many tokens of prompts a step may take, so that streams beside them do not stand still.

A step lasts as long as its tokens take; what that is depends on model and device, so it is measured as the
steps go by.
"""

from __future__ import annotations

from dataclasses import dataclass

# Until the first prompt was measured, and at least beside streams that fill the step's time alone: prompts
# that never got on would be no better.
_PROBE_TOKENS = 16

# How much a step counts against all before it.
_SMOOTHING = 0.2


@dataclass(slots=True)
class Pacing:
    """Keeps steps to about `max_seconds`, and to `max_tokens` in any case."""

    max_tokens: int
    max_seconds: float
    _stream_seconds: float = 0.0
    _prompt_token_seconds: float | None = None

    def budget(self, num_streams: int) -> int:
        """Tokens that the next step may take, those of the streams included."""
        if self._prompt_token_seconds is None:
            prompt = _PROBE_TOKENS
        else:
            left = self.max_seconds - self._stream_seconds * bool(num_streams)
            prompt = int(left / max(self._prompt_token_seconds, 1e-9))
        return min(self.max_tokens, num_streams + max(prompt, num_streams, _PROBE_TOKENS))

    def measured(self, num_streams: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step with so many tokens of prompts beside its streams took so long."""
        if not num_prompt_tokens:
            self._stream_seconds += _SMOOTHING * (seconds - self._stream_seconds)
        elif num_prompt_tokens >= _PROBE_TOKENS or self._prompt_token_seconds is None:
            took = max(seconds - self._stream_seconds * bool(num_streams), 0.0) / num_prompt_tokens
            known = took if self._prompt_token_seconds is None else self._prompt_token_seconds
            self._prompt_token_seconds = known + _SMOOTHING * (took - known)
