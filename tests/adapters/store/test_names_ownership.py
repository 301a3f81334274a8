"""What an owner has stays within what they may have; what no name serves any more goes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from turret_adapters.errors import OwnerLimitError
from turret_adapters.store.names import Names, Ownership


@pytest.fixture
def open_names(tmp_path: Path) -> Iterator[Callable[[str], Names]]:
    opened: list[Names] = []

    def open_names(base: str) -> Names:
        opened.append(Names(tmp_path / "names.sqlite", base))
        return opened[-1]

    yield open_names
    for names in opened:
        names.close()


@pytest.fixture
def names(open_names: Callable[[str], Names]) -> Names:
    return open_names("llama")


def publish(
    names: Names, name: str, revision: str, num_bytes: int = 0, owner: str = "acme", **limits: int
) -> None:
    names.publish(name, revision, "", Ownership(owner=owner, num_bytes=num_bytes, **limits))


def kept(names: Names, *wanted: str) -> dict[str, list[str]]:
    return {name: [one.revision for one in found] for name, found in names.histories(wanted).items()}


def test_an_owner_has_so_many_names_and_no_more(names: Names) -> None:
    publish(names, "theirs", "r1", owner="bolt")
    publish(names, "a", "r1", max_names=2)
    publish(names, "b", "r1", max_names=2)
    with pytest.raises(
        OwnerLimitError, match=r"'c': tenant 'acme' may have 2 adapters .*found 2 others"
    ) as refused:
        publish(names, "c", "r1", max_names=2)
    assert refused.value.limit == "max_adapters"
    assert kept(names, "c") == {"c": []}
    publish(names, "a", "r2", max_names=2)
    names.remove("b")
    publish(names, "c", "r1", max_names=2)
    assert names.current()["c"].owner == "acme"


def test_a_name_belongs_to_whoever_published_what_it_serves(names: Names) -> None:
    publish(names, "a", "r1", max_names=1)
    publish(names, "a", "r2", owner="bolt", max_names=1)
    publish(names, "b", "r1", max_names=1)
    with pytest.raises(OwnerLimitError):
        publish(names, "c", "r1", owner="bolt", max_names=1)


def test_what_is_refused_changes_nothing(names: Names) -> None:
    publish(names, "a", "r1", 60)
    publish(names, "a", "r2", 60)
    with pytest.raises(OwnerLimitError, match=r"'b': .* adapters of 100 bytes .*found 110 with the 50"):
        publish(names, "b", "r3", 50, max_bytes=100)
    assert kept(names, "a", "b") == {"a": ["r2", "r1"], "b": []}


def test_earlier_revisions_go_first_and_the_oldest_of_them(names: Names) -> None:
    publish(names, "a", "r1", 30)
    publish(names, "b", "r2", 30)
    publish(names, "b", "r3", 30)
    publish(names, "a", "r4", 30, max_bytes=100)
    assert kept(names, "a", "b") == {"a": ["r4"], "b": ["r3", "r2"]}
    assert names.owned("acme") == {"r2", "r3", "r4"}
    publish(names, "a", "r5", 90, max_bytes=120)
    assert kept(names, "a", "b") == {"a": ["r5"], "b": ["r3"]}


def test_a_revision_that_several_names_serve_counts_once(names: Names) -> None:
    publish(names, "a", "r1", 60, max_bytes=100)
    publish(names, "b", "r1", 60, max_bytes=100)
    publish(names, "a", "r2", 40, max_bytes=100)
    # `a` has forgotten it, and `b` serves it still.
    assert names.owned("acme") == {"r1", "r2"}
    with pytest.raises(OwnerLimitError):
        publish(names, "c", "r3", 1, max_bytes=100)


def test_what_requests_still_go_to_is_served(names: Names) -> None:
    publish(names, "a", "r1", 60)
    publish(names, "a", "r2", 40)
    names.split("a", "r1", 10)
    with pytest.raises(OwnerLimitError):
        publish(names, "a", "r3", 41, max_bytes=100)
    names.split("a", "r1", 0)
    publish(names, "a", "r3", 41, max_bytes=100)
    assert kept(names, "a") == {"a": ["r3", "r2"]}


def test_others_and_other_bases_count_for_themselves(open_names: Callable[[str], Names]) -> None:
    llama, qwen = open_names("llama"), open_names("qwen")
    publish(llama, "a", "r1", 60, max_bytes=100)
    publish(llama, "b", "r2", 60, owner="bolt", max_bytes=100)
    publish(qwen, "a", "r3", 60, max_bytes=100)
    with pytest.raises(OwnerLimitError):
        publish(llama, "c", "r4", 60, max_bytes=100)


def test_what_is_loaded_again_is_the_last_owners(names: Names) -> None:
    publish(names, "a", "r1", 60, owner="bolt")
    publish(names, "a", "r1", 60, max_bytes=60)
    assert names.owned("bolt") == set()
    assert names.owned("acme") == {"r1"}
