"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, and their HTTP status."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass

from pydantic import ValidationError
from starlette.exceptions import HTTPException

from turret_adapters.errors import AdapterError
from turret_server.errors import InvalidRequestError, TurretError

log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# Where clients look for the code that OpenAI gives; elsewhere it is our reason in lower case.
_CODES = {
    "ADAPTER_NOT_FOUND": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "QUOTA_EXCEEDED": "rate_limit_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
}
_CODE_OF_STATUS = {404: "unknown_url", 405: "method_not_allowed"}
_MAX_MESSAGE = 2000
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error as it is sent. `retry_after` is in seconds."""

    status: int
    body: bytes
    retry_after: float | None = None

    @classmethod
    def of(
        cls,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> Failure:
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        # File names may be invalid UTF-8.
        plain = message.encode(errors="backslashreplace").decode()
        error = {"message": plain[:_MAX_MESSAGE], "type": kind, "param": param, "code": code}
        return cls(status=status, body=json.dumps({"error": error}).encode(), retry_after=retry_after)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            found.append((b"retry-after", str(math.ceil(self.retry_after)).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found


def to_failure(error: Exception) -> Failure:
    """What a client is told of an error. One that is no user's is logged, and its words stay here."""
    if isinstance(error, ValidationError):
        error = _invalid(error)
    match error:
        case TurretError() | AdapterError():
            return Failure.of(
                error.http_status,
                str(error),
                _CODES.get(error.reason, error.reason.lower()),
                error.metadata.get("field") if isinstance(error, TurretError) else _param(error),
                error.retry_after,
            )
        case HTTPException():
            allowed = (error.headers or {}).get("Allow")
            message = f"this path is served with {allowed}" if allowed else str(error.detail)
            return Failure.of(error.status_code, message, _CODE_OF_STATUS[error.status_code])
        case _:
            log.error("a call failed", exc_info=error)
            return Failure.of(500, "internal error; the server's log says more", "internal_error")


def _param(error: AdapterError) -> str | None:
    return "model" if error.reason in ("ADAPTER_NOT_FOUND", "REVISION_NOT_FOUND", "ADAPTER_TASK") else None


def _invalid(error: ValidationError) -> InvalidRequestError:
    """All fields that are invalid, each with what is expected."""
    found: dict[str, str] = {}
    for each in error.errors():
        # A field with several types has an error for each, and the type's name behind its own.
        name = str(each["loc"][0]) if each["loc"] else ""
        what = "unknown field" if each["type"] == "extra_forbidden" else _lowered(each["msg"])
        if what not in found.get(name, ""):
            found[name] = f"{found[name]}, or {what}" if name in found else what
    named = [
        f"{name[:100]}: {what}" if name else f"the body is invalid: {what}" for name, what in found.items()
    ]
    more = f"; and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    first = next(iter(found))
    return InvalidRequestError(
        "; ".join(named[:_MAX_NAMED]) + more, **({"field": first[:100]} if first else {})
    )


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
