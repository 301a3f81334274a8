"""The calls that administer adapters, over an administration that a test scripts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.sources.fetch import Download
from turret_adapters.spec import Method, Split
from turret_server.engine.request import DEFAULT_TENANT
from turret_server.lifecycle.adapter_info import AdapterInfo, AdapterRevision, AdapterState
from turret_server.lifecycle.administration import AdapterPage

PIRATE = AdapterInfo(
    name="pirate",
    state=AdapterState.RESIDENT,
    revision="r2",
    method=Method.LORA,
    num_parameters=7,
    max_rank=3,
    num_virtual_tokens=5,
    num_tasks=2,
    vocab_size=9,
    own_tokenizer=True,
    file_bytes=11,
    arena_bytes=13,
    active_requests=1,
    draining_revisions=("r0",),
    split=Split("r1", 20),
    history=(
        AdapterRevision(revision="r2", source="/srv/pirate", published_at=12.5),
        AdapterRevision(revision="r1", source="/srv/old", published_at=1.0),
    ),
)
HISTORY = [
    {"revision": "r2", "source": "/srv/pirate", "published_at": 12.5},
    {"revision": "r1", "source": "/srv/old", "published_at": 1.0},
]
SHOWN = {
    "name": "pirate",
    "state": "resident",
    "revision": "r2",
    "method": "lora",
    "num_parameters": 7,
    "max_rank": 3,
    "num_virtual_tokens": 5,
    "num_tasks": 2,
    "vocab_size": 9,
    "own_tokenizer": True,
    "file_bytes": 11,
    "arena_bytes": 13,
    "active_requests": 1,
    "draining_revisions": ["r0"],
    "error": "",
    "split": {"revision": "r1", "percent": 20},
    "history": HISTORY,
}
BROKEN = AdapterInfo(name="broken", state=AdapterState.FAILED, error="no such folder")


class Administration:
    """Notes what it is asked, and answers with one adapter, except for the names in `absent`."""

    def __init__(self):
        self.asked, self.absent, self.next_page_token = [], set(), ""

    def __getattr__(self, method):
        async def answer(name, *values):
            *values, caller = values
            assert caller.tenant.name == DEFAULT_TENANT
            self.asked.append((method, name, *values))
            if name in self.absent:
                raise AdapterNotFoundError("no such adapter", name=name)
            return PIRATE if name != "broken" else BROKEN

        return answer

    async def upload_archive(self, name, chunks, caller):
        assert caller.tenant.name == DEFAULT_TENANT
        self.asked.append(("upload_archive", name, b"".join([chunk async for chunk in chunks])))
        return PIRATE

    async def list(self, page_size, page_token, caller):
        assert caller.tenant.name == DEFAULT_TENANT
        self.asked.append(("list", page_size, page_token))
        return AdapterPage(adapters=(PIRATE, BROKEN), next_page_token=self.next_page_token)

    def downloads(self, caller):
        assert caller.tenant.name == DEFAULT_TENANT
        return [Download("whole", num_done=1, num_total=2), Download("unknown", num_done=3)]


@pytest.fixture
def site(open_door):
    administration = Administration()
    door = open_door(administration=administration)

    async def call(method, path, **sent):
        async with door.client() as client:
            return await client.request(method, path, **sent)

    return SimpleNamespace(call=call, administration=administration)


SPLIT = {"revision": "r1", "percent": 10}


@pytest.mark.parametrize(
    ("method", "path", "sent", "asked"),
    [
        ("GET", "a", {}, ("get", "a")),
        ("PUT", "a", {"json": {"source": "/srv/a"}}, ("load", "a", "/srv/a")),
        ("DELETE", "a", {}, ("unload", "a")),
        ("PUT", "a/archive", {"content": b"bytes"}, ("upload_archive", "a", b"bytes")),
        ("POST", "a/rollback", {}, ("rollback", "a", None)),
        ("POST", "a/rollback", {"json": {"revision": "r1"}}, ("rollback", "a", "r1")),
        ("PUT", "a/split", {"json": SPLIT}, ("split", "a", "r1", 10)),
        ("DELETE", "a/split", {}, ("split", "a", "", 0)),
    ],
)
async def test_a_call_is_passed_on_and_answered_with_the_adapter(site, method, path, sent, asked):
    answer = await site.call(method, f"/v1/adapters/{path}", **sent)
    assert (answer.status_code, answer.json()) == (200, SHOWN)
    assert site.administration.asked == [asked]


async def test_adapters_are_listed_in_pages(site):
    site.administration.next_page_token = "broken"
    answer = (await site.call("GET", "/v1/adapters?page_size=2&page_token=a")).json()
    assert [each["name"] for each in answer["adapters"]] == ["pirate", "broken"]
    failed = answer["adapters"][1]
    assert (failed["method"], failed["split"], failed["history"]) == (None, None, [])
    assert answer["next_page_token"] == "broken"
    site.administration.next_page_token = ""
    assert (await site.call("GET", "/v1/adapters")).json()["next_page_token"] is None
    await site.call("GET", "/v1/adapters?page_size=999999999")
    assert site.administration.asked == [("list", 2, "a"), ("list", 0, ""), ("list", 999999999, "")]


@pytest.mark.parametrize("size", ["", "-1", "x", "²", "1" * 10, "1" * 5000])
async def test_a_page_size_is_a_number(site, size):
    refused = await site.call("GET", "/v1/adapters", params={"page_size": size})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "page_size")
    assert site.administration.asked == []


async def test_a_split_of_nothing_is_refused(site):
    refused = await site.call("PUT", "/v1/adapters/a/split", json={"revision": "r1", "percent": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "percent")


async def test_revisions_and_downloads_are_listed(site):
    assert (await site.call("GET", "/v1/adapters/a/revisions")).json() == {"revisions": HISTORY}
    assert (await site.call("GET", "/v1/downloads")).json() == {
        "downloads": [
            {"name": "whole", "done_bytes": 1, "total_bytes": 2},
            {"name": "unknown", "done_bytes": 3, "total_bytes": None},
        ]
    }


async def test_vllms_call_replaces_an_adapter_only_if_that_is_asked_for(site):
    async def load(name, **more):
        return await site.call(
            "POST", "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "/srv/a"} | more
        )

    refused = await load("a")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_name")
    site.administration.absent = {"new"}
    # What failed may be tried again.
    for name, more in (("a", {"load_inplace": True}), ("broken", {})):
        assert (await load(name, **more)).text == f"Success: LoRA adapter '{name}' added successfully."
    await load("new")
    loads = [asked for asked in site.administration.asked if asked[0] == "load"]
    assert loads == [("load", name, "/srv/a") for name in ("a", "broken", "new")]
    unloaded = await site.call("POST", "/v1/unload_lora_adapter", json={"lora_name": "a"})
    assert unloaded.text == "Success: LoRA adapter 'a' removed successfully."
    assert site.administration.asked[-1] == ("unload", "a")
