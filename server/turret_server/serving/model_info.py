"""The model's bounds on a tokenised prompt."""

from __future__ import annotations

from dataclasses import dataclass

from turret_server.errors import PromptTooLongError

_DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The lengths that prompts are checked against. A cached block has `block_size` tokens.

    `context_note` says why the context has no more than `max_context` tokens, where that is not plain.
    """

    max_context: int
    block_size: int
    context_note: str = ""

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

    def max_tokens(self, wanted: int | None, num_tokens: int, at_least: int = 0) -> int:
        """Maximum number of tokens to generate after `num_tokens`: `wanted`, or a default that fits and is
        not below `at_least`.

        Raises:
            PromptTooLongError: the context has no room for `wanted` tokens, or for `at_least`.
        """
        self.check_room(num_tokens, wanted or max(at_least, 1))
        return wanted or min(max(_DEFAULT_MAX_TOKENS, at_least), self.max_context - num_tokens)
