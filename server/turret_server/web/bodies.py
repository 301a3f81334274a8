"""Bodies of requests: every field is served, or refused by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request

from turret_server.errors import InvalidRequestError

# Larger bodies are parsed in a thread.
_LARGE = 64 * 2**10

Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Priority = Annotated[int, Field(ge=-10, le=10)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]

_MAX_FIELDS = 200

_Body = TypeVar("_Body", bound="Body")


class Refusal(NamedTuple):
    """Why a field is not served. Besides null, `harmless` values change nothing and are accepted."""

    why: str
    harmless: tuple[Any, ...] = ()


class Body(BaseModel):
    """A JSON object. Unknown fields are errors; null leaves a field unset. `refused` are the fields that
    clients know from OpenAI's API and that are not served.

    Lists end at their first error, or have a length: a body of a million errors would hold everybody up.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    refused: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > _MAX_FIELDS:
            raise InvalidRequestError(f"a body has at most {_MAX_FIELDS} fields; found {len(data)}")
        for name, refusal in cls.refused.items():
            if data.get(name) is not None and data[name] not in refusal.harmless:
                raise InvalidRequestError(f"{name} is not served: {refusal.why}", field=name)
        return {name: value for name, value in data.items() if name not in cls.refused}


async def parse(kind: type[_Body], request: Request) -> _Body:
    """The body of a request.

    Raises:
        ValidationError: it is not JSON, or a field is invalid.
        InvalidRequestError: a field is not served.
    """
    data = await request.body()
    if len(data) > _LARGE:
        return await asyncio.to_thread(kind.model_validate_json, data)
    return kind.model_validate_json(data)
