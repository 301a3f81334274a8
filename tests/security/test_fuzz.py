"""Any message to any method, and bytes that are almost one. FUZZ_EXAMPLES says how many of each (25)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from security.conftest import CLEAN, EVIL, answer_of
from turret.v1 import adapters_pb2, inference_pb2, model_pb2, pooling_pb2, prompts_pb2

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
METHODS = [
    method
    for file, service in (
        (inference_pb2, "InferenceService"),
        (adapters_pb2, "AdapterService"),
        (prompts_pb2, "PromptService"),
        (model_pb2, "ModelService"),
        (pooling_pb2, "PoolingService"),
    )
    for method in file.DESCRIPTOR.services_by_name[service].methods
]
# Only so that a test ends that found a call which does not.
HANG_S = 60

_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
_TEXTS = st.text(max_size=40) | st.sampled_from(
    (
        "evil-own",
        "evil-x",
        "shared",
        "shared@00000000",
        "good-lora",
        "broken",
        "fox",
        "hf://a/b",
        "/",
        "..",
        "0" * 64,
    )
)


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type:
        return _message(field.message_type)
    if field.type in _INTEGERS:
        low, high = _INTEGERS[field.type]
        return st.sampled_from((low, high, 0, 1, min(5, high))) | st.integers(low, high)
    if field.enum_type:
        return st.sampled_from([*field.enum_type.values_by_number, 99])
    return {
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
        FieldDescriptor.TYPE_STRING: _TEXTS,
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=100),
    }[field.type]


def _field(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type and field.message_type.GetOptions().map_entry:
        return st.dictionaries(*map(_value, field.message_type.fields), max_size=400)
    value = _value(field)
    if not field.is_repeated:
        return value
    # Lists of lists grow fast.
    nested = field.message_type and any(each.is_repeated for each in field.message_type.fields)
    return st.lists(value, max_size=10) | st.builds(
        lambda one, number: [one] * number, value, st.integers(0, 10 if nested else 5000)
    )


def _message(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    fields = {field.name: _field(field) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda found: GetMessageClass(descriptor)(**found))


@st.composite
def _almost(draw: st.DrawFn, descriptor: Descriptor) -> bytes:
    """A message's bytes, some of which are others."""
    sent: bytes = draw(_message(descriptor)).SerializeToString()
    begin, end = sorted(draw(st.tuples(*2 * [st.integers(0, len(sent))])))
    return sent[:begin] + draw(st.binary(max_size=20)) + sent[end:]


def _call(channel: grpc.Channel, method: MethodDescriptor, requests: list[bytes]) -> Iterator[bytes]:
    path = f"/{method.containing_service.full_name}/{method.name}"
    asked = {"metadata": EVIL, "timeout": HANG_S}
    if not (method.client_streaming or method.server_streaming):
        yield channel.unary_unary(path)(requests[0], **asked)
        return
    call = (
        channel.stream_stream(path)(iter(requests), **asked)
        if method.client_streaming
        else channel.unary_stream(path)(requests[0], **asked)
    )
    yield from islice(call, 2)
    call.cancel()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_any_message_is_answered_cleanly(method, channel):
    sent = _message(method.input_type).map(lambda message: message.SerializeToString())
    most = 4 if method.client_streaming else 1

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(sent | _almost(method.input_type) | st.binary(max_size=50), min_size=1, max_size=most))
    def check(requests: list[bytes]) -> None:
        answer = answer_of(partial(list, _call(channel, method, requests)))
        assert answer.code in CLEAN, answer
        assert answer.reason or answer.code is grpc.StatusCode.OK, answer

    check()


def test_there_are_methods_to_try():
    assert len(METHODS) >= 13
