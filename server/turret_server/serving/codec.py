"""Text to tokens and back, as a model's tokenizer does it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from turret_adapters.formats.tokenizer import OwnTokenizer
from turret_server.errors import PromptTooLongError

# A text that no decoder changes.
_ANCHOR = "a"
# Longer texts are counted in pieces of this many characters before they are tokenised as a whole.
PIECE_CHARACTERS = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The tokens of a text or of a pair of texts. `type_ids` tell these apart as the model's tokenizer does.
    `spans` are the tokens' characters: which text, the first, and the one after the last; None for tokens of
    no text. Both are empty for inputs of token ids, `type_ids` also if all are 0.
    """

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...] = ()
    spans: tuple[tuple[int, int, int] | None, ...] = ()


class TextCodec:
    """The base model's tokenizer, or an adapter's. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | OwnTokenizer) -> None:
        self._source = tokenizer
        self._showing: dict[str, TextCodec] = {}
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        # Checkpoints saved after a training often have both.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos_token_id: int | None = tokenizer.bos_token_id
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        self._bytes = frozenset(_byte_token_ids(self._tokenizer))
        self._open = self._bytes.union(self._special.values())
        self._byte_alphabet = _byte_alphabet(self._tokenizer)
        self._token_bytes: dict[int, bytes] = {}
        self._skip_special_tokens = True

    def encode(
        self, text: str, max_tokens: int, *, add_special_tokens: bool = True, context_note: str = ""
    ) -> list[int]:
        """The tokens of a prompt. A text that begins with the beginning-of-sequence token gets no second one.

        Args:
            text: the prompt.
            max_tokens: the longest prompt in tokens; a text that is certainly longer is not tokenised whole.
            add_special_tokens: add those that the tokenizer adds to a text.
            context_note: why there are no more than `max_tokens`, see `ModelInfo`.

        Raises:
            PromptTooLongError: the text is far longer than `max_tokens`.
        """
        self._check_length(text, max_tokens, context_note)
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and token_ids[:2] == [self._bos_token_id] * 2:
            del token_ids[0]
        return token_ids

    def encode_texts(
        self,
        texts: Sequence[str],
        max_tokens: int,
        *,
        add_special_tokens: bool,
        truncate: bool,
        context_note: str,
    ) -> Encoded:
        """The tokens of one text or of a pair, see `encode`. With `truncate` texts lose tokens at their ends
        until all fit, the longer one of a pair first.

        Raises:
            PromptTooLongError: a text is far longer than `max_tokens`, and shall not be cut.
        """
        if truncate:
            texts = [self._beginning(text, max_tokens) for text in texts]
        else:
            for text in texts:
                self._check_length(text, max_tokens, context_note)
        first, second = (*texts, None)[:2]
        assert first is not None
        found = self._tokenizer.encode(first, second, add_special_tokens=add_special_tokens)
        begin = int(add_special_tokens and found.ids[:2] == [self._bos_token_id] * 2)
        if truncate and len(found) > max_tokens + begin:
            found = self._truncated(texts, max_tokens + begin, add_special_tokens=add_special_tokens)
        sources = [
            None if source is None else (source, *offsets)
            for source, offsets in zip(found.sequence_ids, found.offsets, strict=True)
        ]
        return Encoded(
            token_ids=tuple(found.ids[begin:]),
            type_ids=tuple(found.type_ids[begin:]) if any(found.type_ids) else (),
            spans=tuple(sources[begin:]),
        )

    def _truncated(self, texts: Sequence[str], max_tokens: int, *, add_special_tokens: bool) -> Encoding:
        parts = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        special = self._tokenizer.num_special_tokens_to_add(len(texts) == 2) if add_special_tokens else 0
        room = max(max_tokens - special, 0)
        shorter, *longer = sorted(parts, key=len)
        if longer:
            shorter.truncate(min(len(shorter), room // 2))
        (longer or [shorter])[0].truncate(room - len(shorter) * bool(longer))
        first, second = (*parts, None)[:2]
        assert first is not None
        return self._tokenizer.post_process(first, second, add_special_tokens=add_special_tokens)

    def _check_length(self, text: str, max_tokens: int, context_note: str) -> None:
        if len(self._beginning(text, max_tokens)) < len(text):
            raise PromptTooLongError(
                f"the model's context has {max_tokens} tokens{context_note}; the prompt of {len(text)} "
                "characters takes more than twice as many; shorten it",
                max_context=max_tokens,
                max_tokens=1,
            )

    def _beginning(self, text: str, max_tokens: int) -> str:
        """The text, or a beginning of it that has more than twice as many tokens as fit.

        Tokenising takes hundreds of times the memory of the text, so what does not fit must be found before:
        a long text is counted piece by piece. A piece may have more tokens than it has within the whole text,
        but only at its two ends.
        """
        if len(text) <= max_tokens:
            return text
        num_tokens = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            num_tokens += len(self._tokenizer.encode(piece, add_special_tokens=False).ids)
            if num_tokens > 2 * max_tokens:
                return text[: start + PIECE_CHARACTERS]
        return text

    def with_special_tokens(self) -> TextCodec:
        """One that decodes special tokens to their texts."""
        shown = copy(self)
        shown._skip_special_tokens, shown._open = False, self._bytes  # noqa: SLF001 (of this class)
        return shown

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, with U+FFFD for bytes that are no characters. Special tokens have none, unless
        this codec shows them.
        """
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def showing(self, marks: str) -> TextCodec:
        """A codec that decodes special tokens as well whose texts `marks` contains; the same if none does."""
        if marks not in self._showing:
            shown = {text for text in self._special if text in marks}
            self._showing[marks] = self._with_ordinary(shown) if shown else self
        return self._showing[marks]

    def _with_ordinary(self, shown: set[str]) -> TextCodec:
        """With special tokens made ordinary ones; it shares the vocabulary."""
        own = Tokenizer(self._tokenizer.model)
        if self._tokenizer.decoder is not None:
            own.decoder = self._tokenizer.decoder
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        for _, token in added:
            token.special = token.special and token.content not in shown
        own.add_tokens([token for _, token in added])
        assert all(own.token_to_id(token.content) == token_id for token_id, token in added), "no gaps"
        source = self._source
        return TextCodec(
            OwnTokenizer(backend_tokenizer=own, bos_token=source.bos_token, eos_token=source.eos_token)
        )

    def special_token_id(self, text: str) -> int | None:
        """The special token whose text this is."""
        return self._special.get(text)

    def is_special(self, token_id: int) -> bool:
        return self._added.get(token_id) in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token's text, which may be part of a character; none for a token without text."""
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._bytes_of(token_id)
        return found

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._bytes:
            return bytes([int(token[3:-1], 16)])
        if self._byte_alphabet and all(each in self._byte_alphabet for each in token):
            return bytes(self._byte_alphabet[each] for each in token)
        decoder = self._tokenizer.decoder
        if decoder is None:
            return token.encode()
        # After another token: decoders drop the space at the beginning of a text.
        before: str = decoder.decode([_ANCHOR])
        both: str = decoder.decode([_ANCHOR, token])
        return both.removeprefix(before).encode()

    def is_open(self, token_id: int) -> bool:
        """Whether the next token may change what this one decodes to: a byte of a character that has no token
        (byte fallback; consecutive ones become characters if all are valid, otherwise U+FFFD for each), or a
        token without text, which may stand between them: a special token, or one that only the model has.
        """
        return token_id in self._open or self._tokenizer.id_to_token(token_id) is None


def _byte_alphabet(tokenizer: Tokenizer) -> dict[str, int]:
    """The bytes by the characters that stand for them in the tokens of a byte-level tokenizer (GPT-2):
    printable ones stand for themselves, those from U+0100 on for the others. Empty for other tokenizers.
    """
    if tokenizer.decoder is None or tokenizer.decoder.decode(["\u0120"]) != " ":
        return {}
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _byte_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that byte fallback joins to characters."""
    if tokenizer.decoder is None or tokenizer.decoder.decode(["<0x41>"]) != "A":
        return []
    found = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    return [token_id for token_id in found if token_id is not None]
