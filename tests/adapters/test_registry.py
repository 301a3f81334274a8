from __future__ import annotations

import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from support.fake_device import make_spec
from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.peft import HostAdapter
from turret_adapters.registry import AdapterRegistry
from turret_adapters.spec import AdapterSpec


def host(revision: str) -> HostAdapter:
    spec = make_spec(revision, slab_pages=1)
    return HostAdapter(spec=spec, lora={}, prefix_kv=None, prompt_embeddings=None)


class Watched(AdapterRegistry):
    """A registry that remembers what is gone, and sees that it is gone by then."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[str] = []
        self.on_gone = self._note

    def _note(self, revision: str) -> None:
        with pytest.raises(KeyError):
            self.tensors(revision)
        self.gone.append(revision)


@pytest.fixture
def registry() -> Watched:
    return Watched()


def test_a_name_that_was_never_loaded_is_not_found(registry):
    for call in (registry.acquire, registry.remove, registry.status):
        with pytest.raises(AdapterNotFoundError, match="'poet'"):
            call("poet")
    assert registry.statuses() == []


def test_a_request_gets_the_revision_that_its_name_has_now(registry):
    first, second = host("1"), host("2")
    registry.publish("poet", first)
    assert registry.acquire("poet") is first.spec
    registry.publish("poet", second)
    assert registry.acquire("poet") is second.spec
    assert registry.tensors("1") is first
    assert registry.tensors("2") is second


def test_a_replaced_revision_is_gone_after_its_last_request(registry):
    registry.publish("poet", host("1"))
    held = [registry.acquire("poet") for _ in range(2)]
    registry.publish("poet", host("2"))
    assert registry.status("poet").draining_revisions == ("1",)
    assert registry.status("poet").active_requests == 0
    registry.release("poet", held[0])
    assert registry.gone == []
    registry.release("poet", held[1])
    assert registry.gone == ["1"]
    assert registry.status("poet").draining_revisions == ()


def test_a_replaced_revision_that_nobody_runs_is_gone_at_once(registry):
    registry.publish("poet", host("1"))
    registry.publish("poet", host("2"))
    assert registry.gone == ["1"]


def test_a_name_that_ends_its_requests_stays_loaded(registry):
    registry.publish("poet", host("1"))
    registry.release("poet", registry.acquire("poet"))
    assert registry.gone == []
    assert registry.acquire("poet")


def test_an_unloaded_name_drains(registry):
    registry.publish("poet", host("1"))
    held = registry.acquire("poet")
    removed = registry.remove("poet")
    assert (removed.spec, removed.active_requests, removed.unloaded) == (held, 1, True)
    with pytest.raises(AdapterNotFoundError):
        registry.acquire("poet")
    with pytest.raises(AdapterNotFoundError):
        registry.remove("poet")
    status = registry.status("poet")
    assert (status.spec, status.unloaded, status.draining_revisions) == (held, True, ("1",))
    registry.release("poet", held)
    assert registry.gone == ["1"]
    assert registry.statuses() == []


def test_an_unloaded_name_can_be_loaded_again_while_it_drains(registry):
    registry.publish("poet", host("1"))
    held = registry.acquire("poet")
    registry.remove("poet")
    registry.publish("poet", host("1"))
    registry.release("poet", held)
    assert registry.gone == []
    assert registry.acquire("poet") == held


def test_the_same_content_again_changes_nothing(registry):
    first = host("1")
    registry.publish("poet", first)
    registry.publish("poet", host("1"))
    assert registry.gone == []
    assert registry.tensors("1") is first


def test_content_under_two_names_lives_as_long_as_either(registry):
    registry.publish("poet", host("1"))
    registry.publish("bard", host("1"))
    held = registry.acquire("bard")
    registry.remove("poet")
    registry.remove("bard")
    assert registry.gone == []
    registry.release("bard", held)
    assert registry.gone == ["1"]


def test_requests_are_counted_by_name(registry):
    registry.publish("poet", host("1"))
    registry.publish("bard", host("1"))
    registry.acquire("poet")
    assert [status.active_requests for status in registry.statuses()] == [0, 1]
    assert [status.name for status in registry.statuses()] == ["bard", "poet"]


def test_a_name_that_could_not_be_loaded_says_why(registry):
    registry.fail("poet", "no such folder")
    status = registry.status("poet")
    assert (status.spec, status.error, status.unloaded) == (None, "no such folder", False)
    with pytest.raises(AdapterNotFoundError, match="no such folder"):
        registry.acquire("poet")
    registry.remove("poet")
    assert registry.statuses() == []


def test_a_load_that_fails_leaves_the_adapter_that_is_there(registry):
    registry.publish("poet", host("1"))
    registry.fail("poet", "no such folder")
    assert registry.acquire("poet").revision == "1"
    assert registry.status("poet").error == ""


def test_a_load_that_works_ends_the_failure(registry):
    registry.fail("poet", "no such folder")
    registry.publish("poet", host("1"))
    assert registry.status("poet").error == ""
    assert registry.acquire("poet").revision == "1"


def test_a_revision_released_too_often_is_noticed(registry):
    registry.publish("poet", host("1"))
    held = registry.acquire("poet")
    registry.release("poet", held)
    with pytest.raises(AssertionError, match="more often"):
        registry.release("poet", held)


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
    def acquire(self, name: str) -> tuple[str, AdapterSpec] | None:
        if name not in self.current:
            with pytest.raises(AdapterNotFoundError):
                self.registry.acquire(name)
            return None
        spec = self.registry.acquire(name)
        assert spec.revision == self.current[name]
        self.running[name, spec.revision] += 1
        return name, spec

    @rule(request=consumes(requests))
    def release(self, request: tuple[str, AdapterSpec] | None) -> None:
        if request:
            name, spec = request
            self.registry.release(name, spec)
            self.running[name, spec.revision] -= 1

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
            spec = registry.acquire("poet")
            assert registry.tensors(spec.revision).spec == spec
            registry.release("poet", spec)


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
    assert registry._tensors == {}
