"""Files that nobody's peft wrote, sent by who may load: refused by name, or served to nobody's harm."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save

from security.conftest import EVIL, Answer, answer_of, nothing_until
from support.prompts import PROMPT
from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_client import TurretError

MESSAGE_BYTES = 1 << 20
FLOATS = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.fixture
def send(channel):
    """How an upload of such files ends."""
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)

    def send(config: bytes, tensors: bytes) -> Answer:
        head = len(config).to_bytes(8, "little") + config
        digest = hashlib.sha256(head + tensors).hexdigest()
        start = adapters_pb2.UploadStart(name="evil-sent", digest=digest, config=config, size=len(tensors))
        requests = [adapters_pb2.UploadAdapterRequest(start=start)]
        for offset in range(0, len(tensors), MESSAGE_BYTES):
            data = tensors[offset : offset + MESSAGE_BYTES]
            chunk = adapters_pb2.UploadChunk(offset=offset, data=data)
            requests.append(adapters_pb2.UploadAdapterRequest(chunk=chunk))
        return answer_of(lambda: list(adapters.UploadAdapter(iter(requests), metadata=EVIL)))

    return send


@pytest.fixture(scope="session")
def config(place) -> bytes:
    return (place.folder / "own" / "adapter_config.json").read_bytes()


@pytest.fixture(scope="session")
def tensors(place) -> bytes:
    return (place.folder / "own" / "adapter_model.safetensors").read_bytes()


def headed(header: Mapping[str, object] | bytes, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


BOMBS = {
    "nothing": b"",
    "short": b"\x01",
    "length 2^60": struct.pack("<Q", 1 << 60) + b"{}",
    "length 2^64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no JSON": headed(b"\xff\xfe"),
    "deep": headed(b"[" * 100_000),
    "deep object": headed(b'{"a":' * 100_000),
    "long number": headed(b'{"a":' + b"9" * 100_000 + b"}"),
    "not a number": headed(b'{"a": NaN}'),
    "many keys": headed({str(number): FLOATS for number in range(50_000)}, bytes(16)),
    "one key twice": headed(b'{"a":{},"a":{}}'),
    "overlap": headed({"a": FLOATS, "b": FLOATS | {"data_offsets": [8, 24]}}, bytes(24)),
    "gap": headed({"a": FLOATS | {"data_offsets": [16, 32]}}, bytes(32)),
    "backwards": headed({"a": FLOATS | {"data_offsets": [16, 0]}}, bytes(16)),
    "beyond": headed({"a": FLOATS | {"data_offsets": [0, 1 << 40]}}, bytes(16)),
    "huge shape": headed({"a": FLOATS | {"shape": [1 << 32, 1 << 32]}}, bytes(16)),
    "shape of zero": headed({"a": FLOATS | {"shape": [0, 1 << 33], "data_offsets": [0, 0]}}),
    "negative": headed({"a": FLOATS | {"shape": [-4]}}, bytes(16)),
    "fractions": headed({"a": FLOATS | {"shape": [4.0]}}, bytes(16)),
    "many dimensions": headed({"a": FLOATS | {"shape": [1] * 100_000 + [4]}}, bytes(16)),
    "lone surrogate": headed(b'{"\\ud800": {"dtype": "\\udfff"}}'),
    "a name like a path": headed({"../../etc/passwd": FLOATS}, bytes(16)),
    "a name of dots": headed({"base_model.model." + "." * (1 << 20): FLOATS}, bytes(16)),
    "names of peft's wrappers": headed(
        {
            f"base_model.model.{path}": FLOATS | {"data_offsets": [16 * index, 16 * index + 16]}
            for index, path in enumerate(
                (
                    "lm_head.modules_to_save.weight",
                    "model.embed_tokens.token_adapter.base_layer.weight",
                    "model.layers.0.self_attn.q_proj.lora_A.default.weight",
                    "model.layers.0.mlp.experts.99999999.w1.lora_A.weight",
                )
            )
        },
        bytes(64),
    ),
    "metadata": headed({"__metadata__": {"a": {"b": []}}}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_tensors_that_are_none(send, config, bomb):
    answer = send(config, BOMBS[bomb])
    assert answer.code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
    assert answer.reason in {"ADAPTER_INVALID", "ADAPTER_BASE_MISMATCH"}


CONFIGS = {
    "nothing": b"",
    "deep": b"[" * 10_000 + b"]" * 10_000,
    "deep field": b'{"peft_type": "LORA", "rank_pattern": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep inert field": b'{"peft_type": "LORA", "auto_mapping": ' + b"[" * 900 + b"]" * 900 + b"}",
    "long number": b'{"r": ' + b"1" * 500_000 + b"}",
    "infinity": b'{"peft_type": "LORA", "lora_alpha": 1e999, "r": 8, "target_modules": ["q_proj"]}',
    "surrogate": b'{"peft_type": "\\ud800"}',
    "twice": b'{"peft_type": "LORA", "peft_type": "LORA"}',
    "not UTF-8": b'{"peft_type": "\xff"}',
    "UTF-16": '{"peft_type": "LORA"}'.encode("utf-16"),
    "another": b'"LORA"',
    "a rank beyond all": b'{"peft_type": "LORA", "r": 1000000000, "target_modules": ["q_proj"]}',
    "an expression that never ends": b'{"peft_type": "LORA", "r": 8, "target_modules": "(a*)*(a*)*(a|a)*b$"}',
}


@pytest.mark.parametrize("broken", CONFIGS)
def test_configs_that_are_none(send, tensors, broken):
    answer = send(CONFIGS[broken], tensors)
    assert answer.code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
    assert answer.reason in {"ADAPTER_INVALID", "ADAPTER_BASE_MISMATCH"}


def test_numbers_that_are_none(send, config, place):
    weights = load_file(place.folder / "own" / "adapter_model.safetensors")
    for number in (float("nan"), float("inf")):
        first = next(iter(weights))
        answer = send(config, save(weights | {first: weights[first].clone().fill_(number)}))
        assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_INVALID")


def test_an_adapter_that_overflows_does_not_corrupt_the_pages_of_others(
    send, config, place, evil, good, expected
):
    """Its keys and values are no numbers; whoever gets their pages next must not meet them."""
    weights = load_file(place.folder / "own" / "adapter_model.safetensors")
    huge = save({key: tensor.clone().fill_(3e38) for key, tensor in weights.items()})
    assert send(config, huge).code is grpc.StatusCode.OK
    for _ in range(3):
        # Other tests hold whether that is an answer or an error.
        with suppress(TurretError):
            evil.generate([5] * 200, adapter="evil-sent", max_tokens=40)
        for length in (50, 120):
            good.generate([6] * length, max_tokens=20)
        assert good.generate(PROMPT, adapter="good-lora", max_tokens=8).token_ids == expected
    evil.unload_adapter("evil-sent")


def test_an_adapter_named_by_its_digest_is_not_got_without_its_bytes(channel, place):
    """Also what the server has already must be sent whole."""
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
    config = (place.secret / "adapter_config.json").read_bytes()
    size = (place.secret / "adapter_model.safetensors").stat().st_size
    whole = _digest(place.secret)
    start = adapters_pb2.UploadStart(name="evil-copy", digest=whole, config=config, size=size)
    call = adapters.UploadAdapter(iter([adapters_pb2.UploadAdapterRequest(start=start)]), metadata=EVIL)
    assert next(call).offset == 0
    answer = answer_of(partial(next, call))
    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UPLOAD_INVALID")


def _digest(folder: Path) -> str:
    config, tensors = (
        (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    return hashlib.sha256(len(config).to_bytes(8, "little") + config + tensors).hexdigest()


def test_half_open_uploads_are_few_and_keep_nobody_out(channel, place, config, good):
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
    opened, refused, over = [], [], threading.Event()
    for number in range(40):
        start = adapters_pb2.UploadStart(
            name="evil-half", digest=f"{number:064x}", config=config, size=1 << 33
        )
        messages = nothing_until(over, adapters_pb2.UploadAdapterRequest(start=start))
        call = adapters.UploadAdapter(messages, metadata=EVIL)
        answer = answer_of(partial(next, call))
        (opened if answer.code is grpc.StatusCode.OK else refused).append((call, answer))
    assert {(answer.code, answer.reason) for _, answer in refused} <= {
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    }
    assert 0 < len(opened) <= 16
    good.upload_adapter("good-sent", place.secret)
    good.unload_adapter("good-sent")
    over.set()
