"""Validation of requests, field by field, before anything is done with them.

The bounds of the fields are in `request_fields`, which is generated from the protocol. What depends on the
model is checked by `ModelInfo`, once the prompt is tokenised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from turret_adapters.registry import Named
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.revisions import check_revision
from turret_server.serving.request import AdapterRef, GenerationRequest, PinRequest
from turret_server.serving.request_fields import ADAPTER_FIELDS, FIELDS, PIN_FIELDS, FieldRule
from turret_server.serving.structured import form_of
from turret_server.tenancy.tenants import check_name

_MAX_ADAPTERS = 8


def validate(request: GenerationRequest | PinRequest) -> list[Named]:
    """Check all fields of a request; returns its adapters for the registry.

    Raises:
        InvalidRequestError: a field is invalid.
    """
    check_fields(request, FIELDS if isinstance(request, GenerationRequest) else PIN_FIELDS)
    if isinstance(request, GenerationRequest):
        _check_together(request)
    if request.prompt is None:
        raise InvalidRequestError("the request has no prompt; set text or token_ids", field="prompt")
    return check_adapters(request.adapters)


def _check_together(request: GenerationRequest) -> None:
    if request.n > 1 and request.temperature == 0:
        raise InvalidRequestError(
            f"n is {request.n}, and at temperature 0 all answers are the same; set a temperature, or n to 1",
            field="n",
        )
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise InvalidRequestError(
            f"min_tokens is at most max_tokens, which is {request.max_tokens}; found {request.min_tokens}",
            field="min_tokens",
        )
    form_of(request)


def check_fields(request: object, rules: Mapping[str, FieldRule]) -> None:
    """Check the fields of a request that have a rule; a field that is None is not set.

    Raises:
        InvalidRequestError: a value is outside of its bounds.
    """
    for field, rule in rules.items():
        value = getattr(request, field)
        if isinstance(value, list | tuple):
            _check_items(field, value, rule)
        elif isinstance(value, Mapping):
            _check_items(field, list(value.values()), rule)
        elif isinstance(value, str):
            _check_length(field, value, rule)
        elif value is not None:
            _check_number(field, value, rule)


def _check_items(field: str, values: Sequence[str | float], rule: FieldRule) -> None:
    if rule.max_items is not None and len(values) > rule.max_items:
        raise InvalidRequestError(
            f"{field} has at most {rule.max_items} items; found {len(values)}", field=field
        )
    for value in values:
        if isinstance(value, str):
            _check_length(field, value, rule)
        else:
            _check_number(field, value, rule)


def _check_length(field: str, value: str, rule: FieldRule) -> None:
    low, high = rule.min_length or 0, math.inf if rule.max_length is None else rule.max_length
    if not low <= len(value) <= high:
        allowed = f"{low} to {high:g}" if low else f"at most {high:g}"
        raise InvalidRequestError(f"{field} has {allowed} characters; found {len(value)}", field=field)


def _check_number(field: str, value: float, rule: FieldRule) -> None:
    low = -math.inf if rule.min is None else rule.min
    high = math.inf if rule.max is None else rule.max
    above = value > low if rule.exclusive_min else value >= low
    if math.isfinite(value) and above and value <= high:
        return
    if rule.exclusive_min:
        allowed = f"above {low:g} and at most {high:g}"
    elif math.isfinite(high):
        allowed = f"from {low:g} to {high:g}"
    else:
        allowed = f"at least {low:g}"
    raise InvalidRequestError(f"{field} is {allowed}; found {value}", field=field)


def check_adapters(adapters: Sequence[AdapterRef]) -> list[Named]:
    """Names, weights, tasks and revisions of a request's adapters, for the registry.

    Raises:
        InvalidRequestError: there are too many, one is named twice, or a name, revision or weight is invalid.
    """
    if len(adapters) > _MAX_ADAPTERS:
        raise InvalidRequestError(
            f"a request names at most {_MAX_ADAPTERS} adapters; found {len(adapters)}", field="adapters"
        )
    named = []
    for ref in adapters:
        name, mark, beginning = ref.name.partition("@")
        revision = check_revision(beginning, "adapters") if mark else None
        check_name(name, "adapters")
        check_fields(ref, ADAPTER_FIELDS)
        named.append(Named(name, ref.weight, ref.task, revision))
    if len({(each.name, each.task) for each in named}) < len(named):
        raise InvalidRequestError("an adapter is named twice; name each once", field="adapters")
    return named
