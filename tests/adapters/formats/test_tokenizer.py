"""The oracle is the tokenizer that transformers makes of the adapter's folder."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from support.tokenizers import TOKENIZERS, make_tokenizer
from turret_adapters.errors import (
    AdapterBaseError,
    AdapterError,
    AdapterFormatError,
    AdapterSourceError,
    SourceUnavailableError,
)
from turret_adapters.formats.tokenizer import (
    MAX_ADDED_TOKENS,
    MAX_TOKEN_CHARACTERS,
    BaseTokenizer,
    chat_template_of,
    check_rows,
    digest_of_template,
    digest_of_tokens,
)

WORDS = [
    "the",
    " fox",
    "quick ",
    "<|new|>",
    " <|new|> ",
    "<tool>",
    "</s>",
    "<s>",
    "é",
    "東",
    "\n",
    "jumps",
    "  ",
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for kind in TOKENIZERS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        make_tokenizer(kind).save_pretrained(folders[kind])
    return folders


def base_of(folder: Path) -> BaseTokenizer:
    return BaseTokenizer(AutoTokenizer.from_pretrained(folder), folder / "tokenizer.json")


@pytest.fixture(params=TOKENIZERS)
def base(request, bases) -> BaseTokenizer:
    return base_of(bases[request.param])


@pytest.fixture
def byte_level(bases, tmp_path) -> BaseTokenizer:
    """One base, whose tokenizer is in the test's folder."""
    base = base_of(bases["byte-level"])
    base.live.save_pretrained(tmp_path)
    return base


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """The base's tokenizer, as a trainer saves it beside an adapter."""
    base.live.save_pretrained(tmp_path)
    return tmp_path


def edit(file: Path, change) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def check_equal(base: BaseTokenizer, folder: Path) -> None:
    oracle = AutoTokenizer.from_pretrained(folder)
    own = base.changed(base.changes(folder))
    assert (own.bos_token_id, own.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    chance = random.Random(0)
    for _ in range(200):
        text = "".join(chance.choices(WORDS, k=chance.randrange(8)))
        token_ids = oracle.encode(text)
        assert own.backend_tokenizer.encode(text).ids == token_ids
        for skip in (True, False):
            found = own.backend_tokenizer.decode(token_ids, skip_special_tokens=skip)
            assert found == oracle.decode(token_ids, skip_special_tokens=skip)


def test_a_folder_without_a_tokenizer_changes_nothing(base, tmp_path):
    assert base.changes(tmp_path) == b""


def test_what_trainers_save_without_adding_tokens_changes_nothing(base, folder):
    assert base.changes(folder) == b""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.save_pretrained(folder)
    assert base.changes(folder) == b""


def test_added_tokens_are_tokenised_as_by_transformers(base, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", AddedToken("<|new|>", special=True)])
    tokenizer.save_pretrained(folder)
    check_equal(base, folder)


def test_other_special_tokens_are_those_of_transformers(base, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    tokenizer.save_pretrained(folder)
    check_equal(base, folder)


def test_a_chat_template_alone_is_kept_and_changes_no_tokens(base, folder):
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template="{{ messages }}"))
    changes = base.changes(folder)
    assert json.loads(changes) == {"tokens": None, "chat_template": "{{ messages }}"}
    assert digest_of_tokens(changes) == ""
    (folder / "chat_template.jinja").write_text("{{ tools }}")
    assert chat_template_of(base.changes(folder)) == "{{ tools }}"
    assert digest_of_template(base.changes(folder)) != digest_of_template(changes)
    assert (chat_template_of(b""), digest_of_template(b"")) == (None, "")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "{{ messages }}"),
        ("tokenizer_config.json", '{"chat_template": "{{ messages }}", "eos_token": "<other>"}'),
    ],
)
def test_a_chat_template_needs_no_tokenizer_beside_it(base, tmp_path, file, content):
    (tmp_path / file).write_text(content)
    assert json.loads(base.changes(tmp_path)) == {"tokens": None, "chat_template": "{{ messages }}"}


def test_files_beside_no_tokenizer_change_no_tokens(base, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<other>"}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<other>"}')
    assert base.changes(tmp_path) == b""


def test_chat_templates_with_names_are_kept_by_their_names(base, folder):
    named = [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "{{ tools }}"},
        {"name": "broken", "template": 1},
        "nothing",
    ]
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    found = chat_template_of(base.changes(folder))
    assert found == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


def test_a_digest_of_tokens_knows_no_template(base, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    digest = digest_of_tokens(base.changes(folder))
    assert len(digest) == 64
    (folder / "chat_template.jinja").write_text("{{ tools }}")
    assert digest_of_tokens(base.changes(folder)) == digest
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    assert digest_of_tokens(base.changes(folder)) not in ("", digest)


def added(values: str | dict, base: BaseTokenizer, folder: Path) -> bytes:
    """The changes of a tokenizer with another token, or other special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if isinstance(values, str):
        tokenizer.add_tokens([values])
    else:
        tokenizer.add_special_tokens(values)
    tokenizer.save_pretrained(folder)
    return base.changes(folder)


@pytest.mark.parametrize("values", ["<tool>", {"eos_token": "<|end|>"}])
def test_a_token_needs_a_row(base, folder, values):
    changes = added(values, base, folder)
    check_rows(changes, len(base.live) + 1)
    with pytest.raises(AdapterBaseError, match=rf"below {len(base.live)}, .* with id {len(base.live)} \("):
        check_rows(changes, len(base.live))


def test_tokens_that_are_in_no_prompt_or_the_bases_need_no_row(base, folder):
    check_rows(base.changes(folder), 0)
    check_rows(added({"eos_token": "the"}, base, folder), 0)
    check_rows(added({"pad_token": "[PAD]"}, base, folder), 0)


def test_a_frame_of_special_tokens_is_that_of_transformers(base, folder):
    end = base.live.eos_token_id
    frame = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = frame
    tokenizer.save(str(folder / "tokenizer.json"))
    check_equal(base, folder)


def test_a_frame_that_is_left_out_is_left_out(tmp_path):
    live = make_tokenizer()
    start = live.bos_token_id
    live.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    live.save_pretrained(tmp_path / "base")
    base = base_of(tmp_path / "base")
    assert base.live.encode("the")[0] == start
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    own = base.changed(base.changes(tmp_path / "adapter"))
    assert own.backend_tokenizer.encode("the").ids[0] != start


def test_files_of_older_versions_are_read(bases, tmp_path):
    """transformers 4 wrote a map of special tokens, tokens with flags, and merges as strings."""
    base = base_of(bases["byte-level"])
    tokenizer = AutoTokenizer.from_pretrained(bases["byte-level"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path)

    def write_old(values: dict) -> None:
        values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]
        del values["model"]["ignore_merges"]

    edit(tmp_path / "tokenizer.json", write_old)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    (tmp_path / "tokenizer_config.json").unlink()
    own = base.changed(base.changes(tmp_path))
    assert own.backend_tokenizer.token_to_id("<tool>") == len(base.live)
    assert own.eos_token_id == base.live.convert_tokens_to_ids("<pad>")


def test_a_tokenizer_without_configuration_has_the_special_tokens_of_the_base(bases, tmp_path):
    base = base_of(bases["byte-level"])
    shutil.copy(bases["byte-level"] / "tokenizer.json", tmp_path)
    assert base.changes(tmp_path) == b""


def test_a_base_that_transformers_writes_otherwise_than_its_file_knows_both(bases, tmp_path):
    """The file is what older adapters were saved with, and what transformers writes is what new ones are."""
    base = base_of(bases["byte-level"])
    live = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(base.live.backend_tokenizer.to_str()))
    live.backend_tokenizer.normalizer = normalizers.NFC()
    live.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    both = BaseTokenizer(live, bases["byte-level"] / "tokenizer.json")
    assert both.changes(bases["byte-level"]) == b""
    live.save_pretrained(tmp_path)
    assert both.changes(tmp_path) == b""
    with pytest.raises(AdapterBaseError, match="'normalizer'"):
        base.changes(tmp_path)


def test_a_base_whose_file_was_deleted_since_the_start_is_known_by_what_was_read(byte_level, tmp_path):
    base = BaseTokenizer(byte_level.live, tmp_path / "deleted.json")
    assert base.changes(tmp_path) == b""


def set_id(values: dict) -> None:
    values["added_tokens"].append(dict(values["added_tokens"][0], id=9999, content="<far>"))


def set_long_token(values: dict) -> None:
    content = "x" * (MAX_TOKEN_CHARACTERS + 1)
    values["added_tokens"].append(dict(values["added_tokens"][0], id=9999, content=content))


def set_frame(values: dict) -> None:
    ids = {"id": "</s>", "ids": [1] * 10_000, "tokens": ["</s>"] * 10_000}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": ids},
    }


def test_special_tokens_that_have_names_of_their_own_are_those_of_transformers(base, folder):
    names = {"extra_special_tokens": {"image_token": "<image>"}}
    edit(folder / "tokenizer_config.json", lambda config: config.update(names))
    check_equal(base, folder)


def set_many_tokens(values: dict) -> None:
    first = values["added_tokens"][0]
    more = [dict(first, id=1000 + index, content=f"<{index}>") for index in range(MAX_ADDED_TOKENS + 1)]
    values["added_tokens"] += more


def set_text_twice(values: dict) -> None:
    set_frame(values)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    values["post_processor"] |= {"single": [text, text], "special_tokens": {}}


def set_no_text(values: dict) -> None:
    set_frame(values)
    values["post_processor"] |= {"single": [], "special_tokens": {}}


def set_text_lost(values: dict) -> None:
    """The second template gets one part of a text without special tokens, and two with them."""
    set_frame(values)
    frame = values["post_processor"]
    special = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    frame["special_tokens"]["</s>"] |= {"ids": [1], "tokens": ["</s>"]}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    templates = [frame | {"single": [text, special]}, frame | {"single": []}]
    values["post_processor"] = {"type": "Sequence", "processors": templates}


def set_far_frame(values: dict) -> None:
    set_frame(values)
    values["post_processor"]["special_tokens"]["</s>"] |= {"ids": [4_000_000_000], "tokens": ["</s>"]}


def set_unknown_flag(values: dict) -> None:
    values["added_tokens"].append(dict(values["added_tokens"][0], id=9999, content="<far>", forged=1))


def set_slow_pattern(values: dict) -> None:
    """It takes minutes to compile."""
    values["normalizer"] = {"type": "Replace", "pattern": {"Regex": f"(?i:{'ß' * 40_000})"}, "content": ""}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda values: values["model"]["vocab"].update(more=5000), AdapterBaseError, "vocabulary"),
        (lambda values: values.update(normalizer={"type": "Lowercase"}), AdapterBaseError, "'normalizer'"),
        (lambda values: values.update(pre_tokenizer=None), AdapterBaseError, "'pre_tokenizer'"),
        (lambda values: values.update(decoder=None), AdapterBaseError, "'decoder'"),
        (lambda values: values.update(decoder={"type": "New"}), AdapterFormatError, "expected a tokenizer"),
        (set_id, AdapterFormatError, "'<far>' with id 9999"),
        (set_long_token, AdapterFormatError, "513 characters"),
        (set_frame, AdapterFormatError, "post-processor of"),
        (set_text_twice, AdapterFormatError, "a frame that makes"),
        (set_no_text, AdapterFormatError, "a frame that makes 0 tokens"),
        (set_text_lost, AdapterFormatError, "a frame that changes a text"),
        (set_far_frame, AdapterFormatError, "a frame with token 4000000000"),
        (set_unknown_flag, AdapterFormatError, "'forged', which is unknown"),
        (set_many_tokens, AdapterFormatError, "at most 16384 are allowed"),
        (set_slow_pattern, AdapterFormatError, "too much time or memory"),
        (lambda values: values.update(decoder=["x" * 100] * 100_000), AdapterFormatError, "bytes beside"),
        (lambda values: values.update(added_tokens=[{"id": 0}]), AdapterFormatError, "content"),
        (lambda values: values.update(added_tokens=7), AdapterFormatError, "expected a tokenizer"),
        (lambda values: values.pop("model"), AdapterFormatError, "model"),
    ],
    ids=[
        "vocabulary", "normalizer", "pre-tokenizer", "decoder", "unheard", "id",
        "long", "frame", "twice", "none", "lost", "far", "unknown", "many",
        "slow", "large", "no-text",
        "no-list", "no-model",
    ],
)  # fmt: skip
def test_another_tokenizer_is_refused_with_what_to_do(byte_level, tmp_path, change, error, message):
    edit(tmp_path / "tokenizer.json", change)
    with pytest.raises(error, match=message) as found:
        byte_level.changes(tmp_path)
    assert "delete the tokenizer's files" in str(found.value)


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"7", b"[" * 100_000, b'{"model": ' * 5000])
def test_a_file_that_is_no_tokenizer_is_refused(bases, tmp_path, text):
    base = base_of(bases["byte-level"])
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(AdapterError, match="expected a tokenizer"):
        base.changes(tmp_path)


def test_special_tokens_of_the_configuration_are_bounded(byte_level, tmp_path):
    many = [f"<{index}>" for index in range(MAX_ADDED_TOKENS + 1)]
    edit(tmp_path / "tokenizer_config.json", lambda config: config.update(extra_special_tokens=many))
    with pytest.raises(AdapterFormatError, match="added tokens; at most 16384 are allowed"):
        byte_level.changes(tmp_path)


def test_an_interrupt_ends_a_slow_reading_and_those_that_wait(byte_level, tmp_path, monkeypatch):
    edit(tmp_path / "tokenizer.json", set_slow_pattern)
    start, is_slow, processes, errors = subprocess.Popen, threading.Event(), [], []

    def started(program: list[str], **options):
        processes.append(start(program, **options))
        if "canonical" in program:
            is_slow.set()
        return processes[-1]

    def read() -> None:
        with pytest.raises(AdapterError) as found:
            byte_level.changes(tmp_path)
        errors.append(found.type)

    monkeypatch.setattr(subprocess, "Popen", started)
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert is_slow.wait(60)
    byte_level.interrupt()
    for thread in threads:
        thread.join()
    assert errors == [SourceUnavailableError] * 2
    assert all(process.returncode is not None for process in processes)


def test_code_in_a_tokenizers_folder_is_not_run(byte_level, tmp_path):
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    auto = {"AutoTokenizer": ["own.Own", None]}
    edit(
        tmp_path / "tokenizer_config.json", lambda config: config.update(auto_map=auto, tokenizer_class="Own")
    )
    assert byte_level.changes(tmp_path) == b""


@pytest.mark.parametrize("depth", [100, 900, 960, 980, 990, 2000])
@pytest.mark.parametrize("name", ["added_tokens", "post_processor"])
def test_nested_sections_are_refused_where_only_the_readers_process_parses_them(
    byte_level, tmp_path, name, depth
):
    values = json.loads((tmp_path / "tokenizer.json").read_text()) | {name: "HERE"}
    text = json.dumps(values).replace('"HERE"', "[" * depth + "]" * depth)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(AdapterFormatError, match="expected a tokenizer"):
        byte_level.changes(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_refused(byte_level, tmp_path):
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(AdapterSourceError, match="readable file, found is a directory"):
        byte_level.changes(tmp_path)


def test_a_link_out_of_the_folder_is_refused(bases, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(bases["byte-level"] / "tokenizer.json")
    with pytest.raises(AdapterSourceError, match="symbolic link"):
        base_of(bases["byte-level"]).changes(tmp_path)
