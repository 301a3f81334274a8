"""Conversion of arguments to request messages and of response messages to results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from turret.v1 import adapters_pb2, chat_pb2, inference_pb2, model_pb2, prompts_pb2
from turret_client._options import AdapterRef, GenerationOptions
from turret_client._results import (
    Adapter,
    AdapterMethod,
    AdapterRevision,
    AdapterState,
    Choice,
    Chunk,
    Download,
    FinishReason,
    Generation,
    Limits,
    Model,
    PinnedPrompt,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TrafficSplit,
    Usage,
)
from turret_client.errors import invalid_argument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turret_client._options import AdapterArgument

_Message = TypeVar("_Message", bound=Message)
_TYPES = {
    FieldDescriptor.TYPE_STRING: "text that UTF-8 can encode",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_BOOL: "True or False",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_INT32: "an integer from -2147483648 to 2147483647",
    FieldDescriptor.TYPE_INT64: "an integer from -9223372036854775808 to 9223372036854775807",
    FieldDescriptor.TYPE_UINT32: "an integer from 0 to 4294967295",
    FieldDescriptor.TYPE_UINT64: "an integer from 0 to 18446744073709551615",
}

_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    inference_pb2.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}
_STATES = {
    adapters_pb2.ADAPTER_STATE_STAGED: AdapterState.STAGED,
    adapters_pb2.ADAPTER_STATE_RESIDENT: AdapterState.RESIDENT,
    adapters_pb2.ADAPTER_STATE_DRAINING: AdapterState.DRAINING,
    adapters_pb2.ADAPTER_STATE_FAILED: AdapterState.FAILED,
    adapters_pb2.ADAPTER_STATE_UNLOADED: AdapterState.UNLOADED,
}
_METHODS = {
    adapters_pb2.ADAPTER_METHOD_LORA: AdapterMethod.LORA,
    adapters_pb2.ADAPTER_METHOD_PREFIX_TUNING: AdapterMethod.PREFIX_TUNING,
    adapters_pb2.ADAPTER_METHOD_PROMPT_TUNING: AdapterMethod.PROMPT_TUNING,
    adapters_pb2.ADAPTER_METHOD_P_TUNING: AdapterMethod.P_TUNING,
    adapters_pb2.ADAPTER_METHOD_MULTITASK_PROMPT_TUNING: AdapterMethod.MULTITASK_PROMPT_TUNING,
    adapters_pb2.ADAPTER_METHOD_ADALORA: AdapterMethod.ADALORA,
    adapters_pb2.ADAPTER_METHOD_VERA: AdapterMethod.VERA,
    adapters_pb2.ADAPTER_METHOD_IA3: AdapterMethod.IA3,
    adapters_pb2.ADAPTER_METHOD_LN_TUNING: AdapterMethod.LN_TUNING,
    adapters_pb2.ADAPTER_METHOD_TRAINABLE_TOKENS: AdapterMethod.TRAINABLE_TOKENS,
}


def message_of(kind: type[_Message], **values: Any) -> _Message:
    """A message with these values of its fields; None leaves a field unset.

    Raises:
        InvalidArgumentError: A value is not one of its field.
    """
    message = kind()
    for name, value in values.items():
        if value is None:
            continue
        field = kind.DESCRIPTOR.fields_by_name[name]
        if field.message_type and field.message_type.GetOptions().map_entry:
            _fill(getattr(message, name), name, value)
            continue
        if field.is_repeated and (isinstance(value, str) or not isinstance(value, Iterable)):
            raise invalid_argument(name, f"{name} is a sequence; for one value write {name}=[{value!r}]")
        for item in value if field.is_repeated else [value]:
            try:
                message.MergeFrom(kind(**{name: [item] if field.is_repeated else item}))
            except (TypeError, ValueError) as error:
                raise invalid_argument(
                    name, f"{name} must be {_TYPES[field.type]}; found {_shown(item)}"
                ) from error
    return message


def _fill(field: MutableMapping[int, float], name: str, values: object) -> None:
    """Sets a field that is a map of token ids to numbers."""
    try:
        field.update(values)  # type: ignore[call-overload] # what is no mapping raises
    except (TypeError, ValueError, AttributeError) as error:
        raise invalid_argument(
            name, f"{name} must map integers from 0 to 4294967295 to numbers; found {_shown(values)}"
        ) from error


def _shown(value: object) -> str:
    """A number as it is, and of everything else, which may be long or secret, its type."""
    if isinstance(value, str):
        with suppress(UnicodeEncodeError):
            value.encode()
            return "str"
        return "a lone surrogate, as in text that was not UTF-8"
    return repr(value) if isinstance(value, int | float) else type(value).__name__


def generate_request(
    prompt: str | Sequence[int] | chat_pb2.Chat, *, adapter: AdapterArgument = None, **options: Any
) -> inference_pb2.GenerateRequest:
    """The request for a prompt or a chat with the other `GenerationOptions`; None leaves a field unset.

    Raises:
        TypeError: An option does not exist.
        InvalidArgumentError: A value is not one of its field.
    """
    for name in options:
        if name not in GenerationOptions.__annotations__:
            known = ", ".join(GenerationOptions.__annotations__)
            raise TypeError(f"unknown option {name!r}; the options are {known}")
    request = message_of(inference_pb2.GenerateRequest, **options)
    request.adapters.extend(adapter_refs(adapter))
    if isinstance(prompt, chat_pb2.Chat):
        request.chat.CopyFrom(prompt)
    else:
        _set_prompt(request, prompt)
    return request


def tokenize_request(
    prompt: str | chat_pb2.Chat, *, adapter: AdapterArgument, add_special_tokens: bool | None
) -> model_pb2.TokenizeRequest:
    refs = adapter_refs(adapter)
    options: dict[str, Any] = {"chat": prompt} if isinstance(prompt, chat_pb2.Chat) else {"text": prompt}
    return message_of(
        model_pb2.TokenizeRequest, adapters=refs, add_special_tokens=add_special_tokens, **options
    )


def detokenize_request(token_ids: Sequence[int], *, adapter: AdapterArgument) -> model_pb2.DetokenizeRequest:
    return message_of(model_pb2.DetokenizeRequest, token_ids=token_ids, adapters=adapter_refs(adapter))


def pin_request(
    name: str, prompt: str | Sequence[int], *, adapter: AdapterArgument, **options: Any
) -> prompts_pb2.PinPromptRequest:
    request = message_of(prompts_pb2.PinPromptRequest, name=name, **options)
    request.adapters.extend(adapter_refs(adapter))
    _set_prompt(request, prompt)
    return request


def _set_prompt(
    request: inference_pb2.GenerateRequest | prompts_pb2.PinPromptRequest, prompt: str | Sequence[int]
) -> None:
    with suppress(TypeError, ValueError):
        if isinstance(prompt, str):
            request.text = prompt
            return
        # Bytes would pass for numbers.
        if isinstance(prompt, Iterable) and not isinstance(prompt, bytes | bytearray | memoryview):
            request.token_ids.CopyFrom(inference_pb2.TokenIds(ids=prompt))
            return
    raise invalid_argument(
        "prompt",
        "the prompt must be text that UTF-8 can encode, or token ids from 0 to 4294967295; found "
        f"{_shown(prompt)}",
    )


def adapter_refs(adapter: AdapterArgument) -> list[inference_pb2.AdapterRef]:
    if adapter is None:
        return []
    if isinstance(adapter, Mapping):
        raise invalid_argument(
            "adapter",
            "adapter is a name, an AdapterRef, or a list of these; give weights as AdapterRef(weight=)",
        )
    named = adapter if isinstance(adapter, Iterable) and not isinstance(adapter, str) else [adapter]
    return [_adapter_ref(AdapterRef(name=each) if isinstance(each, str) else each) for each in named]


def _adapter_ref(ref: AdapterRef) -> inference_pb2.AdapterRef:
    if not isinstance(ref, AdapterRef):
        raise invalid_argument(
            "adapter", f"adapter must be a name, an AdapterRef, or a list of these; found {_shown(ref)}"
        )
    return message_of(inference_pb2.AdapterRef, name=ref.name, weight=ref.weight, task=ref.task)


def generation_from(response: inference_pb2.GenerateResponse) -> Generation:
    return Generation(
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=_FINISH_REASONS.get(response.finish_reason, FinishReason.UNSPECIFIED),
        usage=usage_from(response.usage),
        revision=response.revision,
        choices=tuple(map(_choice_from, response.choices)),
        logprobs=_logprobs_from(response.logprobs),
        prompt_logprobs=_logprobs_from(response.prompt_logprobs),
        reasoning=response.reasoning,
        tool_calls=_calls_from(response.tool_calls),
        **_stop_from(response),
    )


def _choice_from(message: inference_pb2.Choice) -> Choice:
    return Choice(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_FINISH_REASONS.get(message.finish_reason, FinishReason.UNSPECIFIED),
        logprobs=_logprobs_from(message.logprobs),
        reasoning=message.reasoning,
        tool_calls=_calls_from(message.tool_calls),
        **_stop_from(message),
    )


def _calls_from(messages: Iterable[chat_pb2.ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(id=each.id, name=each.name, arguments=each.arguments) for each in messages)


def _logprobs_from(messages: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=message.token_id,
            text=message.token.decode(errors="replace"),
            token=message.token,
            logprob=message.logprob,
            rank=message.rank,
            top=_logprobs_from(message.top),
        )
        for message in messages
    )


def chunk_from(response: inference_pb2.GenerateStreamResponse) -> Chunk:
    return Chunk(
        text=response.text,
        token_ids=tuple(response.token_ids),
        revision=response.revision,
        finish_reason=(
            _FINISH_REASONS.get(response.finish_reason, FinishReason.UNSPECIFIED)
            if response.finish_reason
            else None
        ),
        usage=usage_from(response.usage) if response.HasField("usage") else None,
        index=response.index,
        logprobs=_logprobs_from(response.logprobs),
        prompt_logprobs=_logprobs_from(response.prompt_logprobs),
        reasoning=response.reasoning,
        tool_calls=tuple(
            ToolCallDelta(index=each.index, id=each.id, name=each.name, arguments=each.arguments)
            for each in response.tool_calls
        ),
        **_stop_from(response),
    )


def _stop_from(
    response: inference_pb2.GenerateResponse | inference_pb2.GenerateStreamResponse | inference_pb2.Choice,
) -> Any:
    """The fields of all results that say what ended the generation."""
    token_id = response.stop_token_id if response.HasField("stop_token_id") else None
    return {"stop_string": response.stop_string or None, "stop_token_id": token_id}


def adapter_from(message: adapters_pb2.Adapter) -> Adapter:
    return Adapter(
        name=message.name,
        revision=message.revision,
        state=_STATES.get(message.state, AdapterState.UNSPECIFIED),
        method=_METHODS.get(message.method, AdapterMethod.UNSPECIFIED),
        num_parameters=message.num_parameters,
        max_rank=message.max_rank,
        num_virtual_tokens=message.num_virtual_tokens,
        file_bytes=message.file_bytes,
        arena_bytes=message.arena_bytes,
        active_requests=message.active_requests,
        draining_revisions=tuple(message.draining_revisions),
        error=message.error,
        num_tasks=message.num_tasks,
        vocab_size=message.vocab_size,
        own_tokenizer=message.own_tokenizer,
        history=tuple(map(_revision_from, message.history)),
        traffic_split=_split_from(message.traffic_split) if message.HasField("traffic_split") else None,
    )


def download_from(message: adapters_pb2.Download) -> Download:
    return Download(
        name=message.name,
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes if message.HasField("total_bytes") else None,
    )


def _split_from(message: adapters_pb2.TrafficSplit) -> TrafficSplit:
    return TrafficSplit(revision=message.revision, percent=message.percent)


def _revision_from(message: adapters_pb2.AdapterRevision) -> AdapterRevision:
    return AdapterRevision(
        revision=message.revision,
        source=message.source,
        published_at=message.published_at.ToMilliseconds() / 1000,
    )


def pinned_prompt_from(message: prompts_pb2.PinnedPrompt) -> PinnedPrompt:
    return PinnedPrompt(name=message.name, revision=message.revision, prompt_tokens=message.prompt_tokens)


def model_from(message: model_pb2.Model) -> Model:
    limits = message.limits
    return Model(
        name=message.name,
        max_context=message.max_context,
        vocab_size=message.vocab_size,
        has_chat_template=message.has_chat_template,
        calls_tools=message.calls_tools,
        adapter_methods=tuple(
            _METHODS.get(method, AdapterMethod.UNSPECIFIED) for method in message.adapter_methods
        ),
        limits=Limits(
            max_adapters=limits.max_adapters,
            max_messages=limits.max_messages,
            max_tools=limits.max_tools,
            max_queued_requests=limits.max_queued_requests,
            max_queued_tokens=limits.max_queued_tokens,
            max_pinned_tokens=(limits.max_pinned_tokens if limits.HasField("max_pinned_tokens") else None),
        ),
    )


def usage_from(message: inference_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        generated_tokens=message.generated_tokens,
    )
