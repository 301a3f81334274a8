"""Tokens of a prompt and the text of tokens, in the vocabulary that a generation with these adapters has."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from turret_server.serving.jobs import Jobs
from turret_server.serving.request import GenerationRequest
from turret_server.serving.validation import validate
from turret_server.tenancy.auth import Caller


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens, the bytes of the text of each, which may be part of a character, and the text of all. Special
    tokens have theirs.
    """

    token_ids: tuple[int, ...]
    parts: tuple[bytes, ...]
    text: str


class TokenService:
    """Used on one event loop."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def tokens(self, request: GenerationRequest, caller: Caller) -> Tokens:
        """The tokens of the request's prompt, which is text, token ids or a chat, as a generation has them.

        Raises:
            InvalidRequestError: a field is invalid, or a token is not in the vocabulary.
            PromptTooLongError: the prompt does not fit into the context.
            AdapterError: an adapter does not exist, or its use is invalid.
        """
        adapters = validate(request)
        async with self._jobs.prepare(request, adapters, caller, request.routing_key) as prepared:
            token_ids = prepared.fields["prompt_token_ids"]
            codec = prepared.vocabulary.codec.with_special_tokens()

            def found() -> Tokens:
                parts = tuple(map(codec.token_bytes, token_ids))
                return Tokens(token_ids=token_ids, parts=parts, text=codec.decode(token_ids))

            return await asyncio.to_thread(found)
