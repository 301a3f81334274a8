from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.fake_device import make_spec
from support.guarded import guard
from turret_adapters.errors import AdapterSourceError, RevisionCorruptError
from turret_adapters.host import HostAdapter, ModuleDelta
from turret_adapters.host_memory import HostMemory
from turret_adapters.spec import Part

PATIENCE = 60.0


def adapter(revision: str, num_floats: int = 10) -> HostAdapter:
    rows = {Part.LORA_A: torch.zeros(1, num_floats)}
    return HostAdapter(spec=make_spec(revision, slab_pages=1), deltas={"m": ModuleDelta(rows=rows)})


class Disk:
    """Where everything can be read again; remembers what was."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.reads: Counter[str] = Counter()

    def read(self, revision: str) -> HostAdapter:
        self.reads[revision] += 1
        return adapter(revision, self.sizes.get(revision, 10))


@pytest.fixture
def disk() -> Disk:
    return Disk()


def test_tensors_of_every_kind_count():
    task = HostAdapter(spec=make_spec("t"), deltas={}, prompt_embeddings=torch.zeros(2, 3))
    whole = HostAdapter(
        spec=make_spec("w"),
        deltas={"m": ModuleDelta(rows={Part.LORA_A: torch.zeros(2, 4, dtype=torch.bfloat16)})},
        prefix_kv=torch.zeros(1, 2),
        tasks=(task, task),
    )
    assert whole.num_bytes == 16 + 8 + 2 * 24


def test_what_is_in_memory_is_not_read(disk):
    memory, kept = HostMemory(read=disk.read), adapter("1")
    memory.put(kept)
    assert memory.get("1") is kept
    assert memory.num_reads == 0
    assert memory.num_bytes == 40


def test_what_had_to_go_is_read_again(disk):
    memory = HostMemory(80, disk.read)
    for revision in "123":
        memory.put(adapter(revision))
    assert (len(memory), memory.num_bytes) == (2, 80)
    assert memory.get("1").spec.revision == "1"
    assert disk.reads == {"1": 1}
    assert memory.get("1") is memory.get("1")
    assert (len(memory), memory.num_bytes) == (2, 80)


def test_what_was_used_longest_ago_goes(disk):
    memory = HostMemory(80, disk.read)
    memory.put(adapter("1"))
    memory.put(adapter("2"))
    memory.get("1")
    memory.put(adapter("3"))
    memory.get("1")
    assert disk.reads == {}


def test_the_larger_goes_before_one_that_was_used_a_little_earlier(disk):
    memory = HostMemory(400, disk.read)
    memory.put(adapter("small", 10))
    memory.put(adapter("large", 80))
    memory.put(adapter("new", 20))
    memory.get("small")
    assert disk.reads == {}


def test_one_that_is_larger_than_all_memory_is_served_and_not_kept(disk):
    disk.sizes["large"] = 100
    memory = HostMemory(80, disk.read)
    memory.put(adapter("small"))
    memory.put(adapter("large", 100))
    assert memory.get("large").num_bytes == 400
    assert memory.get("small")
    assert disk.reads == {"large": 1}


def test_what_was_dropped_is_not_known(disk):
    memory = HostMemory(read=disk.read)
    memory.put(adapter("1"))
    memory.drop("1")
    memory.drop("never")
    assert (len(memory), memory.num_bytes) == (0, 0)
    with pytest.raises(KeyError):
        memory.get("1")


def test_what_is_dropped_while_it_is_read_is_not_kept():
    memory = HostMemory(0, lambda revision: (memory.drop(revision), adapter(revision))[1])
    memory.put(adapter("1"))
    memory.max_bytes = None
    assert memory.get("1").spec.revision == "1"
    assert len(memory) == 0


def test_files_that_have_changed_are_noticed():
    memory = HostMemory(0, lambda _: adapter("other"))
    memory.put(adapter("1"))
    with pytest.raises(AdapterSourceError, match="have changed"):
        memory.get("1")
    assert len(memory) == 0


def test_without_a_disk_what_had_to_go_is_gone():
    memory = HostMemory(0)
    memory.put(adapter("1"))
    with pytest.raises(AdapterSourceError, match="there is no store"):
        memory.get("1")


def test_one_revision_is_read_once_for_all_who_wait_and_two_at_the_same_time():
    both = threading.Barrier(2, timeout=PATIENCE)
    reads: Counter[str] = Counter()

    def read(revision: str) -> HostAdapter:
        reads[revision] += 1
        both.wait()
        return adapter(revision)

    memory = HostMemory(0, read)
    memory.put(adapter("1"))
    memory.put(adapter("2"))
    memory.max_bytes = None
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(memory.get, "12121212", timeout=PATIENCE))
    assert [each.spec.revision for each in found] == list("12121212")
    assert reads == {"1": 1, "2": 1}


@given(
    st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 5)), max_size=60),
    st.integers(0, 300),
)
def test_the_budget_holds_and_everything_known_can_be_had(actions, max_bytes):
    disk = Disk()
    memory = HostMemory(max_bytes, disk.read)
    known: set[str] = set()
    for action, number in actions:
        revision = str(number)
        disk.sizes[revision] = 5 * (number + 1)
        if action == "put":
            memory.put(adapter(revision, disk.sizes[revision]))
            known.add(revision)
        elif action == "drop":
            memory.drop(revision)
            known.discard(revision)
        elif revision in known:
            assert memory.get(revision).spec.revision == revision
        assert memory.num_bytes <= max_bytes
        assert memory.num_bytes == sum(kept.num_bytes for kept in memory._cached.values())
        assert memory._cached.keys() <= known


def test_one_that_is_only_known_is_read_when_it_is_asked_for(disk):
    memory = HostMemory(None, disk.read)
    memory.know(make_spec("1", slab_pages=1))
    assert len(memory) == 0
    assert memory.get("1").spec.revision == "1"
    assert memory.get("1").spec.revision == "1"
    assert disk.reads == {"1": 1}


def test_one_that_is_not_what_was_known_of_it_is_refused(disk):
    memory = HostMemory(None, disk.read)
    memory.know(make_spec("1", slab_pages=2))
    with pytest.raises(RevisionCorruptError, match="expected the shapes that were recorded"):
        memory.get("1")
    assert len(memory) == 0


def test_nothing_is_left_of_adapters_that_were_dropped(disk):
    memory = HostMemory(100, disk.read)
    for number in range(20):
        memory.put(adapter(f"put {number}"))
        memory.know(adapter(f"known {number}").spec)
        for name in (f"put {number}", f"known {number}"):
            memory.get(name)
    for number in range(20):
        memory.drop(f"put {number}")
        memory.drop(f"known {number}")
    assert (memory._known, memory._cached, memory._reading) == ({}, {}, {})
    assert (len(memory), memory.num_bytes) == (0, 0)


def test_what_fills_the_budget_exactly_stays(disk):
    memory = HostMemory(80, disk.read)
    memory.put(adapter("1"))
    memory.put(adapter("2"))
    assert (len(memory), memory.num_bytes) == (2, 80)
    memory = HostMemory(40, disk.read)
    memory.put(adapter("1"))
    assert memory.num_bytes == 40
    assert disk.reads == {}


def test_tensors_for_a_gpu_are_locked_when_they_are_added_and_when_they_are_read(disk, monkeypatch):
    """Page-locked memory needs a GPU; here a marker stands for it."""
    marker = torch.zeros(1)
    monkeypatch.setattr(HostAdapter, "page_locked", lambda self: replace(self, prompt_embeddings=marker))
    for page_locked in (True, False):
        memory = HostMemory(0, disk.read, page_locked=page_locked)
        memory.max_bytes = None
        memory.put(memory.prepare(adapter("added")))
        memory.know(adapter("read").spec)
        for revision in ("added", "read"):
            assert (memory.get(revision).prompt_embeddings is marker) == page_locked
        assert memory.num_reads == 1


def test_what_is_in_memory_is_read_and_written_under_its_lock(disk):
    memory = HostMemory(80, disk.read)
    guard(memory, memory._lock.locked, "_known", "_cached", "_reading")
    memory.know(adapter("known").spec)
    for revision in "123":
        memory.put(adapter(revision))
    for revision in ("1", "known", "1"):
        assert memory.get(revision).spec.revision == revision
    memory.drop("1")
    assert disk.reads == {"1": 1, "known": 1}


def test_memory_without_a_budget_evicts_nothing(disk):
    memory = HostMemory(read=disk.read)
    for number in range(50):
        memory.put(adapter(str(number), 1000))
    assert (len(memory), memory.max_bytes) == (50, None)


def test_as_many_go_as_it_takes_for_a_large_one_and_no_more(disk):
    memory = HostMemory(120, disk.read)
    for revision in "123":
        memory.put(adapter(revision))
    memory.put(adapter("large", 20))
    assert (len(memory), memory.num_bytes) == (2, 120)
    for revision in ("3", "large"):
        memory.get(revision)
    assert disk.reads == {}


def test_a_revision_that_is_not_readable_is_tried_again_and_counts_once_it_is_read():
    tries = []

    def read(revision: str) -> HostAdapter:
        tries.append(revision)
        if len(tries) < 3:
            raise AdapterSourceError("the disk is busy")
        return adapter(revision)

    memory = HostMemory(None, read)
    memory.know(adapter("1").spec)
    for _ in range(2):
        with pytest.raises(AdapterSourceError, match="busy"):
            memory.get("1")
        assert (memory.num_reads, len(memory)) == (0, 0)
    assert memory.get("1") is memory.get("1")
    assert memory.num_reads == 1


@pytest.mark.parametrize(("num_floats", "evicted"), [(19, "small"), (21, "large")])
def test_one_that_was_not_used_for_twice_as_long_goes_before_one_that_is_less_than_twice_as_large(
    num_floats, evicted, disk
):
    memory = HostMemory(40 + 4 * num_floats, disk.read)
    memory.put(adapter("small", 10))
    memory.put(adapter("large", num_floats))
    memory.put(adapter("new", 10))
    memory.max_bytes = None
    for revision in ("small", "large", "new"):
        memory.get(revision)
    assert disk.reads == {evicted: 1}
