"""What a stranger sends, checked field by field before anything is done with it."""

from __future__ import annotations

import math
import secrets

from turret.v1 import inference_pb2
from turret_adapters.registry import Named
from turret_server.engine.request import SamplingParams
from turret_server.errors import InvalidRequestError, PromptTooLongError
from turret_server.lifecycle.publishing import check_revision
from turret_server.tenancy.tenants import check_name

_DEFAULT_MAX_TOKENS = 256
_MAX_STOP_STRINGS = 16
_MAX_ADAPTERS = 8
_MAX_WEIGHT = 100.0
_MAX_STOP_LENGTH = 256
_MAX_TEMPERATURE = 100.0
_MAX_PRIORITY = 10
_MAX_CACHE_SALT_LENGTH = 128
_MAX_ROUTING_KEY_LENGTH = 128


def check_length(num_tokens: int, max_context: int) -> None:
    """See that there is room for so many tokens and one more, before anything is done with them.

    Raises:
        PromptTooLongError: there is not.
    """
    _check_room(num_tokens, 1, max_context)


def _check_room(num_context: int, wanted: int, max_context: int) -> None:
    if num_context + wanted > max_context:
        raise PromptTooLongError(
            f"the model's context has {max_context} tokens; prompt and virtual tokens take {num_context} and "
            f"{wanted} are to be generated",
            max_context=max_context,
            prompt_tokens=num_context,
            max_tokens=wanted,
        )


def check_token_ids(token_ids: list[int], vocab_size: int) -> list[int]:
    """Hand a prompt's tokens on if the model knows them.

    Raises:
        InvalidRequestError: there are none, or one is not in the vocabulary.
    """
    if not token_ids:
        raise InvalidRequestError("the prompt has no tokens; give at least one", field="prompt")
    largest = max(token_ids)
    if largest >= vocab_size:
        raise InvalidRequestError(
            f"token ids go up to {vocab_size - 1} in this model; found {largest}", field="token_ids"
        )
    return token_ids


def check_adapters(request: inference_pb2.GenerateRequest) -> list[Named]:
    """Names, weights and tasks of the request's adapters.

    Raises:
        InvalidRequestError: too many, one named twice, or a name, a revision or a weight that cannot be.
    """
    if len(request.adapters) > _MAX_ADAPTERS:
        raise InvalidRequestError(
            f"at most {_MAX_ADAPTERS} adapters in one request; found {len(request.adapters)}",
            field="adapters",
        )
    named = []
    for ref in request.adapters:
        weight = ref.weight if ref.HasField("weight") else 1.0
        if not (math.isfinite(weight) and abs(weight) <= _MAX_WEIGHT):
            raise InvalidRequestError(
                f"an adapter's weight is from -{_MAX_WEIGHT:g} to {_MAX_WEIGHT:g}; found {weight}",
                field="weight",
            )
        task = ref.task if ref.HasField("task") else None
        name, mark, beginning = ref.name.partition("@")
        revision = check_revision(beginning, "adapters") if mark else None
        named.append(Named(check_name(name, "adapters"), weight, task, revision))
    if len({(each.name, each.task) for each in named}) < len(named):
        raise InvalidRequestError("an adapter is named twice", field="adapters")
    return named


def check_stop(request: inference_pb2.GenerateRequest) -> list[str]:
    """The request's stop strings.

    Raises:
        InvalidRequestError: too many stop strings, or one that is empty or too long.
    """
    if len(request.stop) > _MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"at most {_MAX_STOP_STRINGS} stop strings; found {len(request.stop)}", field="stop"
        )
    for stop in request.stop:
        if not 0 < len(stop) <= _MAX_STOP_LENGTH:
            raise InvalidRequestError(
                f"a stop string has 1 to {_MAX_STOP_LENGTH} characters; found {len(stop)}", field="stop"
            )
    return list(request.stop)


def check_priority(request: inference_pb2.GenerateRequest) -> int:
    """The request's priority within its tenant.

    Raises:
        InvalidRequestError: it is out of its range.
    """
    if abs(request.priority) > _MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority is from -{_MAX_PRIORITY} to {_MAX_PRIORITY}; found {request.priority}",
            field="priority",
        )
    return request.priority


def check_cache_salt(request: inference_pb2.GenerateRequest) -> str:
    """With whom the request shares cached blocks.

    Raises:
        InvalidRequestError: it is too long.
    """
    if len(request.cache_salt) > _MAX_CACHE_SALT_LENGTH:
        raise InvalidRequestError(
            f"cache_salt has at most {_MAX_CACHE_SALT_LENGTH} characters; found {len(request.cache_salt)}",
            field="cache_salt",
        )
    return request.cache_salt


def check_routing_key(request: inference_pb2.GenerateRequest) -> str:
    """With which requests it goes to the same revision of an adapter.

    Raises:
        InvalidRequestError: it is too long.
    """
    if len(request.routing_key) > _MAX_ROUTING_KEY_LENGTH:
        raise InvalidRequestError(
            f"routing_key has at most {_MAX_ROUTING_KEY_LENGTH} characters; found {len(request.routing_key)}",
            field="routing_key",
        )
    return request.routing_key


def sampling_params(
    request: inference_pb2.GenerateRequest, *, num_context: int, max_context: int
) -> SamplingParams:
    """Check the sampling fields. `num_context` counts the prompt's tokens and the adapter's virtual ones.

    Raises:
        InvalidRequestError: a value out of its range.
        PromptTooLongError: the tokens to generate do not fit into what the context leaves.
    """
    return SamplingParams(
        max_tokens=_max_tokens(request, num_context, max_context),
        temperature=_in_range(request, "temperature", 0.0, _MAX_TEMPERATURE),
        top_p=_top_p(request),
        top_k=_top_k(request),
        seed=request.seed if request.HasField("seed") else secrets.randbits(64),
    )


def _max_tokens(request: inference_pb2.GenerateRequest, num_context: int, max_context: int) -> int:
    room = max_context - num_context
    if request.HasField("max_tokens") and request.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is at least 1; found {request.max_tokens}", field="max_tokens")
    wanted = request.max_tokens if request.HasField("max_tokens") else 1
    _check_room(num_context, wanted, max_context)
    return request.max_tokens if request.HasField("max_tokens") else min(_DEFAULT_MAX_TOKENS, room)


def _in_range(request: inference_pb2.GenerateRequest, field: str, low: float, high: float) -> float:
    value: float = getattr(request, field)
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequestError(f"{field} is a number from {low:g} to {high:g}; found {value}", field=field)
    return value


def _top_p(request: inference_pb2.GenerateRequest) -> float:
    if not request.HasField("top_p"):
        return 1.0
    value = _in_range(request, "top_p", 0.0, 1.0)
    if value == 0.0:
        raise InvalidRequestError("top_p is above 0; for greedy set temperature to 0", field="top_p")
    return value


def _top_k(request: inference_pb2.GenerateRequest) -> int:
    if request.top_k < 0:
        raise InvalidRequestError(f"top_k is 0 (all) or more; found {request.top_k}", field="top_k")
    return request.top_k
