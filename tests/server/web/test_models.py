"""Models and tokens, over services that a test scripts."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import pytest

from turret_server.lifecycle.adapter_info import AdapterInfo, AdapterRevision, AdapterState
from turret_server.lifecycle.administration import MAX_PAGE_SIZE, AdapterPage
from turret_server.serving.request import AdapterRef
from turret_server.serving.tokens import Tokens

PIRATE = AdapterInfo(
    name="pirate",
    state=AdapterState.RESIDENT,
    revision="r2222222",
    history=(
        AdapterRevision(revision="r2222222", source="/srv/pirate", published_at=12.5),
        AdapterRevision(revision="r1111111", source="/srv/old", published_at=1.0),
    ),
)
FAILED = AdapterInfo(name="broken", state=AdapterState.FAILED, error="no such folder")
BASE = {
    "id": "base",
    "object": "model",
    "created": 1,
    "owned_by": "turret",
    "root": "base",
    "parent": None,
    "max_model_len": 256,
}
SHOWN = {
    "id": "pirate",
    "object": "model",
    "created": 12,
    "owned_by": "turret",
    "root": "/srv/pirate",
    "parent": "base",
    "revision": "r2222222",
}


class Administration:
    """Lists one adapter a page."""

    def __init__(self, *infos: AdapterInfo) -> None:
        self.infos = infos
        self.asked: list[tuple[int, str]] = []

    async def list(self, page_size, page_token, caller):  # noqa: ARG002
        self.asked.append((page_size, page_token))
        number = int(page_token or 0)
        following = str(number + 1) if number + 1 < len(self.infos) else ""
        return AdapterPage(adapters=self.infos[number : number + 1], next_page_token=following)

    async def get(self, name, caller):  # noqa: ARG002
        [info] = [info for info in self.infos if info.name == name]
        return info


class TokenService:
    def __init__(self) -> None:
        self.wanted = []

    async def tokens(self, wanted, caller):  # noqa: ARG002
        self.wanted.append(wanted)
        return Tokens(token_ids=(3, 4), parts=(b"A", b"\xff"), text="A?")


@pytest.fixture
def tokens():
    return TokenService()


@pytest.fixture
def door(open_door, tokens):
    return open_door(administration=Administration(PIRATE), tokens=tokens)


async def test_the_base_comes_first_and_then_what_can_be_used_of_every_page(open_door):
    unknown = replace(PIRATE, name="unknown", history=())
    secret = replace(PIRATE, name="secret", history=(replace(PIRATE.history[0], source=""),))
    administration = Administration(PIRATE, FAILED, unknown, secret)
    found = (await open_door(administration=administration).get("/v1/models")).json()
    assert found == {
        "object": "list",
        "data": [
            BASE,
            SHOWN,
            SHOWN | {"id": "unknown", "created": 1, "root": "unknown"},
            SHOWN | {"id": "secret", "root": "secret"},
        ],
    }
    assert administration.asked == [(MAX_PAGE_SIZE, token) for token in ("", "1", "2", "3")]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("base", BASE),
        ("pirate", SHOWN),
        ("base:pirate", SHOWN),
        ("pirate@r2222", SHOWN),
        ("pirate@r1111111", SHOWN),
    ],
)
async def test_a_model_is_shown_by_any_of_its_names(door, name, shown):
    assert (await door.get(f"/v1/models/{name}")).json() == shown


async def test_a_revision_that_a_model_never_had_is_not_found(door):
    refused = await door.get("/v1/models/pirate@r3")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("sent", "adapters", "special"),
    [
        ({"prompt": "A?"}, (), True),
        (
            {"prompt": "A?", "model": "pirate", "add_special_tokens": False},
            (AdapterRef(name="pirate"),),
            False,
        ),
    ],
)
async def test_the_tokens_of_a_text(door, tokens, sent, adapters, special):
    found = (await door.post("/tokenize", sent)).json()
    assert found == {"count": 2, "max_model_len": 256, "tokens": [3, 4], "token_strs": None}
    [wanted] = tokens.wanted
    assert (wanted.prompt, wanted.adapters, wanted.add_special_tokens) == ("A?", adapters, special)


async def test_the_tokens_of_a_chat_with_the_text_of_each(door, tokens):
    sent = {"messages": [{"role": "user", "content": "Hi"}], "return_token_strs": True}
    found = (await door.post("/tokenize", sent | {"add_generation_prompt": False})).json()
    assert found["token_strs"] == ["A", "bytes:\\xff"]
    [chat] = [wanted.prompt for wanted in tokens.wanted]
    assert [(message.role, message.content) for message in chat.messages] == [("user", ("Hi",))]
    assert not chat.add_generation_prompt


@pytest.mark.parametrize("sent", [{}, {"prompt": "A", "messages": [{"role": "user", "content": "Hi"}]}])
async def test_either_a_text_or_a_chat_has_tokens(door, tokens, sent):
    refused = await door.post("/tokenize", sent)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert tokens.wanted == []


async def test_the_text_of_tokens(door, tokens):
    assert (await door.post("/detokenize", {"tokens": [3, 4], "model": "pirate"})).json() == {"prompt": "A?"}
    [wanted] = tokens.wanted
    assert (list(wanted.prompt), wanted.adapters) == ([3, 4], (AdapterRef(name="pirate"),))


async def test_the_version_is_that_of_the_package(door):
    assert (await door.get("/version")).json() == {"version": version("turret")}
