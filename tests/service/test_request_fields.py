"""Every field of the requests reaches the engine, and is refused outside of its range.

The tests walk the messages' descriptors, so that a new field is tested without being named here: a field that
does not change the engine's job fails, and so does one that has neither a rule nor a check of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from support.models import VOCAB_SIZE
from support.serving import serving
from turret.v1 import (
    adapters_pb2_grpc,
    chat_pb2,
    inference_pb2,
    inference_pb2_grpc,
    pooling_pb2,
    pooling_pb2_grpc,
    prompts_pb2,
    prompts_pb2_grpc,
    rules_pb2,
)
from turret.v1.adapters_pb2 import SetTrafficSplitRequest
from turret_server.config import ServerConfig

TOKENS = tuple(range(3, 43))
NUMBERS = {"TYPE_FLOAT", "TYPE_INT32", "TYPE_UINT32", "TYPE_UINT64"}
SPACE = 223  # the token of a space
OTHER_TEXT = "some other prompt that fills more than a block of sixteen tokens, as a pinned one must"
ADDING = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
# Differ between any two jobs.
OWN = {"request_id", "sink", "deadline", "about", "times"}
# Checked by other means than a rule, with a value that is refused.
CHECKED = {
    "text": "",
    "token_ids": inference_pb2.TokenIds(ids=[VOCAB_SIZE]),
    "name": "not a name",
    "pooling": 99,
}
# Every value of the type is allowed.
UNBOUNDED = {
    "seed",
    "add_special_tokens",
    "ignore_eos",
    "include_stop",
    "skip_special_tokens",
    "json_object",
    "truncate",
    "normalize",
}
# Texts in a language of their own, by what stands before and after characters of no meaning.
LANGUAGES = {"json_schema": ('{"type": "boolean", "title": "', '"}'), "grammar": ('start: "ab" //', "")}


def request_for(kind: str, field: Any) -> Any:
    """A valid request on which the field has an effect."""
    message = requests()[kind]
    needs = {
        "n": {"temperature": 0.5},
        "include_stop": {"stop": [" "], "logit_bias": {SPACE: 100}},
        "skip_special_tokens": {"logit_bias": {0: 100}},
    }
    for name, value in needs.get(field.name, {}).items():
        message = with_value(message, message.DESCRIPTOR.fields_by_name[name], value)
    return message


def requests() -> dict[str, Any]:
    """A valid request of every kind that becomes a job. Its seed is set: without, jobs differ by chance."""
    prompt = inference_pb2.TokenIds(ids=TOKENS)
    adapters = [inference_pb2.AdapterRef(name="split")]
    return {
        "generate": inference_pb2.GenerateRequest(token_ids=prompt, adapters=adapters, max_tokens=8, seed=1),
        "pin": prompts_pb2.PinPromptRequest(name="rules", token_ids=prompt, adapters=adapters),
        "batch": pooling_pb2.TextBatch(inputs=[pooling_pb2.Input(token_ids=prompt)], adapters=adapters),
        "embed": pooling_pb2.EmbedRequest(
            batch=pooling_pb2.TextBatch(inputs=[pooling_pb2.Input(token_ids=prompt)])
        ),
    }


@dataclass
class Door:
    """The server's calls, and the jobs that they submit to the engine."""

    generating: Any
    prompts: Any
    pooling: Any
    jobs: list[Any]
    tokenizer: Tokenizer

    def send(self, message: Any) -> Any:
        """The answer to a request."""
        if isinstance(message, inference_pb2.GenerateRequest):
            return self.generating.Generate(message)
        if isinstance(message, pooling_pb2.TextBatch):
            message = pooling_pb2.EmbedRequest(batch=message)
        if isinstance(message, pooling_pb2.EmbedRequest):
            return self.pooling.Embed(message)
        return self.prompts.PinPrompt(message)

    def effect(self, message: Any) -> tuple[Any, ...]:
        """What a request leads to: the fields of its job, and the text or the name of its answer."""
        answer = self.send(message)
        job = self.jobs.pop()
        self.jobs.clear()  # those of other answers
        parts = {field.name: getattr(job, field.name) for field in fields(job) if field.name not in OWN}
        match answer:
            case inference_pb2.GenerateResponse():
                return parts, answer.text
            case pooling_pb2.EmbedResponse():
                return parts, [list(each.values) for each in answer.embeddings]
            case _:
                return parts, answer.prompt.name

    def refusal(self, message: Any) -> tuple[grpc.StatusCode, str]:
        """The status of a request that is refused, and the field that its error names."""
        with pytest.raises(grpc.RpcError) as refused:
            self.send(message)
        info = error_details_pb2.ErrorInfo()
        details = rpc_status.from_call(refused.value).details
        assert any(detail.Unpack(info) for detail in details if detail.Is(info.DESCRIPTOR))
        return refused.value.code(), info.metadata["field"]


@pytest.fixture(scope="module")
def door(base_of, adapter_of, quantised_cache, tmp_path_factory) -> Iterator[Door]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    config = ServerConfig(
        model=str(base_of("llama")),
        chat_template=template,
        dtype="float32",
        device="cpu",
        memory="8MiB",
        cache=quantised_cache,
    )
    with serving(config) as served, grpc.insecure_channel(served.address) as channel:
        lifecycle, engine = served.parts.lifecycle, served.parts.engine
        jobs = []
        for name in ("submit", "pin_prompt"):
            original = getattr(engine, name)
            setattr(engine, name, lambda job, original=original: (jobs.append(job), original(job))[1])
        lifecycle.load("multitask", str(adapter_of("llama", "multitask")))
        lifecycle.load("split", str(adapter_of("llama", "lora", seed=51)))
        old = served.parts.registry.status("split").spec.revision
        lifecycle.load("split", str(adapter_of("llama", "lora", seed=52)))
        adapters_pb2_grpc.AdapterServiceStub(channel).SetTrafficSplit(
            SetTrafficSplitRequest(name="split", revision=old, percent=50)
        )
        yield Door(
            inference_pb2_grpc.InferenceServiceStub(channel),
            prompts_pb2_grpc.PromptServiceStub(channel),
            pooling_pb2_grpc.PoolingServiceStub(channel),
            jobs,
            served.parts.loaded.tokenizer.live.backend_tokenizer,
        )
        engine.check_integrity()


def rule_of(field: Any) -> Any:
    return field.GetOptions().Extensions[rules_pb2.rule]


def type_of(field: Any) -> str:
    return next(
        name for name in dir(field) if name.startswith("TYPE_") and getattr(field, name) == field.type
    )


def other_than(field: Any, value: Any) -> Any:
    """A value that the field accepts, and that is neither the given one nor the default."""
    rule = rule_of(field)
    if type_of(field) == "TYPE_BOOL":
        return not rule.default_value
    if field.is_repeated:
        return [one_of(field)]
    if type_of(field) == "TYPE_STRING":
        return text_of(field, max(rule.min_length, 1), "x")
    if rule.HasField("max"):
        candidates = (rule.max, (rule.min + rule.max) / 2 if rule.HasField("min") else rule.max - 1)
    else:
        candidates = (rule.min + 1, rule.min + 2)
    number = float if type_of(field) == "TYPE_FLOAT" else int
    return next(number(each) for each in candidates if number(each) not in (value, rule.default_value))


def text_of(field: Any, length: int, character: str) -> str:
    """A text of this length, or a longer one if the field's language needs it."""
    before, after = LANGUAGES.get(field.name, ("", ""))
    return before + character * (length - len(before) - len(after)) + after


def one_of(field: Any) -> Any:
    """An element of a repeated field."""
    return "x" * max(rule_of(field).min_length, 1) if type_of(field) == "TYPE_STRING" else 5


def just_outside(field: Any) -> Iterator[Any]:
    """Values next to the bounds of the field's rule that are refused, and numbers far from them."""
    rule, kind = rule_of(field), type_of(field)
    integral = kind != "TYPE_FLOAT"
    if rule.HasField("min"):
        low = rule.min - 1 if integral else float(np.nextafter(np.float32(rule.min), np.float32(-math.inf)))
        yield rule.min if rule.exclusive_min else low
        yield from [-(2**31)] if integral else [-1e30, -math.inf]
    if rule.HasField("max"):
        yield rule.max + 1 if integral else float(np.nextafter(np.float32(rule.max), np.float32(math.inf)))
        yield from [2**31 - 1] if integral else [1e30, math.inf]
    if kind == "TYPE_FLOAT" and (rule.HasField("min") or rule.HasField("max")):
        yield math.nan
    if rule.HasField("max_items"):
        yield [one_of(field)] * (rule.max_items + 1)
    lengths = [rule.min_length - 1] * (rule.min_length > 0) + [rule.max_length + 1] * (rule.max_length > 0)
    for length in lengths:
        yield ["x" * length] if field.is_repeated else "x" * length


def at_the_bounds(field: Any) -> Iterator[Any]:
    """The outermost values that the field's rule allows."""
    rule, integral = rule_of(field), type_of(field) != "TYPE_FLOAT"
    if rule.HasField("min"):
        lowest = rule.min
        if rule.exclusive_min:
            lowest = float(np.nextafter(np.float32(rule.min), np.float32(math.inf)))
        yield int(lowest) if integral else lowest
    if rule.HasField("max"):
        yield int(rule.max) if integral else rule.max
    if rule.HasField("max_length"):
        # In code points, whatever their encoding takes.
        text = text_of(field, rule.max_length, "ü")
        yield [text] * max(rule.max_items, 1) if field.is_repeated else text
    if rule.min_length:
        yield ["x" * rule.min_length] if field.is_repeated else "x" * rule.min_length
    if rule.HasField("max_items"):
        yield [one_of(field)] * rule.max_items


def with_value(message: Any, field: Any, value: Any) -> Any:
    changed = type(message)()
    changed.CopyFrom(message)
    if isinstance(value, dict):
        getattr(changed, field.name).clear()
        getattr(changed, field.name).update(value)
    elif field.message_type and not field.is_repeated:
        getattr(changed, field.name).CopyFrom(value)
    elif field.is_repeated:
        del getattr(changed, field.name)[:]
        getattr(changed, field.name).extend(value)
    else:
        if type_of(field) in NUMBERS - {"TYPE_FLOAT"}:
            value = int(value)
        setattr(changed, field.name, value)
    return changed


FIELDS = [(kind, field) for kind, message in requests().items() for field in message.DESCRIPTOR.fields]
SCALARS = [(kind, field) for kind, field in FIELDS if not field.message_type]
RULED = [(kind, field) for kind, field in SCALARS if list(just_outside(field))]
WITH_ADAPTERS = [kind for kind, field in FIELDS if field.name == "adapters"]
REF_FIELDS = list(inference_pb2.AdapterRef.DESCRIPTOR.fields)


def ids(parameter: Any) -> str:
    return parameter if isinstance(parameter, str) else getattr(parameter, "name", "")


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=ids)
def test_every_field_reaches_the_engine(door, kind, field, monkeypatch):
    base = request_for(kind, field)
    if field.name == "routing_key":
        # Without one the revision is drawn; with one it follows from the key.
        def revision(key: str) -> str:
            parts, _ = door.effect(with_value(base, field, key))
            return parts["adapters"][0].spec.revision

        keys = [f"user-{index}" for index in range(12)]
        chosen = [revision(key) for key in keys]
        assert len(set(chosen)) == 2
        assert [revision(key) for key in keys] == chosen
        return
    base = with_routing_key(base)
    if field.name == "add_special_tokens":  # to a text, if the tokenizer adds any
        monkeypatch.setattr(door.tokenizer, "post_processor", ADDING)
        base = with_text(base, OTHER_TEXT)
    if field.name == "truncate":
        base = with_text(base, OTHER_TEXT * 20)
        assert door.refusal(base) == (grpc.StatusCode.INVALID_ARGUMENT, "")
        assert door.effect(with_value(base, field, value=True))
        return
    text = door.effect(base)[1]
    values = {
        "text": OTHER_TEXT,
        "token_ids": inference_pb2.TokenIds(ids=TOKENS[::-1]),
        "chat": chat_pb2.Chat(messages=[chat_pb2.ChatMessage(role="user", content=[OTHER_TEXT])]),
        "adapters": [inference_pb2.AdapterRef(name="multitask", task=1)],
        "stop": [text[2:4] or "x"] if isinstance(text, str) else [],
        "inputs": [pooling_pb2.Input(text=OTHER_TEXT)],
        "batch": pooling_pb2.TextBatch(inputs=[pooling_pb2.Input(text=OTHER_TEXT)]),
        "pooling": pooling_pb2.POOLING_CLS,
        "normalize": False,
        "logit_bias": {5: 1.0},
    }
    value = values.get(field.name)
    if value is None:
        value = other_than(field, getattr(base, field.name))
    assert door.effect(with_value(base, field, value)) != door.effect(base)


def with_text(message: Any, text: str) -> Any:
    fields = message.DESCRIPTOR.fields_by_name
    if "inputs" in fields:
        return with_value(message, fields["inputs"], [pooling_pb2.Input(text=text)])
    return with_value(message, fields["text"], text)


def with_routing_key(message: Any) -> Any:
    """A generation that always uses the same revision of the adapter."""
    field = message.DESCRIPTOR.fields_by_name.get("routing_key")
    return with_value(message, field, "always the same") if field else message


@pytest.mark.parametrize("field", REF_FIELDS, ids=ids)
@pytest.mark.parametrize("kind", WITH_ADAPTERS)
def test_every_field_of_an_adapter_reaches_the_engine(door, kind, field):
    refs = {
        "name": [{"name": "split"}, {"name": "multitask", "task": 0}],
        "weight": [{"name": "split"}, {"name": "split", "weight": 0.5}, {"name": "split", "weight": 0.0}],
        "task": [{"name": "multitask", "task": 0}, {"name": "multitask", "task": 1}],
    }[field.name]
    adapters = requests()[kind].DESCRIPTOR.fields_by_name["adapters"]
    base = with_routing_key(requests()[kind])
    effects = [door.effect(with_value(base, adapters, [inference_pb2.AdapterRef(**ref)])) for ref in refs]
    assert all(effects.count(effect) == 1 for effect in effects)


@pytest.mark.parametrize(("kind", "field"), SCALARS, ids=ids)
def test_every_field_has_a_rule_or_a_check_of_its_own(door, kind, field):
    if field.name in UNBOUNDED or (kind, field) in RULED:
        return
    refused = with_value(requests()[kind], field, CHECKED[field.name])
    assert door.refusal(refused) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        {"text": "prompt"}.get(field.name, field.name),
    )


@pytest.mark.parametrize(("kind", "field"), RULED, ids=ids)
def test_a_value_outside_of_its_range_is_refused_by_the_fields_name(door, kind, field):
    values = list(just_outside(field))
    assert values
    for value in values:
        refused = door.refusal(with_value(requests()[kind], field, value))
        assert refused == (grpc.StatusCode.INVALID_ARGUMENT, field.name), value
    assert door.jobs == []


@pytest.mark.parametrize(("kind", "field"), RULED, ids=ids)
def test_the_bounds_themselves_are_accepted(door, kind, field):
    for value in at_the_bounds(field):
        door.effect(with_value(request_for(kind, field), field, value))


@pytest.mark.parametrize("field", REF_FIELDS, ids=ids)
@pytest.mark.parametrize("kind", WITH_ADAPTERS)
def test_an_adapters_field_outside_of_its_range_is_refused(door, kind, field):
    adapters = requests()[kind].DESCRIPTOR.fields_by_name["adapters"]
    values = list(just_outside(field))
    assert values
    for value in values:
        ref = with_value(inference_pb2.AdapterRef(name="split"), field, value)
        refused = door.refusal(with_value(requests()[kind], adapters, [ref]))
        named = "adapters" if field.name == "name" else field.name
        assert refused == (grpc.StatusCode.INVALID_ARGUMENT, named), value


@pytest.mark.parametrize("kind", WITH_ADAPTERS)
def test_too_many_adapters_are_refused(door, kind):
    base = requests()[kind]
    adapters = base.DESCRIPTOR.fields_by_name["adapters"]
    refs = [inference_pb2.AdapterRef(name=f"a{index}") for index in range(rule_of(adapters).max_items + 1)]
    assert door.refusal(with_value(base, adapters, refs)) == (grpc.StatusCode.INVALID_ARGUMENT, "adapters")
    # One less is looked up.
    with pytest.raises(grpc.RpcError) as refused:
        door.send(with_value(base, adapters, refs[1:]))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
