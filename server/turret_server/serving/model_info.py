"""The model's bounds on a tokenised prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turret_server.errors import InvalidRequestError, PromptTooLongError

_DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What prompts are checked against. `block_size` is the number of tokens in a cached block.

    `context_note` says why the context has no more than `max_context` tokens, where that is not plain.
    """

    vocab_size: int
    max_context: int
    block_size: int
    stop_token_ids: frozenset[int]
    context_note: str = ""

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Check that a prompt has tokens, all of the vocabulary.

        Raises:
            InvalidRequestError: it has none, or one is not in the vocabulary.
        """
        if not token_ids:
            raise InvalidRequestError("the prompt has no tokens; give at least one", field="prompt")
        if max(token_ids) >= self.vocab_size:
            raise InvalidRequestError(
                f"token_ids are below {self.vocab_size}, the size of the vocabulary; found {max(token_ids)}",
                field="token_ids",
            )

    def all_stop_token_ids(self, wanted: Sequence[int]) -> frozenset[int]:
        """The model's end-of-sequence tokens and those of a request.

        Raises:
            InvalidRequestError: one is not in the vocabulary.
        """
        if wanted and max(wanted) >= self.vocab_size:
            raise InvalidRequestError(
                f"stop_token_ids are below {self.vocab_size}, the size of the vocabulary; found "
                f"{max(wanted)}",
                field="stop_token_ids",
            )
        return self.stop_token_ids.union(wanted)

    def check_room(self, num_tokens: int, num_generated: int = 1) -> None:
        """Check that prompt, virtual tokens and tokens to generate fit into the context.

        Raises:
            PromptTooLongError: they do not.
        """
        if num_tokens + num_generated > self.max_context:
            if num_tokens < self.max_context:
                what = f"take {num_tokens}, and max_tokens is {num_generated}; shorten the prompt or lower it"
            else:
                what = f"take {num_tokens}; shorten the prompt"
            raise PromptTooLongError(
                f"the model's context has {self.max_context} tokens{self.context_note}; prompt and virtual "
                f"tokens {what}",
                max_context=self.max_context,
                prompt_tokens=num_tokens,
                max_tokens=num_generated,
            )

    def max_tokens(self, wanted: int | None, num_tokens: int) -> int:
        """Maximum number of tokens to generate after `num_tokens`: `wanted`, or a default that fits.

        Raises:
            PromptTooLongError: the context has no room for `wanted` tokens, or for one.
        """
        self.check_room(num_tokens, wanted or 1)
        return wanted or min(_DEFAULT_MAX_TOKENS, self.max_context - num_tokens)
