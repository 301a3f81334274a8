"""Whatever stands in the files, the reader returns or raises an AdapterError, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.fuzzing import FUZZ, mutations, values
from turret_adapters.errors import AdapterError
from turret_adapters.formats.fields import Use
from turret_adapters.formats.kinds import KINDS
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights, HostAdapter
from turret_adapters.spec import BaseSpec

Read: TypeAlias = Callable[[], HostAdapter | None]

METHODS = list(KINDS)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WORDS = st.sampled_from(
    ["q_proj", "down_proj", "all-linear", ".*", "layers", "(", "norm", "lm_head", "embed_tokens", "all"]
)
VALUES = values(WORDS)
NAMES = sorted({name for kind in KINDS.values() for name in kind.fields})
READ = sorted({name for kind in KINDS.values() for name, use in kind.fields.items() if use is Use.READ})


@pytest.fixture
def read(base: BaseSpec, weights: BaseWeights, tmp_path: Path) -> Read:
    """Reads the test's folder; None if it is refused."""

    def read() -> HostAdapter | None:
        with contextlib.suppress(AdapterError):
            return read_adapter(tmp_path, base, weights)
        return None

    return read


@pytest.mark.parametrize("method", METHODS)
@FUZZ
@given(data=st.data())
def test_mutated_tensor_files(
    method: str, data: st.DataObject, sound: dict[str, Any], read: Read, tmp_path: Path
) -> None:
    file = sound[method].write(tmp_path) / TENSORS
    file.write_bytes(data.draw(mutations(file.read_bytes())))
    read()


# What peft and transformers put into keys.
KEY_NAMES = st.sampled_from(
    [
        "default",
        "modules_to_save",
        "original_module",
        "token_adapter",
        "base_layer",
        "bias",
        "weight",
        "0",
        "trainable_tokens_delta",
        "lora_magnitude_vector",
        "lora_A",
        "ranknum",
        "experts",
        "w1",
        "mlp",
        "",
    ]
)


@st.composite
def renamed(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, some of them again or instead under keys with other names in them."""
    found = dict(tensors)
    for key in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=4, unique=True)):
        names = key.split(".")
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(names)))
            names[at : at + draw(st.integers(0, 1))] = [draw(KEY_NAMES)]
        tensor = found[key] if draw(st.booleans()) else found.pop(key, tensors[key])
        found[".".join(names)] = tensor.clone()
    return found


@pytest.mark.parametrize("method", METHODS)
@FUZZ
@given(data=st.data())
def test_keys_with_other_names(
    method: str, data: st.DataObject, sound: dict[str, Any], read: Read, tmp_path: Path
) -> None:
    files = dataclasses.replace(sound[method], tensors=data.draw(renamed(sound[method].tensors)))
    files.write(tmp_path)
    read()


@pytest.mark.parametrize("method", METHODS)
@FUZZ
@given(data=st.data())
def test_mutated_configs(
    method: str, data: st.DataObject, sound: dict[str, Any], read: Read, tmp_path: Path
) -> None:
    file = sound[method].write(tmp_path) / CONFIG
    file.write_bytes(data.draw(mutations(file.read_bytes())))
    read()


@pytest.mark.parametrize("method", METHODS)
@FUZZ
@given(fields=st.dictionaries(st.sampled_from(READ) | st.sampled_from(NAMES) | st.text(), VALUES, max_size=3))
def test_configs_with_any_values(
    method: str, fields: dict[str, Any], sound: dict[str, Any], read: Read, tmp_path: Path
) -> None:
    files = copy.copy(sound[method])
    file = files.write(tmp_path) / CONFIG
    file.write_text(json.dumps({**files.fields, **fields}))
    read()


@FUZZ
@given(value=VALUES)
def test_configs_of_any_json(value: Any, sound: dict[str, Any], read: Read, tmp_path: Path) -> None:
    (sound["LORA"].write(tmp_path) / CONFIG).write_text(json.dumps(value))
    assert read() is None


@st.composite
def near_headers(draw: st.DrawFn) -> bytes:
    """A file for one prompt tensor whose header is nearly right."""
    key = draw(st.sampled_from(["prompt_embeddings", "other"]))
    begin, end = draw(st.sampled_from([0, 0, 0, 4, 640])), draw(st.sampled_from([640, 640, 640, 320, 0]))
    entry = {
        "dtype": draw(st.sampled_from(["F32", "F32", "F16", "I32"])),
        "shape": draw(st.sampled_from([[5, 32], [5, 32], [160], [5, 32, 1], [0, 32]])),
        "data_offsets": [begin, end],
    }
    entry.update(draw(st.dictionaries(st.sampled_from(list(entry)), VALUES, max_size=1)))
    table = {key: entry}
    table.update(draw(st.dictionaries(st.sampled_from(["__metadata__", "b"]), VALUES, max_size=1)))
    head = json.dumps(table).encode() + b" " * draw(st.integers(0, 3))
    return struct.pack("<Q", len(head)) + head + bytes(draw(st.sampled_from([640, 640, 639, 641, 0])))


@FUZZ
@given(data=near_headers())
def test_what_is_read_is_what_the_library_reads(
    data: bytes, sound: dict[str, Any], read: Read, tmp_path: Path
) -> None:
    (sound["PROMPT_TUNING"].write(tmp_path) / TENSORS).write_bytes(data)
    found = read()
    if found is not None:
        assert found.prompt_embeddings is not None
        expected = safetensors.torch.load(data)
        torch.testing.assert_close(found.prompt_embeddings, expected["prompt_embeddings"], rtol=0, atol=0)
