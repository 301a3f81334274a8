from __future__ import annotations

import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from support.guarded import guard
from support.registries import Watched, acquire, host, multitask, prefix
from turret_adapters.errors import (
    AdapterNotFoundError,
    AdapterSourceError,
    AdapterTaskError,
)
from turret_adapters.host import HostAdapter
from turret_adapters.host_memory import HostMemory
from turret_adapters.registry import AdapterRegistry, AdapterStatus, Lease, Named
from turret_adapters.store.names import Split


@pytest.fixture
def registry() -> Watched:
    return Watched()


class Preparing(HostMemory):
    """Notes whether the registry was locked while an adapter was copied to page-locked memory."""

    registry: AdapterRegistry

    def prepare(self, adapter: HostAdapter) -> HostAdapter:
        assert not self.registry._lock.locked()
        return super().prepare(adapter)


def test_the_registry_is_not_locked_while_tensors_are_copied_to_page_locked_memory():
    memory = Preparing()
    memory.registry = AdapterRegistry(memory)
    memory.registry.publish("poet", host("1"))
    memory.registry.add(host("2"))
    assert len(memory) == 2


def test_a_name_that_was_never_loaded_is_not_found(registry):
    for call in (partial(acquire, registry), registry.remove, registry.status):
        with pytest.raises(AdapterNotFoundError, match="'poet'"):
            call("poet")
    assert registry.statuses() == []


def test_a_request_gets_the_revision_that_its_name_has_now(registry):
    first, second = host("1"), host("2")
    registry.publish("poet", first)
    assert acquire(registry, "poet").uses == ((first.spec, 1.0),)
    registry.publish("poet", second)
    assert acquire(registry, "poet").uses == ((second.spec, 1.0),)
    assert registry.tensors("1") is first
    assert registry.tensors("2") is second


def test_a_replaced_revision_is_gone_after_its_last_request(registry):
    registry.publish("poet", host("1"))
    held = [acquire(registry, "poet") for _ in range(2)]
    registry.publish("poet", host("2"))
    assert registry.status("poet").draining_revisions == ("1",)
    assert registry.status("poet").active_requests == 0
    registry.release(held[0])
    assert registry.gone == []
    registry.release(held[1])
    assert registry.gone == ["1"]
    assert registry.status("poet").draining_revisions == ()


def test_a_replaced_revision_that_nobody_runs_is_gone_at_once(registry):
    registry.publish("poet", host("1"))
    registry.publish("poet", host("2"))
    assert registry.gone == ["1"]


def test_a_name_that_ends_its_requests_stays_loaded(registry):
    registry.publish("poet", host("1"))
    registry.release(acquire(registry, "poet"))
    assert registry.gone == []
    assert acquire(registry, "poet")


def test_an_unloaded_name_drains(registry):
    registry.publish("poet", host("1"))
    held = acquire(registry, "poet")
    removed = registry.remove("poet")
    assert (removed.spec, removed.active_requests, removed.unloaded) == (held.uses[0][0], 1, True)
    with pytest.raises(AdapterNotFoundError):
        acquire(registry, "poet")
    with pytest.raises(AdapterNotFoundError):
        registry.remove("poet")
    status = registry.status("poet")
    assert (status.spec, status.unloaded, status.draining_revisions) == (held.uses[0][0], True, ("1",))
    registry.release(held)
    assert registry.gone == ["1"]
    assert registry.statuses() == []


def test_an_unloaded_name_can_be_loaded_again_while_it_drains(registry):
    registry.publish("poet", host("1"))
    held = acquire(registry, "poet")
    registry.remove("poet")
    registry.publish("poet", host("1"))
    registry.release(held)
    assert registry.gone == []
    assert acquire(registry, "poet") == held


def test_the_same_content_again_changes_nothing(registry):
    first = host("1")
    registry.publish("poet", first)
    registry.publish("poet", host("1"))
    assert registry.gone == []
    assert registry.tensors("1") is first


def test_content_under_two_names_lives_as_long_as_either(registry):
    registry.publish("poet", host("1"))
    registry.publish("bard", host("1"))
    held = acquire(registry, "bard")
    registry.remove("poet")
    registry.remove("bard")
    assert registry.gone == []
    registry.release(held)
    assert registry.gone == ["1"]


def test_requests_are_counted_by_name(registry):
    registry.publish("poet", host("1"))
    registry.publish("bard", host("1"))
    acquire(registry, "poet")
    assert [status.active_requests for status in registry.statuses()] == [0, 1]
    assert [status.name for status in registry.statuses()] == ["bard", "poet"]


def test_a_name_that_could_not_be_loaded_says_why(registry):
    registry.fail("poet", "no such folder")
    status = registry.status("poet")
    assert (status.spec, status.error, status.unloaded) == (None, "no such folder", False)
    with pytest.raises(AdapterNotFoundError, match="no such folder"):
        acquire(registry, "poet")
    registry.remove("poet")
    assert registry.statuses() == []


def test_a_load_that_fails_leaves_the_adapter_that_is_there(registry):
    registry.publish("poet", host("1"))
    registry.fail("poet", "no such folder")
    assert acquire(registry, "poet").revision == "1"
    assert registry.status("poet").error == ""


def test_a_load_that_works_ends_the_failure(registry):
    registry.fail("poet", "no such folder")
    registry.publish("poet", host("1"))
    assert registry.status("poet").error == ""
    assert acquire(registry, "poet").revision == "1"


def test_a_revision_released_too_often_is_noticed(registry):
    registry.publish("poet", host("1"))
    held = acquire(registry, "poet")
    registry.release(held)
    with pytest.raises(AssertionError, match="more often"):
        registry.release(held)


def test_a_revision_that_no_name_has_stays_while_it_is_held_or_a_request_runs_on_it(registry):
    registry.publish("poet", host("2"))
    assert not registry.hold("1")
    registry.add(host("1"))
    held = registry.acquire([Named("poet", revision="1")])
    assert held.revision == "1"
    assert registry.status("poet").spec.revision == "2"
    assert registry.status("poet").draining_revisions == ("1",)
    assert registry.hold("1")
    registry.unhold("1")
    registry.unhold("1")
    assert (registry.gone, registry.has("1")) == ([], True)
    registry.release(held)
    assert (registry.gone, registry.has("1")) == (["1"], False)


def test_a_name_serves_its_current_revision_alone(registry):
    registry.publish("poet", host("1"))
    registry.publish("poet", host("2"))
    assert registry.serves("poet", "2")
    assert not registry.serves("poet", "1")
    assert not registry.serves("bard", "2")


def placed(registry: AdapterRegistry, place: float) -> str:
    lease = registry.acquire([Named("poet", place=place)])
    registry.release(lease)
    return lease.revision


def test_a_split_sends_those_before_its_percent_to_its_revision(registry):
    registry.add(host("1"))
    registry.publish("poet", host("2"))
    registry.split("poet", Split("1", 30))
    registry.unhold("1")
    assert [placed(registry, place) for place in (0.0, 0.29, 0.3, 0.99, 1.0)] == ["1", "1", "2", "2", "2"]
    assert acquire(registry, "poet").revision == "2"
    assert registry.serves("poet", "1")
    status = registry.status("poet")
    assert (status.split, status.draining_revisions) == (Split("1", 30), ())
    registry.split("poet", Split("1", 100))
    assert placed(registry, 0.999) == "1"
    assert registry.gone == []


def test_a_split_that_ends_drains_its_revision(registry):
    registry.add(host("1"))
    registry.publish("poet", host("2"))
    registry.split("poet", Split("1", 30))
    registry.unhold("1")
    held = registry.acquire([Named("poet", place=0.1)])
    registry.split("poet", None)
    assert placed(registry, 0.1) == "2"
    assert registry.status("poet").draining_revisions == ("1",)
    registry.release(held)
    assert registry.gone == ["1"]


def test_a_split_ends_with_its_name(registry):
    registry.add(host("1"))
    registry.publish("poet", host("2"))
    registry.split("poet", Split("1", 30))
    registry.unhold("1")
    registry.remove("poet")
    assert sorted(registry.gone) == ["1", "2"]
    assert registry.statuses() == []


def test_every_change_of_a_name_is_published(registry):
    told = []
    registry.on_change = told.append
    registry.publish("poet", host("1"))
    held = acquire(registry, "poet")
    registry.publish("poet", host("2"))
    registry.release(held)
    registry.release(acquire(registry, "poet"))
    registry.remove("poet")
    registry.fail("bard", "broken")
    said = [
        (each.name, each.spec and each.spec.revision, each.draining_revisions, each.unloaded, each.error)
        for each in told
    ]
    assert said == [
        ("poet", "1", (), False, ""),
        ("poet", "2", ("1",), False, ""),
        ("poet", "2", (), False, ""),
        ("poet", "2", (), True, ""),
        ("bard", None, (), False, "broken"),
    ]


NAMES = st.sampled_from(["a", "b", "c"])
REVISIONS = st.sampled_from(["1", "2", "3", "4"])


class Lives(RuleBasedStateMachine):
    """Against the plainest model: what each name points at, and the requests that run."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.registry = Watched()
        self.current: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.running: Counter[tuple[str, str]] = Counter()
        self.alive: set[str] = set()
        self.num_gone = 0

    @rule(name=NAMES, revision=REVISIONS)
    def publish(self, name: str, revision: str) -> None:
        self.registry.publish(name, host(revision))
        self.current[name] = revision
        self.failed.pop(name, None)
        self.alive.add(revision)

    @rule(name=NAMES)
    def fail(self, name: str) -> None:
        self.registry.fail(name, "broken")
        if name not in self.current:
            self.failed[name] = "broken"

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name in self.current or name in self.failed:
            assert self.registry.remove(name).unloaded
            self.current.pop(name, None)
            self.failed.pop(name, None)
        else:
            with pytest.raises(AdapterNotFoundError):
                self.registry.remove(name)

    @rule(target=requests, name=NAMES)
    def acquire(self, name: str) -> tuple[str, Lease] | None:
        if name not in self.current:
            with pytest.raises(AdapterNotFoundError):
                acquire(self.registry, name)
            return None
        lease = acquire(self.registry, name)
        assert lease.revision == self.current[name]
        self.running[name, lease.revision] += 1
        return name, lease

    @rule(request=consumes(requests))
    def release(self, request: tuple[str, Lease] | None) -> None:
        if request:
            name, lease = request
            self.registry.release(lease)
            self.running[name, lease.revision] -= 1

    @invariant()
    def tensors_live_as_long_as_they_are_needed(self) -> None:
        running = {key for key, count in self.running.items() if count}
        needed = {*self.current.values(), *(revision for _, revision in running)}
        for revision in needed:
            assert self.registry.tensors(revision).spec.revision == revision
        gone = self.registry.gone[self.num_gone :]
        assert sorted(gone) == sorted(self.alive - needed)
        self.alive, self.num_gone = needed, len(self.registry.gone)

    @invariant()
    def statuses_say_how_it_is(self) -> None:
        running = {key for key, count in self.running.items() if count}
        statuses = {status.name: status for status in self.registry.statuses()}
        assert statuses.keys() == {*self.current, *self.failed, *(name for name, _ in running)}
        for name, status in statuses.items():
            draining = {revision for owner, revision in running if owner == name}
            assert set(status.draining_revisions) == draining - {self.current.get(name)}
            assert status.unloaded == (name not in self.current and name not in self.failed)
            assert status.error == self.failed.get(name, "")
            assert self.registry.status(name) == status
            if name in self.current:
                assert status.spec
                assert status.spec.revision == self.current[name]
            if status.spec:
                assert status.active_requests == self.running[name, status.spec.revision]


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def load_and_remove(registry: AdapterRegistry, number: int) -> None:
    for turn in range(150):
        registry.publish("poet", host(f"{number}-{turn % 7}"))
        if turn % 5 == 0:
            with contextlib.suppress(AdapterNotFoundError):
                registry.remove("poet")


def run_requests(registry: AdapterRegistry, _: int) -> None:
    for _ in range(300):
        with contextlib.suppress(AdapterNotFoundError):
            lease = acquire(registry, "poet")
            assert registry.tensors(lease.revision).spec == lease.uses[0][0]
            registry.release(lease)


def test_threads_that_load_swap_and_run_leave_nothing_behind(registry):
    with ThreadPoolExecutor(6) as pool:
        futures = [
            pool.submit(work, registry, number)
            for number in range(3)
            for work in (load_and_remove, run_requests)
        ]
    for future in futures:
        future.result()
    with contextlib.suppress(AdapterNotFoundError):
        registry.remove("poet")
    assert registry.statuses() == []
    assert (registry._specs, registry._needed, len(registry._memory)) == ({}, {}, 0)


def test_nothing_is_left_of_what_was_unloaded_and_released(registry):
    for number in range(3):
        revisions = [f"{number}{kind}" for kind in range(5)]
        registry.publish("poet", host(revisions[0]))
        registry.publish("poet", host(revisions[1]))
        registry.publish("many", multitask(revisions[2], 3))
        registry.publish("first", prefix(revisions[3], 2))
        registry.publish_unread("second", prefix(revisions[4], 3).spec)
        registry.add(host(f"{number}held"))
        registry.split("poet", Split(f"{number}held", 50))
        registry.unhold(f"{number}held")
        leases = [
            registry.acquire([Named("poet", place=0.1)]),
            registry.acquire([Named("many", task=1)]),
            registry.acquire([Named("first"), Named("second"), Named("poet")]),
            registry.acquire([Named("first"), Named("second")]),
        ]
        with pytest.raises(AdapterTaskError):
            registry.acquire([Named("first"), Named("second"), Named("many")])
        registry.fail("broken", "why")
        for name in ("poet", "many", "first", "second", "broken"):
            registry.remove(name)
        for lease in leases:
            registry.release(lease)
    assert (registry._names, registry._specs, registry._needed, registry._joined) == ({}, {}, {}, {})
    assert (len(registry._memory), registry._memory._known) == (0, {})
    assert len(set(registry.gone)) == len(registry.gone), "each is dropped once"


def test_the_last_request_of_an_unloaded_name_ends_it_for_all_who_listen(registry):
    told = []
    registry.publish("poet", host("1"))
    held = acquire(registry, "poet")
    registry.remove("poet")
    registry.on_change = told.append
    registry.release(held)
    assert told == [AdapterStatus(name="poet", spec=host("1").spec, unloaded=True)]


def test_splits_are_told_and_a_failure_that_a_revision_outlives_is_not(registry):
    told = []
    registry.add(host("1"))
    registry.publish("poet", host("2"))
    registry.on_change = told.append
    for split in (Split("1", 30), None):
        registry.split("poet", split)
        assert told.pop() == registry.status("poet")
    registry.fail("poet", "no such folder")
    assert told == []


def test_removing_returns_what_was_removed_and_tells_what_is_left(registry):
    """`b` has no request, `c` and `a` have: in the order of their requests."""
    told, leases = [], []
    for revision in "cab":
        registry.publish("poet", host(revision))
        leases.append(acquire(registry, "poet"))
    registry.release(leases.pop())
    registry.on_change = told.append
    removed = registry.remove("poet")
    assert (removed.spec, removed.active_requests, removed.error) == (host("b").spec, 0, "")
    assert (removed.draining_revisions, removed.unloaded) == (("a", "c"), True)
    assert told == [registry.status("poet")]
    assert (told[0].spec, told[0].active_requests) == (host("c").spec, 1), "the last of those that drain"
    assert told[0].draining_revisions == ("a", "c")


def test_a_name_that_failed_is_removed_with_its_error(registry):
    registry.fail("poet", "no such folder")
    assert registry.remove("poet") == AdapterStatus(name="poet", spec=None, unloaded=True)


def test_a_name_is_known_while_it_has_a_revision_or_an_error(registry):
    assert not registry.knows("poet")
    registry.fail("poet", "no such folder")
    assert registry.knows("poet")
    registry.publish("poet", host("1"))
    assert registry.knows("poet")
    held = acquire(registry, "poet")
    registry.remove("poet")
    assert not registry.knows("poet"), "it only drains"
    registry.release(held)
    assert not registry.knows("poet")


def test_who_looks_sees_all_names_and_no_change_comes_between(registry):
    for name in ("poet", "bard"):
        registry.publish(name, host("1"))
    seen = []
    registry.look(lambda statuses: seen.append((statuses, registry._lock.locked())))
    assert seen == [(registry.statuses(), True)]
    told = []
    registry.on_change = told.append
    registry.tell("poet")
    registry.tell("nobody")
    assert told == [registry.status("poet")]


def test_the_registrys_books_are_read_and_written_under_its_lock(registry):
    guard(registry, registry._lock.locked, "_names", "_specs", "_needed", "_joined")
    registry.publish("poet", host("1"))
    registry.publish_unread("poet", host("2").spec)
    registry.publish("poet", host("3"))
    registry.add(host("4"))
    assert registry.hold("4")
    registry.split("poet", Split("4", 50))
    for _ in range(2):
        registry.unhold("4")
    for name, revision in (("first", "5"), ("second", "6")):
        registry.publish(name, prefix(revision, 2))
    lease = registry.acquire([Named("poet"), Named("first"), Named("second")])
    assert registry.tensors(lease.joined).spec.revision == lease.joined
    assert registry.tensors("3").spec == host("3").spec
    assert registry.serves("poet", "4")
    assert registry.knows("poet")
    assert registry.has("3")
    assert [registry.status(status.name) for status in registry.statuses()] == registry.statuses()
    registry.look(list)
    registry.tell("poet")
    registry.fail("bard", "no such folder")
    for name in ("poet", "bard", "first"):
        registry.remove(name)
    registry.release(lease)
    registry.publish_unread("sailor", host("7").spec)
    with pytest.raises(AdapterSourceError):
        registry.tensors("7")
    registry._lose("7", AdapterSourceError("lost"))
    assert registry.status("sailor").error == "lost"
