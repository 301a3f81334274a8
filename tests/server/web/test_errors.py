from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from turret_adapters.errors import AdapterNotFoundError, StoreBusyError
from turret_server.errors import (
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    QuotaExceededError,
    ShuttingDownError,
    UnauthenticatedError,
)
from turret_server.web.completions import CompletionBody
from turret_server.web.errors import to_failure


def error_of(error: Exception) -> dict[str, object]:
    failure = to_failure(error)
    body = json.loads(failure.body)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return {"status": failure.status, **body["error"]}


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InvalidRequestError("x", field="top_k"), 400, "invalid_request_error", "invalid_request", "top_k"),
        (PromptTooLongError("x"), 400, "invalid_request_error", "context_length_exceeded", None),
        (UnauthenticatedError("x"), 401, "authentication_error", "invalid_api_key", None),
        (AdapterNotFoundError("x"), 404, "not_found_error", "model_not_found", "model"),
        (HTTPException(404, "x"), 404, "not_found_error", "unknown_url", None),
        (QueueFullError("x", retry_after=1.5), 429, "rate_limit_error", "queue_full", None),
        (QuotaExceededError("x"), 429, "rate_limit_error", "rate_limit_exceeded", None),
        (ShuttingDownError("x"), 503, "server_error", "shutting_down", None),
        (StoreBusyError("x"), 503, "server_error", "store_busy", None),
    ],
)
def test_an_error_has_a_status_and_openais_form(error, status, kind, code, param):
    assert error_of(error) == {"status": status, "message": "x", "type": kind, "code": code, "param": param}


def test_whoever_may_retry_is_told_when_in_whole_seconds():
    assert (b"retry-after", b"2") in to_failure(QueueFullError("full", retry_after=1.5)).headers
    assert dict(to_failure(QuotaExceededError("full")).headers) == {b"content-type": b"application/json"}


def test_whoever_has_no_key_is_told_how_to_give_one():
    assert (b"www-authenticate", b"Bearer") in to_failure(UnauthenticatedError("no key")).headers


def test_an_error_of_ours_is_logged_and_its_words_stay_here(caplog):
    found = error_of(ZeroDivisionError("a secret"))
    assert (found["status"], found["type"]) == (500, "server_error")
    assert "secret" not in str(found)
    [logged] = caplog.records
    assert logged.exc_info


def invalid(body: object) -> dict[str, object]:
    with pytest.raises(ValidationError) as refused:
        CompletionBody.model_validate_json(json.dumps(body))
    return error_of(refused.value)


def test_every_field_that_is_invalid_is_named():
    found = invalid({"prompt": "x", "temperature": "hot", "n": 0, "mood": "good"})
    for part in ("temperature: input should be a valid number", "n: input should be", "mood: unknown field"):
        assert part in str(found["message"])
    assert found["param"] == "temperature"


def test_a_field_with_several_types_is_named_once():
    found = invalid({"prompt": 1})
    assert str(found["message"]).count("prompt:") == 1
    assert found["param"] == "prompt"


def test_of_many_errors_the_first_are_named_and_the_others_counted():
    found = invalid({"prompt": "x", **{f"field{number}": 1 for number in range(20)}})
    assert str(found["message"]).endswith("field7: unknown field; and 12 more")


def test_a_body_that_is_no_object_is_refused():
    found = invalid([1])
    assert (found["status"], found["param"]) == (400, None)
    assert str(found["message"]).startswith("the body is invalid")


def test_long_names_and_messages_are_cut_and_names_that_are_no_utf8_escaped():
    assert len(str(invalid({"prompt": "x", "f" * 10_000: 1})["message"])) < 300
    assert len(str(error_of(InvalidRequestError("x" * 10_000))["message"])) == 2000
    assert error_of(InvalidRequestError("/srv/\udcff"))["message"] == "/srv/\\udcff"
