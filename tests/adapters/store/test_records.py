"""What is written down of a revision comes back as it was, or not at all."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret_adapters.spec import (
    AdapterSpec,
    BaseSpec,
    HeadSpec,
    HeadTask,
    Method,
    ModuleKind,
    ModuleShape,
    Part,
    PrefixKind,
    PrefixSpec,
    Problem,
    RowGroup,
)
from turret_adapters.store import records
from turret_adapters.store.records import decode, encode, marks_of, reader_of, settled_marks_of

SPECS = st.builds(
    AdapterSpec,
    revision=st.text("0123456789abcdef", min_size=32, max_size=32),
    method=st.sampled_from(Method),
    rows=st.lists(
        st.builds(RowGroup, st.text(), st.sampled_from(Part), st.integers(0, 99), st.integers(1, 9999)),
        max_size=4,
    ).map(tuple),
    prefix=st.none()
    | st.builds(
        PrefixSpec,
        num_virtual_tokens=st.integers(1, 99),
        kind=st.sampled_from(PrefixKind),
        per_request=st.booleans(),
    ),
    max_rank=st.integers(0, 99),
    num_parameters=st.integers(0, 1 << 60),
    file_bytes=st.integers(0, 1 << 60),
    invocation_tokens=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    num_tasks=st.integers(0, 9),
    head=st.none()
    | st.builds(
        HeadSpec,
        task=st.sampled_from(HeadTask),
        labels=st.lists(st.text(), max_size=3).map(tuple),
        problem=st.sampled_from(Problem),
    ),
)


@given(SPECS)
def test_a_spec_comes_back_as_it_was(spec: AdapterSpec) -> None:
    assert decode(encode(spec)) == spec


@given(SPECS)
def test_what_is_written_down_does_not_depend_on_what_was_asked(spec: AdapterSpec) -> None:
    before = encode(spec)
    spec.num_slab_pages(9999)
    assert encode(spec) == before


@given(SPECS, st.data())
def test_a_corrupt_record_is_rejected_or_decodes_to_the_same_spec(
    spec: AdapterSpec, data: st.DataObject
) -> None:
    record = bytearray(encode(spec))
    at = data.draw(st.integers(0, len(record) - 1))
    record[at] ^= data.draw(st.integers(1, 255))
    # zlib's checksum: what comes back at all is what went in.
    assert decode(bytes(record)) in (None, spec)
    assert decode(bytes(record[:at])) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 100])
def test_what_another_wrote_is_no_spec(content: bytes) -> None:
    assert decode(content) is None


def test_equal_rows_are_one_object() -> None:
    rows = (RowGroup("m", Part.LORA_A, 8, 32),)
    spec = AdapterSpec(
        revision="1", method=Method.LORA, rows=rows, prefix=None, max_rank=8, num_parameters=1, file_bytes=1
    )
    one, two = (decode(encode(replace(spec, revision=revision))) for revision in "12")
    assert one
    assert two
    assert one.rows is two.rows


def test_a_reader_differs_by_every_property_of_the_base_and_by_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = ModuleShape(kind=ModuleKind.LINEAR, in_features=8, out_features=8)
    base = BaseSpec(
        name_or_path="b", hidden_size=8, num_layers=1, num_kv_heads=1, head_dim=8, modules={"m": shape}
    )
    others = {
        "name_or_path": "c",
        "hidden_size": 16,
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "modules": {"m": replace(shape, has_bias=True)},
        "tied": True,
        "left_out": ("vision_tower",),
        "is_encoder": True,
        "heads": {HeadTask.SEQ_CLS: {"score.weight": (0, 8)}},
        "head_weights": ("score.weight",),
        "head": HeadSpec(task=HeadTask.SEQ_CLS, labels=("a",)),
        "prefix": "model",
        "task_prefixes": ("bert",),
        "takes_prefix": False,
    }
    assert others.keys() == {field.name for field in fields(base)}
    found = [reader_of(base), *(reader_of(replace(base, **{name: value})) for name, value in others.items())]
    assert len(set(found)) == len(found)
    assert reader_of(replace(base)) == found[0]
    monkeypatch.setattr(records, "version", lambda _: "0.0.0")
    assert reader_of(base) not in found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"bytes")
    return tmp_path


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_change_of_either_file_shows(folder: Path, name: str) -> None:
    place, before = folder / name, marks_of(folder)
    assert marks_of(folder) == before
    times = place.stat()
    place.write_bytes(b"other")
    # As if it had not changed: the time of the last change of the file's own record cannot be set.
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert marks_of(folder) != before
    place.unlink()
    assert marks_of(folder) == ""


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "turret_tokenizer.json", "turret_labels.json"]
)
def test_a_file_that_may_be_missing_shows(folder: Path, name: str) -> None:
    before = marks_of(folder)
    (folder / name).write_bytes(b"bytes")
    assert marks_of(folder) not in (before, "")


def test_what_changed_a_moment_ago_is_not_settled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled_marks_of(folder) == ""
    monkeypatch.setattr(records, "SETTLED_SECONDS", -60.0)
    assert settled_marks_of(folder) == marks_of(folder)
