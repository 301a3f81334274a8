"""The vocabularies of requests: the base model's, or that of an adapter with tokens of its own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from turret_adapters.formats.tokenizer import OwnTokenizer
from turret_adapters.spec import AdapterSpec
from turret_server.errors import InvalidRequestError
from turret_server.serving.codec import TextCodec

# Tokenizers of adapters that are kept. Each shares most of its memory with the base model's.
_CACHED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens and their texts. `size` is the number of logits; `stop_token_ids` end every answer.
    `special_tokens` are texts of special tokens by the names by which chat templates know them.
    """

    codec: TextCodec
    size: int
    stop_token_ids: frozenset[int]
    special_tokens: Mapping[str, str] = field(default_factory=dict, hash=False)

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Check that a prompt has tokens, all of the vocabulary.

        Raises:
            InvalidRequestError: it has none, or one is not in the vocabulary.
        """
        if not token_ids:
            raise InvalidRequestError("the prompt has no tokens; give at least one", field="prompt")
        if max(token_ids) >= self.size:
            raise InvalidRequestError(
                f"token_ids are below {self.size}, the size of the vocabulary; found {max(token_ids)}",
                field="token_ids",
            )

    def check_named(self, token_ids: Iterable[int], field: str) -> None:
        """Check tokens that a field of a request names.

        Raises:
            InvalidRequestError: one is not in the vocabulary.
        """
        for token_id in token_ids:
            if not 0 <= token_id < self.size:
                raise InvalidRequestError(
                    f"{field} has token ids below {self.size}, the size of the vocabulary; found {token_id}",
                    field=field,
                )


class Vocabularies:
    """Finds the vocabulary of a request. Used on one event loop."""

    def __init__(self, base: Vocabulary, read: Callable[[str], OwnTokenizer]) -> None:
        """`read` reads the tokenizer of a revision, see `AdapterLibrary.tokenizer`."""
        self._base = base
        self._read = read
        self._own: OrderedDict[str, Vocabulary] = OrderedDict()
        self._reading = asyncio.Lock()

    async def of(self, adapters: Sequence[AdapterSpec]) -> Vocabulary:
        """The vocabulary of a request for adapters that the caller holds, with at most one tokenizer.

        Raises:
            AdapterError: the tokenizer is unreadable.
        """
        own = next((spec for spec in adapters if spec.tokenizer), None)
        vocabulary = await self._of_adapter(own) if own else self._base
        return next(
            (replace(vocabulary, size=spec.vocab_size) for spec in adapters if spec.vocab_size), vocabulary
        )

    async def _of_adapter(self, spec: AdapterSpec) -> Vocabulary:
        if spec.tokenizer not in self._own:
            async with self._reading:
                if spec.tokenizer not in self._own:  # nor read while this request waited
                    own = await asyncio.to_thread(self._read_vocabulary, spec.revision)
                    self._own[spec.tokenizer] = own
        self._own.move_to_end(spec.tokenizer)
        if len(self._own) > _CACHED:
            self._own.popitem(last=False)
        return self._own[spec.tokenizer]

    def _read_vocabulary(self, revision: str) -> Vocabulary:
        """In a thread: a tokenizer may have thousands of added tokens."""
        tokenizer = self._read(revision)
        end, stops = tokenizer.eos_token_id, self._base.stop_token_ids
        return replace(
            self._base,
            codec=TextCodec(tokenizer),
            stop_token_ids=stops if end is None else stops | {end},
            special_tokens=_renamed(self._base.special_tokens, tokenizer),
        )


def _renamed(of_base: Mapping[str, str], own: OwnTokenizer) -> dict[str, str]:
    named = {**of_base, "bos_token": own.bos_token, "eos_token": own.eos_token}
    return {name: text for name, text in named.items() if text is not None}
