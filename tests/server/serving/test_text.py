from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tokenizers import TOKENIZERS, VOCAB_SIZE, make_tokenizer
from turret_server.serving.codec import TextCodec
from turret_server.serving.text import Decoder, TextStream

CODECS = {kind: TextCodec(make_tokenizer(kind)) for kind in TOKENIZERS}
each_kind = pytest.mark.parametrize("kind", TOKENIZERS)


def tokens(text, codec=CODECS["byte-level"]):
    return codec.encode(text, 5000)


def run(codec, token_ids, stop=(), prompt=()):
    stream = TextStream(codec, prompt, list(stop))
    pieces = []
    for token_id in token_ids:
        pieces.append(stream.push(token_id))
        if stream.stopped_by:
            return pieces, stream
    pieces.append(stream.finish())
    return pieces, stream


@st.composite
def prompts_and_answers(draw, kind):
    """Token ids of a prompt and of an answer, with many runs of bytes that are characters, or are none."""
    codec = CODECS[kind]
    one = st.integers(0, VOCAB_SIZE).map(lambda token_id: [token_id])
    words = st.text(alphabet="the fox é你🙂�", max_size=6).map(lambda text: tokens(text, codec))
    pieces = st.lists(one | words, max_size=25).map(lambda lists: [each for some in lists for each in some])
    return draw(pieces), draw(pieces)


@each_kind
@settings(max_examples=100)
@given(data=st.data())
def test_what_is_streamed_is_what_all_tokens_decode_to_after_the_prompt(kind, data):
    """Bytes that are no UTF-8 included."""
    prompt, answer = data.draw(prompts_and_answers(kind))
    pieces, _ = run(CODECS[kind], answer, prompt=prompt)
    codec = CODECS[kind]
    assert "".join(pieces) == codec.decode(prompt + answer)[len(codec.decode(prompt)) :]


@each_kind
def test_ten_thousand_random_answers_are_streamed_as_they_decode(kind):
    codec, chance = CODECS[kind], random.Random(kind)
    for _ in range(10_000):
        prompt = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(12))]
        answer = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(40))]
        decoder = Decoder(codec, prompt)
        streamed = "".join([*map(decoder.push, answer), decoder.finish()])
        assert streamed == codec.decode(prompt + answer)[len(codec.decode(prompt)) :], (prompt, answer)


def test_bytes_that_are_no_character_are_replaced_and_the_answer_goes_on():
    codec = CODECS["byte-fallback"]
    vocabulary = make_tokenizer("byte-fallback").get_vocab()
    answer = [vocabulary[token] for token in ("▁fox", "<0xC3>", "<0xA9>", "<0xF0>", "▁the")]
    pieces, _ = run(codec, answer, prompt=[vocabulary["▁the"]])
    assert pieces == [" fox", "", "", "", "��� the", ""]
    assert "".join(run(codec, answer[:-2])[0]) == "foxé"


@pytest.mark.parametrize("kind", ["byte-fallback", "metaspace"])
def test_the_first_space_of_an_answer_is_kept_after_a_prompt(kind):
    codec = CODECS[kind]
    the, fox = tokens("the", codec), tokens("fox", codec)
    assert "".join(run(codec, fox, prompt=the)[0]) == " fox"
    assert "".join(run(codec, fox)[0]) == "fox"
    pieces, stream = run(codec, fox, [" f"], prompt=the)
    assert ("".join(pieces), stream.stopped_by) == ("", " f")


LONE_BYTES = ["Ã", "©", "ð", "Ł", "Ļ", "ï", "¿", "½"]


@pytest.mark.parametrize("length", [100, 400])
def test_answers_of_bytes_that_never_become_characters_are_streamed_in_a_window(length, monkeypatch):
    codec, chance = CODECS["byte-level"], random.Random(length)
    vocabulary = make_tokenizer().get_vocab()
    bytes_ = [vocabulary[each] for each in LONE_BYTES]
    for _ in range(100):
        some = chance.sample(bytes_, chance.randint(1, len(bytes_)))
        answer = chance.choices(some, k=length)
        with monkeypatch.context() as patched:
            lengths = watch_decoding(codec, patched)
            streamed = "".join(run(codec, answer)[0])
        assert streamed == codec.decode(answer)
        assert max(lengths) <= 80


def test_a_stop_string_of_byte_tokens_ends_the_answer_with_its_last_byte():
    codec, vocabulary = CODECS["byte-fallback"], make_tokenizer("byte-fallback").get_vocab()
    ids = [vocabulary[token] for token in ("▁fox", "<0x0A>", "<0x0A>", "▁the")]
    for stop, shown, num_pieces in (("\n", "fox", 2), ("\n\n", "fox", 3), ("x\n", "fo", 2)):
        pieces, stream = run(codec, ids, [stop])
        assert ("".join(pieces), len(pieces), stream.stopped_by) == (shown, num_pieces, stop)
    # What is held back is not shown twice, and a character that is not whole yet is no stop string.
    assert "".join(run(codec, ids, ["\n\n\n"])[0]) == "fox\n\n the"
    cut = [vocabulary[token] for token in ("<0xC3>", "<0xA9>")]
    assert run(codec, cut, ["\N{REPLACEMENT CHARACTER}"])[1].stopped_by is None
    assert run(codec, [*cut[:1]] * 300, ["é"])[1].stopped_by is None


def watch_decoding(codec, monkeypatch):
    """The numbers of tokens that are decoded at once, from now on."""
    lengths, decode = [], codec.decode
    monkeypatch.setattr(codec, "decode", lambda ids: (lengths.append(len(ids)), decode(ids))[1])
    return lengths


@each_kind
def test_of_a_long_prompt_only_the_end_is_decoded(kind, monkeypatch):
    codec = CODECS[kind]
    prompt = tokens("the quick brown fox " * 200, codec)
    lengths = watch_decoding(codec, monkeypatch)
    streamed = "".join(run(codec, tokens("the fox " * 50, codec), prompt=prompt)[0])
    assert streamed.split() == ["the", "fox"] * 50
    assert max(lengths[:-1]) <= 32


def test_a_prompt_of_many_special_tokens_is_searched_in_few_steps(monkeypatch):
    codec, asked = CODECS["byte-fallback"], []
    is_open = codec.is_open
    monkeypatch.setattr(codec, "is_open", lambda token_id: (asked.append(token_id), is_open(token_id))[1])
    prompt = [*tokens("the", codec), *[make_tokenizer("byte-fallback").bos_token_id] * 5000]
    assert "".join(run(codec, tokens("fox", codec), prompt=prompt)[0]) == " fox"
    assert len(asked) < 20


def test_a_character_comes_when_its_bytes_are_all_there(codec):
    pieces, _ = run(codec, tokens("🙂"))
    assert pieces == ["", "", "", "🙂", ""]


def test_special_tokens_are_no_text(codec):
    pieces, _ = run(codec, [0, *tokens("fox"), 1])
    assert "".join(pieces) == "fox"


@given(
    text=st.text(alphabet="ab ", max_size=20),
    stop=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(codec, text, stop):
    pieces, stream = run(codec, tokens(text), stop)
    found = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    shown = "".join(pieces)
    assert bool(stream.stopped_by) == bool(found)
    if found:
        # The one that is complete first ends the text, and a token may complete two at once.
        assert text.startswith(shown)
        assert len(shown) <= min(found)[1]
        assert not any(each in shown for each in stop)
    else:
        assert shown == text


def test_what_may_become_a_stop_string_is_held_back(codec):
    stream = TextStream(codec, (), ["xyz"])
    out = [stream.push(token_id) for token_id in tokens("axybxyz")]
    assert out[:4] == ["a", "", "", "xyb"]
    assert "".join(out) == "axyb"
    assert stream.stopped_by == "xyz"
    assert stream.finish() == ""


def test_held_text_comes_at_the_end_when_it_became_none(codec):
    pieces, stream = run(codec, tokens("axy"), ["xyz"])
    assert "".join(pieces) == "axy"
    assert stream.stopped_by is None


@pytest.mark.parametrize("stop", [["h", "e"], ["e", "h"]])
def test_of_two_stop_strings_in_one_token_the_first_in_the_text_ends_it(codec, stop):
    assert len(tokens("the")) == 1
    pieces, stream = run(codec, tokens("the"), stop)
    assert (pieces, stream.stopped_by) == (["t"], "h")


def test_a_stop_string_may_come_with_the_bytes_that_never_became_a_character(codec):
    *cut, _ = tokens("a🙂")
    pieces, stream = run(codec, cut, ["\N{REPLACEMENT CHARACTER}"])
    assert ("".join(pieces), stream.stopped_by) == ("a", "\N{REPLACEMENT CHARACTER}")
    pieces, stream = run(codec, cut, ["a\N{REPLACEMENT CHARACTER}b"])
    assert ("".join(pieces), stream.stopped_by) == ("a\N{REPLACEMENT CHARACTER}", None)


def test_the_stop_string_ends_the_text_if_that_is_wanted():
    codec = CODECS["byte-level"]
    stream = TextStream(codec, [], ["xyz", "yq"], include_stop=True)
    pieces = [stream.push(token_id) for token_id in tokens("axyzb")[:4]]
    assert ("".join(pieces), stream.stopped_by, stream.finish()) == ("axyz", "xyz", "")


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, "a"), (1, "a"), (2, "axa"), (3, "axa"), (9, "axax")]
)
def test_a_stop_string_counts_if_it_begins_after_the_fewest_tokens(min_tokens, expected):
    stream = TextStream(CODECS["byte-level"], [], ["x"], min_tokens=min_tokens)
    text = ""
    for token_id in [*tokens("a"), *tokens("x"), *tokens("a"), *tokens("x")]:
        text += "" if stream.stopped_by else stream.push(token_id)
    assert text + stream.finish() == expected
