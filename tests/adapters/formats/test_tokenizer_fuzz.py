"""Whatever stands in a tokenizer's files, they are refused with an AdapterError, or tokenise every text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from support.fuzzing import FUZZ, edited, mutations, values
from support.tokenizers import TOKENIZERS, VOCAB_SIZE, make_tokenizer
from turret_adapters.errors import AdapterBaseError, AdapterError, AdapterFormatError
from turret_adapters.formats import split_tokenizer
from turret_adapters.formats.files import TOKENIZER_FILES
from turret_adapters.formats.tokenizer import (
    MAX_FRAME_TOKENS,
    BaseTokenizer,
    _Reader,
    check_rows,
    digest_of_tokens,
)
from turret_server.serving.codec import TextCodec

MANY = settings(FUZZ, max_examples=100)
KINDS = [kind if kind == "byte-level" else pytest.param(kind, marks=pytest.mark.slow) for kind in TOKENIZERS]
VALUES = values(
    st.sampled_from(
        [
            "ByteLevel", "Sequence", "TemplateProcessing", "RobertaProcessing", "BertProcessing", "Strip",
            "type", "id", "ids", "tokens", "content", "special", "processors", "single", "pair", "sep", "cls",
            "A", "B", "<s>", "</s>", "<tool>", "the", "Ġ", "▁",
        ]
    )
)  # fmt: skip
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TEXTS = ["", "the fox", "  é東\n", "<s></s> <tool><tool>", "\0\U0010ffff", "the " * 200]


class Here(_Reader):
    """Reads in this process, which is a hundred times faster."""

    def read(self, how: str, text: bytes) -> Any:
        try:
            found = (
                split_tokenizer.split(text)
                if how == "split"
                else split_tokenizer.canonical(*json.loads(text))
            )
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise AdapterFormatError("not read") from error
        return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseTokenizer]:
    found = {}
    for kind in TOKENIZERS:
        folder = tmp_path_factory.mktemp(kind)
        make_tokenizer(kind).save_pretrained(folder)
        base = BaseTokenizer(AutoTokenizer.from_pretrained(folder), folder / TOKENIZER_FILES[0])
        base._reader = Here()
        found[kind] = base
    return found


@pytest.fixture(scope="module")
def sound(
    bases: dict[str, BaseTokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """The files of tokenizers with an added token, a frame and a chat template."""
    found = {}
    for kind, base in bases.items():
        folder = tmp_path_factory.mktemp(f"own-{kind}")
        tokenizer = AutoTokenizer.from_pretrained(base._file.parent)
        tokenizer.add_tokens(["<tool>"])
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        tokenizer.save_pretrained(folder)
        (folder / TOKENIZER_FILES[2]).write_text(json.dumps({"eos_token": {"content": "</s>"}}))
        found[kind] = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES}
    return found


def check(base: BaseTokenizer, files: dict[str, bytes], folder: Path) -> Tokenizer | None:
    """The tokenizer of the files, which tokenises every text; None if they are refused."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        changes = base.changes(folder)
        if not digest_of_tokens(changes):
            return base.live.backend_tokenizer
        own = base.changed(changes)
    except AdapterError:
        return None
    backend = own.backend_tokenizer
    size = backend.get_vocab_size()
    check_rows(changes, size)
    codec = TextCodec(own)
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    for text in [*TEXTS, *added, "x".join(added)]:
        plain, framed = (codec.encode(text, 1 << 20, add_special_tokens=each) for each in (False, True))
        assert max([*plain, *framed], default=0) < size
        # The codec leaves out a second beginning.
        assert len(plain) - 1 <= len(framed) <= len(plain) + MAX_FRAME_TOKENS
        codec.decode(framed)
    return backend


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_sound_files_are_accepted(kind, bases, sound, tmp_path):
    assert check(bases[kind], sound[kind], tmp_path)
    changes = bases[kind].changes(tmp_path)
    with pytest.raises(AdapterBaseError, match="<tool>"):
        check_rows(changes, len(bases[kind].live))


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(data=st.data())
def test_mutated_files(kind, name, data, bases, sound, tmp_path):
    check(bases[kind], sound[kind] | {name: data.draw(mutations(sound[kind][name]))}, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(data=st.data())
def test_sections_with_any_values(kind, data, bases, sound, tmp_path):
    name = data.draw(st.sampled_from([*split_tokenizer.SECTIONS, "model"]))
    section = json.loads(sound[kind][TOKENIZER_FILES[0]])[name]
    check(bases[kind], with_section(sound[kind], name, data.draw(edited(section, VALUES))), tmp_path)


def with_section(files: dict[str, bytes], name: str, section: Any) -> dict[str, bytes]:
    tokenizer = json.loads(files[TOKENIZER_FILES[0]]) | {name: section}
    return files | {TOKENIZER_FILES[0]: json.dumps(tokenizer).encode()}


# Numbers of tokens: of the base's, the last of an adapter's, and those that are none.
NUMBERS = st.sampled_from([0, 1, 5, VOCAB_SIZE - 1, VOCAB_SIZE, VOCAB_SIZE + 1, 4_000_000_000])
TEXT, SECOND = ({"Sequence": {"id": each, "type_id": 0}} for each in "AB")
PIECES = st.lists(st.sampled_from([TEXT, {"SpecialToken": {"id": "<s>", "type_id": 0}}]), max_size=3)


@st.composite
def templates(draw: st.DrawFn) -> dict[str, Any]:
    ids = draw(st.lists(NUMBERS, min_size=1, max_size=3))
    special = {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}
    return {
        "type": "TemplateProcessing",
        "single": draw(PIECES),
        "pair": [TEXT, SECOND],
        "special_tokens": {"<s>": special},
    }


PROCESSORS = templates() | st.builds(
    lambda kind, sep, cls: {
        "type": kind,
        "sep": ["</s>", sep],
        "cls": ["<s>", cls],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
    st.sampled_from(["RobertaProcessing", "BertProcessing"]),
    NUMBERS,
    NUMBERS,
)
FRAMES = PROCESSORS | st.builds(
    lambda processors: {"type": "Sequence", "processors": processors}, st.lists(PROCESSORS, max_size=3)
)


@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(frame=FRAMES)
def test_frames(kind, frame, bases, sound, tmp_path):
    check(bases[kind], with_section(sound[kind], "post_processor", frame), tmp_path)


TOKENS = st.builds(
    lambda content, flags: dict(zip(FLAGS, flags, strict=True)) | {"content": content},
    st.sampled_from(["<tool>", "<s>", "the", "fox", " ", "é", "\n", "x" * 512, "x" * 513, ""]),
    st.tuples(*[st.booleans()] * len(FLAGS)),
)


@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(tokens=st.lists(TOKENS, max_size=4), data=st.data())
def test_added_tokens(kind, tokens, data, bases, sound, tmp_path):
    base = bases[kind].live
    known, next_id = base.get_added_vocab(), len(base)
    listed = json.loads(sound[kind][TOKENIZER_FILES[0]])["added_tokens"][: len(known)]
    for token in tokens:
        of_base = base.convert_tokens_to_ids(token["content"])
        token_id = data.draw(st.sampled_from([next_id, next_id, next_id, of_base or 0, 0, 9999]))
        next_id += token_id == next_id
        listed.append(token | {"id": token_id})
    own = check(bases[kind], with_section(sound[kind], "added_tokens", listed), tmp_path)
    assert own is None or all(own.token_to_id(token["content"]) == token["id"] for token in listed)


@pytest.mark.parametrize("name", TOKENIZER_FILES[1:3])
@FUZZ
@given(data=st.data())
def test_configurations_with_any_values(name, data, bases, sound, tmp_path):
    files = sound["byte-level"]
    names = st.sampled_from(["bos_token", "eos_token", "pad_token", "extra_special_tokens", "chat_template"])
    values = json.loads(files[name]) | data.draw(st.dictionaries(names, VALUES))
    check(bases["byte-level"], files | {name: json.dumps(values).encode()}, tmp_path)
