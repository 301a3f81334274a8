"""Names whose tensors are read once they are needed: what turns out to be something else is not served."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.fake_device import make_spec
from turret_adapters.errors import AdapterNotFoundError, AdapterSourceError, RevisionCorruptError
from turret_adapters.host import HostAdapter
from turret_adapters.host_memory import HostMemory
from turret_adapters.registry import AdapterRegistry, Lease, Named
from turret_adapters.store.names import Split


def host(revision: str) -> HostAdapter:
    return HostAdapter(spec=make_spec(revision, slab_pages=1), deltas={})


def acquire(registry: AdapterRegistry, name: str) -> Lease:
    return registry.acquire([Named(name)])


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
