from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from support.tokenizers import TOKENIZERS, make_tokenizer
from turret_server.errors import PromptTooLongError
from turret_server.serving.codec import TextCodec


class Counted(TextCodec):
    """Counts the characters that are tokenised."""

    def __init__(self) -> None:
        super().__init__(make_tokenizer())
        self.num_characters = 0
        self.longest = 0
        backend = self._tokenizer

        class Backend:
            def encode(_, text: str, **options: bool) -> object:  # noqa: N805
                self.num_characters += len(text)
                self.longest = max(self.longest, len(text))
                return backend.encode(text, **options)

        self._tokenizer = Backend()


def with_bos() -> TextCodec:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return TextCodec(tokenizer)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_has_the_tokens_that_transformers_gives_it(kind):
    tokenizer = make_tokenizer(kind)
    for text in ("the fox", " the  fox ", "<s>the</s>", ""):
        assert TextCodec(tokenizer).encode(text, 64) == tokenizer.encode(text)


def test_what_a_tokenizer_was_saved_with_cuts_and_pads_no_prompt():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=16, pad_id=2, pad_token="<pad>")
    codec = TextCodec(tokenizer)
    assert codec.decode(codec.encode("the quick brown fox jumps", 64)) == "the quick brown fox jumps"
    assert len(codec.encode("the", 64)) == 1


def test_special_tokens_are_added_unless_they_are_not_wanted():
    codec = with_bos()
    the = codec.encode("the", 64, add_special_tokens=False)
    assert codec.encode("the", 64) == [0, *the, 1]
    assert len(the) == 1


@pytest.mark.parametrize("add", [True, False])
def test_a_text_that_begins_with_the_beginning_of_sequence_token_gets_no_second_one(add):
    found = with_bos().encode("<s>the<s><s>", 64, add_special_tokens=add)
    assert (found[0], found.count(0)) == (0, 3)
    assert found[1] != 0
    assert with_bos().encode("<s><s>the", 64, add_special_tokens=add)[:2] == [0, 0]


def test_a_tokenizer_without_a_beginning_of_sequence_token_keeps_what_is_given():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert TextCodec(tokenizer).encode("<s><s>", 64) == [0, 0]


@pytest.mark.parametrize("size", [1 << 20, 4 << 20])
@pytest.mark.parametrize("letter", ["x", "x ", "é", "the "])
def test_a_text_far_too_long_is_refused_by_a_part_of_it(size, letter):
    """However long it is, what is tokenised follows from the context."""
    codec = Counted()
    with pytest.raises(PromptTooLongError, match="more than twice as many; shorten it") as refused:
        codec.encode(letter * (size // len(letter)), 1024)
    assert codec.num_characters <= 1 << 16
    assert refused.value.metadata["max_context"] == "1024"


def test_a_text_of_up_to_twice_the_context_is_tokenised_for_its_exact_number():
    codec = Counted()
    assert len(codec.encode("the" * 1500, 1000)) == 1500
    with pytest.raises(PromptTooLongError):
        codec.encode("the " * 200_000, 1000)
    assert codec.longest <= 1 << 14


def test_a_text_that_cannot_be_too_long_is_tokenised_once():
    codec = Counted()
    text = "x" * 20_000
    codec.encode(text, len(text))
    assert codec.num_characters == len(text)


def test_a_long_text_of_few_tokens_is_tokenised_whole():
    text = "the other " * 10_000
    found = TextCodec(make_tokenizer()).encode(text, 50_000)
    assert found == make_tokenizer().encode(text)


def test_special_tokens_are_known_by_their_text():
    codec = TextCodec(make_tokenizer())
    assert (codec.special_token_id("</s>"), codec.special_token_id("the")) == (1, None)


def test_the_next_token_changes_what_bytes_and_special_tokens_decode_to():
    tokenizer = make_tokenizer("byte-fallback")
    codec = TextCodec(tokenizer)
    opened = {"<0x00>", "<0xC3>", "<0xFF>", "<s>", "</s>", "<unk>"}
    assert {token for token in tokenizer.get_vocab() if codec.is_open(tokenizer.get_vocab()[token])} >= opened
    assert not codec.is_open(tokenizer.get_vocab()["▁the"])
    assert codec.is_open(len(tokenizer)), "models may have more tokens than their tokenizers"


def test_a_token_that_looks_like_a_byte_is_text_if_the_tokenizer_does_not_decode_it_as_one():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<0x41>"])
    assert not TextCodec(tokenizer).is_open(tokenizer.get_vocab()["<0x41>"])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_bytes_of_tokens_are_those_of_their_text(kind):
    codec = TextCodec(make_tokenizer(kind))
    for text in (
        "the quick brown fox",
        " the  fox",
        *(["é你🙂 the", "a\n\tb"] if kind != "metaspace" else []),
    ):
        token_ids = codec.encode(text, 64)
        found = b"".join(map(codec.token_bytes, token_ids)).decode()
        # Spaces before the first word are the tokenizer's business.
        assert found.lstrip() == codec.decode(token_ids).lstrip()


def test_the_bytes_of_a_token_may_be_part_of_a_character():
    for kind in ("byte-level", "byte-fallback"):
        codec = TextCodec(make_tokenizer(kind))
        parts = [codec.token_bytes(each) for each in codec.encode("🙂", 64)]
        assert [each for each in parts if each != b" "] == [bytes([byte]) for byte in "🙂".encode()]


def test_special_tokens_have_their_text_as_bytes_and_tokens_of_the_model_alone_none():
    codec = TextCodec(make_tokenizer())
    assert codec.token_bytes(1) == b"</s>"
    assert codec.token_bytes(10**6) == b""
    assert (codec.is_special(1), codec.is_special(67), codec.is_special(10**6)) == (True, False, False)


def test_special_tokens_are_shown_if_that_is_wanted():
    codec = TextCodec(make_tokenizer())
    token_ids = [0, *codec.encode("fox", 64), 1]
    assert codec.decode(token_ids) == "fox"
    assert codec.with_special_tokens().decode(token_ids) == "<s>fox</s>"
    assert codec.decode(token_ids) == "fox"
    assert codec.is_open(1)
    assert not codec.with_special_tokens().is_open(1)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_marks_are_shown_among_hidden_special_tokens(kind):
    tokenizer = make_tokenizer(kind)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[CALLS]", "[ARGS]"]})
    tokenizer.add_tokens(["<tool>"])
    codec = TextCodec(tokenizer)
    token_ids = codec.encode("[CALLS]the fox<tool>[ARGS]the</s>", 64)
    assert "[CALLS]" not in codec.decode(token_ids)
    shown = codec.showing("x[CALLS] </s>")
    with_marks = shown.decode(token_ids)
    assert with_marks.startswith("[CALLS]")
    assert with_marks.endswith("</s>")
    assert "[ARGS]" not in with_marks
    assert with_marks.replace("[CALLS]", "").replace("</s>", "").split() == codec.decode(token_ids).split()
    assert not shown.is_open(tokenizer.convert_tokens_to_ids("[CALLS]"))
    assert shown.is_open(tokenizer.convert_tokens_to_ids("[ARGS]"))
    assert codec.showing("x[CALLS] </s>") is shown
    assert codec.showing("nothing of it") is codec
