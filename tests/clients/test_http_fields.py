"""The table of the HTTP API's fields, and the fields of OpenAI's own client: none may be missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from turret_server.web.chat import ChatBody
from turret_server.web.completions import CompletionBody

CLIENTS = Path(__file__).parents[2] / "clients"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("http_fields", CLIENTS / "http_fields.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_current(script):
    text = (CLIENTS / "README.md").read_text()
    assert script.with_table(text) == text, "run `make settings`"


@pytest.mark.parametrize(
    ("params", "body"), [(completion_create_params, CompletionBody), (chat_create_params, ChatBody)]
)
def test_every_field_of_openais_client_is_served_or_refused_by_name(params, body):
    of_client = {*params.CompletionCreateParamsBase.__annotations__, "stream"}
    assert of_client <= {*body.model_fields, *body.refused}
    assert body.model_fields.keys().isdisjoint(body.refused)


@pytest.mark.parametrize("body", [CompletionBody, ChatBody])
def test_every_field_says_what_it_means(body):
    assert [name for name, field in body.model_fields.items() if not field.description] == []
    assert all(why and not why.endswith(".") for why, _ in body.refused.values())
