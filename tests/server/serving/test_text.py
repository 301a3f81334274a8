from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret_server.serving.text import TextStream


def run(codec, token_ids, stop=()):
    stream = TextStream(codec, list(stop))
    pieces = []
    for token_id in token_ids:
        pieces.append(stream.push(token_id))
        if stream.stopped:
            return pieces, stream
    pieces.append(stream.finish())
    return pieces, stream


@given(text=st.text(alphabet="the quick brünn 你好 🙂é", max_size=30))
def test_pieces_add_up_to_the_text(codec, text):
    pieces, _ = run(codec, codec.encode(text))
    assert "".join(pieces) == text


@given(token_ids=st.lists(st.integers(3, 310), max_size=20))
def test_pieces_of_any_tokens_add_up_to_what_they_decode_to(codec, token_ids):
    """Bytes that are no UTF-8 included."""
    pieces, _ = run(codec, token_ids)
    assert "".join(pieces) == codec.decode(token_ids, skip_special_tokens=True)


def test_a_character_comes_when_its_bytes_are_all_there(codec):
    pieces, _ = run(codec, codec.encode("🙂"))
    assert pieces == ["", "", "", "🙂", ""]


def test_special_tokens_are_no_text(codec):
    pieces, _ = run(codec, [0, *codec.encode("fox"), 1])
    assert "".join(pieces) == "fox"


@given(
    text=st.text(alphabet="ab ", max_size=20),
    stop=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(codec, text, stop):
    pieces, stream = run(codec, codec.encode(text), stop)
    found = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    shown = "".join(pieces)
    assert stream.stopped == bool(found)
    if found:
        # The one that is complete first ends the text, and a token may complete two at once.
        assert text.startswith(shown)
        assert len(shown) <= min(found)[1]
        assert not any(each in shown for each in stop)
    else:
        assert shown == text


def test_what_may_become_a_stop_string_is_held_back(codec):
    stream = TextStream(codec, ["xyz"])
    out = [stream.push(token_id) for token_id in codec.encode("axybxyz")]
    assert out[:4] == ["a", "", "", "xyb"]
    assert "".join(out) == "axyb"
    assert stream.stopped
    assert stream.finish() == ""


def test_held_text_comes_at_the_end_when_it_became_none(codec):
    pieces, stream = run(codec, codec.encode("axy"), ["xyz"])
    assert "".join(pieces) == "axy"
    assert not stream.stopped


@pytest.mark.parametrize("stop", [["h", "e"], ["e", "h"]])
def test_of_two_stop_strings_in_one_token_the_first_in_the_text_ends_it(codec, stop):
    assert len(codec.encode("the")) == 1
    pieces, stream = run(codec, codec.encode("the"), stop)
    assert (pieces, stream.stopped) == (["t"], True)


def test_a_stop_string_may_come_with_the_bytes_that_never_became_a_character(codec):
    *cut, _ = codec.encode("a🙂")
    pieces, stream = run(codec, cut, ["\N{REPLACEMENT CHARACTER}"])
    assert ("".join(pieces), stream.stopped) == ("a", True)
    pieces, stream = run(codec, cut, ["a\N{REPLACEMENT CHARACTER}b"])
    assert ("".join(pieces), stream.stopped) == ("a\N{REPLACEMENT CHARACTER}", False)
