from __future__ import annotations

import re
from pathlib import Path

import pytest

import turret_client
from generate_sync import sync_source

ASYNC = (Path(turret_client.__file__).with_name("_async.py")).read_text()


def test_nothing_asynchronous_is_left():
    left = re.findall(r"\b(?:async|await|aio|asyncio|aiter|anext|__a\w+__|Async\w+)\b", sync_source(ASYNC))
    assert left == []


def test_something_asynchronous_without_a_rule_is_refused():
    with pytest.raises(ValueError, match=r"add a rule .* asyncio\.sleep"):
        sync_source(ASYNC + "\nasync def wait() -> None:\n    await asyncio.sleep(1)\n")


def test_a_rule_that_applies_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"nothing that matches .*to_thread"):
        sync_source(ASYNC.replace("asyncio.to_thread", "in_thread"))


def test_calls_of_the_blocking_client_are_futures_that_can_be_cancelled():
    source = sync_source(ASYNC)
    assert "call = method.future(" in source
    assert "return result_of(call)" in source
