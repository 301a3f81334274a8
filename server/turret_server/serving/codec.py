"""Text to tokens and back, as a model's tokenizer does it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from turret_adapters.formats.tokenizer import OwnTokenizer
from turret_server.errors import PromptTooLongError

# Longer texts are counted in pieces of this many characters before they are tokenised as a whole.
PIECE_CHARACTERS = 1 << 12


class TextCodec:
    """The base model's tokenizer, or an adapter's. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | OwnTokenizer) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        # Checkpoints saved after a training often have both.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos_token_id: int | None = tokenizer.bos_token_id
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        self._open = frozenset([*self._special.values(), *_byte_token_ids(self._tokenizer)])

    def encode(self, text: str, max_tokens: int, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a prompt. A text that begins with the beginning-of-sequence token gets no second one.

        Args:
            text: the prompt.
            max_tokens: the longest prompt in tokens; a text that is certainly longer is not tokenised whole.
            add_special_tokens: add those that the tokenizer adds to a text.

        Raises:
            PromptTooLongError: the text is far longer than `max_tokens`.
        """
        self._check_length(text, max_tokens)
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and token_ids[:2] == [self._bos_token_id] * 2:
            del token_ids[0]
        return token_ids

    def _check_length(self, text: str, max_tokens: int) -> None:
        """Count the tokens of a long text piece by piece, up to twice as many as fit.

        Tokenising takes hundreds of times the memory of the text, so what does not fit must be found before.
        A piece may have more tokens than it has within the whole text, but only at its two ends.
        """
        if len(text) <= max_tokens:
            return
        num_tokens = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            num_tokens += len(self._tokenizer.encode(piece, add_special_tokens=False).ids)
            if num_tokens > 2 * max_tokens:
                raise PromptTooLongError(
                    f"the model's context has {max_tokens} tokens; the prompt of {len(text)} characters "
                    "takes more than twice as many; shorten it",
                    max_context=max_tokens,
                    prompt_tokens=num_tokens,
                    max_tokens=1,
                )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens and with U+FFFD for bytes that are no characters."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def special_token_id(self, text: str) -> int | None:
        """The special token whose text this is. It never appears in an answer's text."""
        return self._special.get(text)

    def is_open(self, token_id: int) -> bool:
        """Whether the next token may change what this one decodes to: a byte of a character that has no token
        (byte fallback; consecutive ones become characters if all are valid, otherwise U+FFFD for each), or a
        token without text, which may stand between them: a special token, or one that only the model has.
        """
        return token_id in self._open or self._tokenizer.id_to_token(token_id) is None


def _byte_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that byte fallback joins to characters."""
    if tokenizer.decoder is None or tokenizer.decoder.decode(["<0x41>"]) != "A":
        return []
    found = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    return [token_id for token_id in found if token_id is not None]
