"""Names whose tensors are read once they are needed: what turns out to be something else is not served."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.fake_device import make_spec
from support.registries import acquire, host
from turret_adapters.errors import (
    AdapterBaseError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterSourceError,
    RevisionCorruptError,
    RevisionNotFoundError,
    SourceTooLargeError,
    SourceUnavailableError,
    StoreFailedError,
)
from turret_adapters.host import HostAdapter
from turret_adapters.host_memory import HostMemory
from turret_adapters.registry import AdapterRegistry, Named
from turret_adapters.spec import TASK_MARK
from turret_adapters.store.names import Split


def memory_of(disk: dict[str, HostAdapter]) -> HostMemory:
    def read(revision: str) -> HostAdapter:
        if revision not in disk:
            raise AdapterSourceError("the disk is busy")
        return disk[revision]

    return HostMemory(None, read)


def test_a_revision_that_is_not_what_it_was_ends_its_names_with_the_reason():
    known = replace(host("1").spec, num_parameters=7)
    registry = AdapterRegistry(memory_of({"1": host("1"), "2": host("2")}))
    gone, lost, told = [], [], []
    registry.on_gone, registry.on_change = gone.append, told.append
    registry.on_lost = lambda revision, _: lost.append(revision)
    for name in ("poet", "bard"):
        registry.publish_unread(name, known)
    registry.publish_unread("sailor", host("2").spec)
    lease = acquire(registry, "poet")
    with pytest.raises(RevisionCorruptError):
        registry.tensors("1")
    assert lost == ["1"]
    for name in ("poet", "bard"):
        with pytest.raises(AdapterNotFoundError, match="could not be loaded"):
            acquire(registry, name)
        assert "found others" in registry.status(name).error
    assert {status.name for status in told if status.error} == {"poet", "bard"}
    assert gone == []
    registry.release(lease)
    assert gone == ["1"]
    assert registry.tensors("2").spec == host("2").spec
    registry.publish("poet", host("1"))
    assert registry.tensors("1").spec == host("1").spec


def test_a_revision_that_cannot_be_read_just_now_stays():
    registry = AdapterRegistry(memory_of({}))
    registry.publish_unread("poet", host("1").spec)
    with pytest.raises(AdapterSourceError):
        registry.tensors("1")
    assert registry.status("poet").error == ""
    assert acquire(registry, "poet")


def test_a_split_with_a_revision_that_is_not_what_it_was_ends():
    registry = AdapterRegistry(memory_of({"1": host("1"), "2": host("2")}))
    registry.publish_unread("poet", host("1").spec)
    registry.publish_unread("other", replace(host("2").spec, num_parameters=7))
    assert registry.hold("2")
    registry.split("poet", Split("2", 100))
    with pytest.raises(RevisionCorruptError):
        registry.tensors("2")
    assert registry.status("poet").split is None
    assert acquire(registry, "poet").revision == "1"


def multitask(revision: str) -> HostAdapter:
    task = HostAdapter(spec=make_spec(f"{revision}{TASK_MARK}0", num_virtual=1), deltas={})
    spec = replace(make_spec(revision, num_virtual=1), num_tasks=1)
    return HostAdapter(spec=spec, deltas={}, tasks=(task,))


@pytest.mark.parametrize("used", ["a task", "a joined prefix"])
def test_what_is_read_for_a_part_of_a_request_ends_the_whole_name(used: str):
    other = HostAdapter(spec=make_spec("2", num_virtual=1), deltas={}, prefix_kv=torch.zeros(1, 1, 2, 1, 1))
    registry = AdapterRegistry(memory_of({"1": multitask("1"), "2": other}))
    lost: list[tuple[str, str]] = []

    def ask(revision: str, error: AdapterError) -> None:
        # It runs outside the registry's lock.
        lost.append((revision, registry.status("many").error))
        assert str(error) == lost[-1][1]

    registry.on_lost = ask
    registry.publish_unread("many", replace(multitask("1").spec, num_parameters=7))
    registry.publish_unread("other", other.spec)
    named = [Named("many", task=0)] if used == "a task" else [Named("other"), Named("many", task=0)]
    lease = registry.acquire(named)
    with pytest.raises(RevisionCorruptError) as refused:
        registry.tensors(lease.joined or f"1{TASK_MARK}0")
    assert lost == [("1", str(refused.value))]
    assert registry.status("other").error == ""
    status = registry.status("many")
    assert (status.spec.revision, status.draining_revisions, status.unloaded) == ("1", ("1",), False)
    registry.release(lease)
    assert not registry.has("1")
    assert registry.status("many").spec is None


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (AdapterBaseError("another base"), True),
        (AdapterFormatError("no tensors"), True),
        (RevisionCorruptError("other bytes"), True),
        (RevisionNotFoundError("not in the store"), True),
        (SourceUnavailableError("too slow"), False),
        (SourceTooLargeError("too large"), False),
        (StoreFailedError("no disk"), False),
    ],
)
def test_errors_that_a_retry_does_not_fix_end_a_name(error: AdapterError, ends: bool):  # noqa: FBT001
    def read(_revision: str) -> HostAdapter:
        raise error

    registry = AdapterRegistry(HostMemory(None, read))
    registry.publish_unread("poet", host("1").spec)
    with pytest.raises(type(error)):
        registry.tensors("1")
    assert registry.status("poet").error == (str(error) if ends else "")


def test_a_revision_that_is_lost_as_current_one_and_as_a_split_ends_both():
    registry = AdapterRegistry(memory_of({"1": host("1")}))
    told = []
    registry.publish_unread("poet", replace(host("1").spec, num_parameters=7))
    registry.publish("other", host("2"))
    for name in ("poet", "other"):
        registry.split(name, Split("1", 50))
    registry.on_change = told.append
    with pytest.raises(RevisionCorruptError):
        registry.tensors("1")
    assert [(each.name, each.split, bool(each.error)) for each in told] == [
        ("poet", None, True),
        ("other", None, False),
    ]
    assert not registry.has("1")


def test_the_lost_current_revision_of_a_name_leaves_its_split():
    registry = AdapterRegistry(memory_of({"1": host("1")}))
    registry.publish_unread("poet", replace(host("1").spec, num_parameters=7))
    registry.add(host("2"))
    registry.split("poet", Split("2", 50))
    registry.unhold("2")
    with pytest.raises(RevisionCorruptError):
        registry.tensors("1")
    assert registry.status("poet").split == Split("2", 50)
    assert registry.has("2")
    registry.remove("poet")
    assert not registry.has("2")


def test_a_revision_that_is_in_memory_is_published_without_reading_it():
    registry = AdapterRegistry(memory_of({}))
    registry.publish("poet", host("1"))
    registry.publish_unread("bard", host("1").spec)
    assert registry.tensors("1").spec == host("1").spec
