"""Every adapter whose files are broken, or whose tensors are not served, is refused by name."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.refusals import NO_WEIGHTS, refused
from turret_adapters.errors import AdapterBaseError, AdapterError, AdapterFormatError, AdapterSourceError
from turret_adapters.formats import peft
from turret_adapters.formats.files import MAX_CONFIG_BYTES, MAX_TENSORS_BYTES
from turret_adapters.formats.peft import read_adapter
from turret_adapters.formats.tensors import MAX_HEADER_BYTES
from turret_adapters.spec import BaseSpec

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({key: torch.zeros(shape, dtype=dtype)})


def poison(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[key].view(-1)[-1:].fill_(value) and None


TENSORS: list[tuple[str, Callable[[Any], Any], type[AdapterError], tuple[str, ...]]] = [
    # Keys that nothing consumes.
    (
        "LORA",
        rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_A.mine.weight"),
        AdapterFormatError,
        ("q_proj.lora_A.mine.weight",),
    ),
    (
        "LORA",
        put(f"{Q0}.lora_A.default.weight", 4, 32),
        AdapterFormatError,
        ("q_proj.lora_A.weight", "the same numbers under each of its keys"),
    ),
    ("LORA", put(f"{Q0}.lora_magnitude_vector", 48), AdapterFormatError, ("lora_magnitude_vector",)),
    ("LORA", put(f"{Q0}.lora_B.bias", 48), AdapterFormatError, ("q_proj.lora_B.bias",)),
    ("LORA", put("base_model.model.lm_head.bias", 61), AdapterFormatError, ("lm_head.bias",)),
    ("LORA", put("prompt_embeddings", 5, 32), AdapterFormatError, ("prompt_embeddings",)),
    ("LORA", put("a" * 5000, 1), AdapterFormatError, ("aaa...aaa",)),
    ("PREFIX_TUNING", put("base_model.x", 1), AdapterFormatError, ("base_model.x",)),
    ("PROMPT_TUNING", put("prefix_task_cols", 1), AdapterFormatError, ("prefix_task_cols",)),
    # Modules.
    (
        "LORA",
        put("base_model.model.transformer.h.0.c_attn.lora_A.weight", 4, 32),
        AdapterBaseError,
        ("transformer.h.0.c_attn", "tiny-llama"),
    ),
    # A key that is not under the base's model does not name a module of it.
    ("LORA", put("transformer.c_attn.lora_A.weight", 4, 32), AdapterFormatError, ("only tensors of the",)),
    (
        "LORA",
        put(f"{Q0.replace('q_proj', 'k_proj')}.lora_A.weight", 4, 32),
        AdapterFormatError,
        ("k_proj.lora_A.weight", "targets"),
    ),
    ("LORA", lambda t: t.pop(f"{Q0}.lora_A.weight"), AdapterFormatError, (f"{Q0}.lora_A.weight",)),
    ("LORA", lambda t: t.pop(f"{Q0}.lora_B.weight"), AdapterFormatError, (f"{Q0}.lora_B.weight",)),
    # 3 layers of 2 modules have a pair each; the copies of the embedding and the head are optional.
    (
        "LORA",
        lambda t: t.clear(),
        AdapterFormatError,
        ("0.mlp.down_proj.lora_A.weight", "expected 12 tensors", "this and 11 others"),
    ),
    ("PREFIX_TUNING", lambda t: t.clear(), AdapterFormatError, ("prompt_embeddings",)),
    # Shapes.
    (
        "LORA",
        put(f"{Q0}.lora_A.weight", 6, 32),
        AdapterFormatError,
        ("q_proj.lora_A.weight", "[4, 32]", "[6, 32]"),
    ),
    (
        "LORA",
        put(f"{Q0}.lora_B.weight", 48, 6),
        AdapterFormatError,
        ("q_proj.lora_B.weight", "[48, 4]", "[48, 6]"),
    ),
    ("LORA", put(f"{Q0}.lora_A.weight", 4, 31), AdapterBaseError, ("[4, 32]", "[4, 31]")),
    ("LORA", put(f"{Q0}.lora_B.weight", 32, 4), AdapterBaseError, ("[48, 4]", "[32, 4]")),
    ("LORA", put(f"{Q0}.lora_A.weight", 128), AdapterFormatError, ("[4, 32]", "[128]")),
    ("LORA", put(f"{Q0}.lora_A.weight", 4, 32, 1), AdapterFormatError, ("[4, 32]", "[4, 32, 1]")),
    ("LORA", put(f"{Q0}.lora_A.weight", 0, 32), AdapterFormatError, ("[4, 32]", "[0, 32]")),
    # The base's width is named before the config's rank, since the config may be right.
    ("LORA", put(f"{Q0}.lora_A.weight", 6, 31), AdapterBaseError, ("[6, 31]", "where 32 is a width")),
    ("LORA", put(f"{Q0}.lora_A.weight", 6, 32), AdapterFormatError, ("where 4 is what adapter_config.json",)),
    ("PREFIX_TUNING", put("prompt_embeddings", 5, 288), AdapterBaseError, ("[5, 144]", "[5, 288]")),
    ("PREFIX_TUNING", put("prompt_embeddings", 6, 144), AdapterFormatError, ("[5, 144]", "[6, 144]")),
    ("PROMPT_TUNING", put("prompt_embeddings", 5, 33), AdapterBaseError, ("[5, 32]", "[5, 33]")),
    ("P_TUNING", put("prompt_embeddings", 10, 32), AdapterFormatError, ("[5, 32]", "[10, 32]")),
    ("MULTITASK_PROMPT_TUNING", put("prefix_task_rows", 3, 2, 33), AdapterBaseError, ("[3, 2, 32]",)),
    ("MULTITASK_PROMPT_TUNING", put("prefix_task_rows", 2, 2, 32), AdapterFormatError, ("[3, 2, 32]",)),
    ("MULTITASK_PROMPT_TUNING", put("prefix_task_cols", 3, 5, 3), AdapterFormatError, ("[3, 5, 2]",)),
    (
        "MULTITASK_PROMPT_TUNING",
        lambda t: t.pop("prefix_task_cols"),
        AdapterFormatError,
        ("prefix_task_cols",),
    ),
    ("IA3", put(f"{Q0}.ia3_l", 1, 32), AdapterBaseError, ("[48, 1]", "[1, 32]")),
    ("IA3", put(f"{Q0}.ia3_l", 48), AdapterFormatError, ("[48, 1]", "[48]")),
    ("IA3", put("base_model.model.transformer.h.0.c_attn.ia3_l", 9, 1), AdapterBaseError, ("h.0.c_attn",)),
    ("ADALORA", put(f"{Q0}.lora_E", 3, 1), AdapterFormatError, ("[4, 1]", "[3, 1]")),
    ("ADALORA", put(f"{Q0}.ranknum", 1), AdapterFormatError, ("ranknum",)),
    ("VERA", put("base_model.vera_A", 4, 32), AdapterBaseError, ("[4, 40]", "[4, 32]")),
    ("VERA", put("base_model.vera_B", 48, 5), AdapterFormatError, ("[48, 4]", "[48, 5]")),
    ("VERA", lambda t: t.pop("base_model.vera_A"), AdapterFormatError, ("base_model.vera_A",)),
    ("VERA", put(f"{Q0}.vera_lambda_d", 5), AdapterFormatError, ("[4]", "[5]")),
    (
        "LN_TUNING",
        put("base_model.model.model.norm.ln_tuning_layers.bias", 32),
        AdapterFormatError,
        ("bias",),
    ),
    (
        "LN_TUNING",
        put("base_model.model.model.norm.ln_tuning_layers.weight", 33),
        AdapterBaseError,
        ("[33]",),
    ),
    # Numbers.
    *[
        (
            "LORA",
            put(f"{Q0}.lora_A.weight", 4, 32, dtype=dtype),
            AdapterFormatError,
            ("q_proj.lora_A.weight", "F32, F16, BF16", name),
        )
        for dtype, name in [
            (torch.float64, "F64"),
            (torch.int8, "I8"),
            (torch.uint8, "U8"),
            (torch.float8_e4m3fn, "F8_E4M3"),
            (torch.bool, "BOOL"),
        ]
    ],
    *[
        (method, poison(key, value), AdapterFormatError, (key, "NaN"))
        for method, key in [("LORA", f"{Q0}.lora_B.weight"), ("PREFIX_TUNING", "prompt_embeddings")]
        for value in (math.nan, math.inf, -math.inf)
    ],
]


@pytest.mark.parametrize(("method", "change", "error", "parts"), TENSORS)
def test_a_tensor_that_is_not_served(
    *,
    method: str,
    change: Callable[[Any], Any],
    error: type[AdapterError],
    parts: tuple[str, ...],
    sound: dict[str, Any],
    base: BaseSpec,
    tmp_path: Path,
) -> None:
    change(sound[method].tensors)
    refused(sound[method].write(tmp_path), base, error, *parts)


def test_many_unexpected_tensors_are_counted(sound: dict[str, Any], base: BaseSpec, tmp_path: Path) -> None:
    """Under another name than peft's default."""
    files = sound["LORA"]
    for key in list(files.tensors):
        files.tensors[key.replace(".weight", ".mine.weight")] = files.tensors.pop(key)
    refused(
        files.write(tmp_path),
        base,
        AdapterFormatError,
        "found 12 others, 3 of them like 'base_model.model.model.layers.*.mlp.down_proj.lora_A.mine.weight'",
    )


def test_a_rank_of_a_pattern_that_the_tensor_lacks(
    sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    sound["LORA"].fields["rank_pattern"] = {r"layers\.1\..*q_proj": 7}
    refused(
        sound["LORA"].write(tmp_path),
        base,
        AdapterFormatError,
        "model.layers.1.self_attn.q_proj.lora_A.weight",
        "[7, 32]",
        "[4, 32]",
    )


TARGETS = b'"target_modules": ["q_proj", "down_proj"]'
CONFIGS: list[tuple[str, bytes, str]] = [
    ("empty", b"", "invalid JSON"),
    ("garbage", b"\x00\xff\xfe", "invalid JSON"),
    ("utf-16", '{"peft_type": "LORA"}'.encode("utf-16"), "invalid JSON"),
    ("an array", b"[1]", "[1]"),
    ("null", b"null", "None"),
    ("cut", b'{"peft_type": "LORA"', "invalid JSON"),
    ("deep", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
    ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too deeply"),
    ("deep but parsed", b'{"peft_type": ' + b"[" * 500 + b"]" * 500 + b"}", "peft_type"),
    ("NaN", b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN, ' + TARGETS + b"}", "NaN"),
    ("infinite", b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999, ' + TARGETS + b"}", "lora_alpha"),
    ("longest integer", b'{"peft_type": "LORA", "r": 1' + b"0" * 5000 + b"}", "invalid JSON"),
    (
        "long integer",
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1' + b"0" * 4000 + b", " + TARGETS + b"}",
        "lora_alpha",
    ),
    ("twice", b'{"peft_type": "LORA", "r": 4, "r": 4, ' + TARGETS + b"}", "'r' is repeated"),
    ("lone surrogate", b'{"peft_type": "LO\\ud800RA"}', "LO\\ud800RA"),
]


@pytest.mark.parametrize(("data", "part"), [row[1:] for row in CONFIGS], ids=[row[0] for row in CONFIGS])
def test_a_config_that_is_broken(
    data: bytes, part: str, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    (sound["LORA"].write(tmp_path) / "adapter_config.json").write_bytes(data)
    message = refused(tmp_path, base, AdapterFormatError, "adapter_config.json", part)
    message.encode()


def test_a_config_that_is_too_large(sound: dict[str, Any], base: BaseSpec, tmp_path: Path) -> None:
    config = sound["LORA"].write(tmp_path) / "adapter_config.json"
    config.write_bytes(config.read_bytes().ljust(MAX_CONFIG_BYTES))
    read_adapter(tmp_path, base, NO_WEIGHTS)
    config.write_bytes(config.read_bytes() + b" ")
    refused(tmp_path, base, AdapterSourceError, "adapter_config.json", str(MAX_CONFIG_BYTES))


def header(table: Any, body: bytes = b"") -> bytes:
    data = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(data)) + data + body


def entry(begin: int, end: int, shape: Any = (5, 32), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


# The one key of a PROMPT_TUNING file: but for what its row says, each of these would be served.
P = "prompt_embeddings"
FULL = bytes(640)
TWICE = b'{"%s": %s, "%s": %s}' % ((P.encode(), json.dumps(entry(0, 640)).encode()) * 2)
LARGE = json.dumps({P: entry(0, 640)}).encode().ljust(MAX_HEADER_BYTES + 1)
PARTS = "its dtype, shape and data_offsets"
BROKEN: list[tuple[str, bytes, str]] = [
    ("empty", b"", "header of at most"),
    ("cut in its length", b"\x10\x00", "header of at most"),
    ("garbage", b"\xff" * 64, "header of at most"),
    ("header longer than the file", struct.pack("<Q", 100) + b"{}", "header of at most 2 "),
    ("header longer than allowed", header(LARGE, FULL), f"header of at most {MAX_HEADER_BYTES}"),
    ("header is no JSON", header(b"{'a'"), "invalid JSON"),
    ("header is an array", header(b"[]"), "[]"),
    ("header is UTF-16", header(json.dumps({P: entry(0, 640)}).encode("utf-16"), FULL), "invalid JSON"),
    ("header is deep", header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "too deeply"),
    ("key stands twice", header(TWICE, FULL), f"{P!r} is repeated"),
    ("metadata is a list", header({"__metadata__": [1], P: entry(0, 640)}, FULL), "__metadata__"),
    ("metadata holds numbers", header({"__metadata__": {"a": 1}, P: entry(0, 640)}, FULL), "__metadata__"),
    (
        "metadata holds a number",
        header({"__metadata__": {"a": "x", "b": 1}, P: entry(0, 640)}, FULL),
        "__metadata__",
    ),
    ("entry is a number", header({P: 3}, FULL), PARTS),
    ("entry without offsets", header({P: {"dtype": "F32", "shape": [5, 32]}}, FULL), PARTS),
    ("entry with more", header({P: entry(0, 640, strides=[32, 1])}, FULL), PARTS),
    ("dtype is a list", header({P: entry(0, 640, dtype=["F32"])}, FULL), "['F32']"),
    ("negative dimensions", header({P: entry(0, 640, shape=[-5, -32])}, FULL), PARTS),
    ("true as a dimension", header({P: entry(0, 640, shape=[5, 32, True])}, FULL), PARTS),
    ("float as a dimension", header({P: entry(0, 640, shape=[5.0, 32])}, FULL), PARTS),
    ("huge dimension", header({P: entry(0, 4, shape=[10**4000])}, bytes(4)), PARTS),
    ("overflowing shape", header({P: entry(0, 0, shape=[2**32, 2**32])}), f"{2**66} bytes"),
    ("many dimensions", header({P: entry(0, 640, shape=[5, 32, *[1] * 7])}, FULL), PARTS),
    (
        "as many dimensions as allowed",
        header({P: entry(0, 640, shape=[5, 32, *[1] * 6])}, FULL),
        "expected shape",
    ),
    ("reversed offsets", header({P: entry(640, 0)}, FULL), "640 bytes for F32"),
    ("negative offset", header({P: entry(-640, 0)}, FULL), PARTS),
    ("offsets too near", header({P: entry(0, 639)}, FULL[1:]), "640 bytes for F32"),
    ("offsets too far", header({P: entry(0, 641)}, FULL), "640 bytes for F32"),
    ("overlap", header({P: entry(0, 640), "b": entry(320, 960)}, bytes(960)), "'b': expected its bytes"),
    ("same bytes", header({P: entry(0, 640), "b": entry(0, 640)}, FULL), "'b': expected its bytes"),
    ("hole", header({P: entry(0, 640), "b": entry(644, 1284)}, bytes(1284)), "'b': expected its bytes"),
    ("hole in front", header({P: entry(4, 644)}, bytes(644)), "begin at 0, found 4"),
    ("bytes after the end", header({P: entry(0, 640)}, bytes(641)), "640 bytes of tensors"),
    ("bytes missing", header({P: entry(0, 640)}, bytes(639)), "640 bytes of tensors"),
]


@pytest.mark.parametrize(("data", "part"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_tensor_file_that_is_broken(
    data: bytes, part: str, sound: dict[str, Any], base: BaseSpec, tmp_path: Path
) -> None:
    file = sound["PROMPT_TUNING"].write(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(header({P: entry(0, 640)}, FULL))
    read_adapter(tmp_path, base, NO_WEIGHTS)
    file.write_bytes(data)
    refused(tmp_path, base, AdapterFormatError, part)


def test_every_cut_of_a_tensor_file(sound: dict[str, Any], base: BaseSpec, tmp_path: Path) -> None:
    file = sound["PROMPT_TUNING"].write(tmp_path) / "adapter_model.safetensors"
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        refused(tmp_path, base, AdapterFormatError)


def test_a_tensor_file_that_is_too_large(sound: dict[str, Any], base: BaseSpec, tmp_path: Path) -> None:
    with (sound["LORA"].write(tmp_path) / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(MAX_TENSORS_BYTES + 1)
    refused(tmp_path, base, AdapterSourceError, "adapter_model.safetensors", str(MAX_TENSORS_BYTES))


def test_a_large_file_is_refused_by_its_header_alone(
    sound: dict[str, Any], base: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = MAX_TENSORS_BYTES // 2 // 128
    head = header({"prompt_embeddings": entry(0, num_rows * 128, shape=[num_rows, 32])})
    with (sound["PROMPT_TUNING"].write(tmp_path) / "adapter_model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + num_rows * 128)
    monkeypatch.setattr(peft, "read_tensor", None)
    refused(tmp_path, base, AdapterFormatError, "prompt_embeddings", str(num_rows))


def test_a_file_cut_while_it_is_read(
    sound: dict[str, Any], base: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than a file's buffer holds.
    sound["PROMPT_TUNING"].fields["num_virtual_tokens"] = 4000
    sound["PROMPT_TUNING"].tensors["prompt_embeddings"] = torch.zeros(4000, 32)
    file = sound["PROMPT_TUNING"].write(tmp_path) / "adapter_model.safetensors"
    read_header = peft.read_header

    def cut_after_the_header(*args: Any) -> Any:
        found = read_header(*args)
        os.truncate(file, file.stat().st_size - 4)
        return found

    monkeypatch.setattr(peft, "read_header", cut_after_the_header)
    refused(tmp_path, base, AdapterFormatError, "prompt_embeddings", "512000 bytes", "511996")


def test_a_pickle_is_refused_with_the_way_out(sound: dict[str, Any], base: BaseSpec, tmp_path: Path) -> None:
    tensors = sound["LORA"].write(tmp_path) / "adapter_model.safetensors"
    tensors.rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, base, AdapterFormatError, "adapter_model.bin", "pickle", "safe_serialization=True")
    (tmp_path / "adapter_model.bin").unlink()
    refused(tmp_path, base, AdapterSourceError, "adapter_model.safetensors")
