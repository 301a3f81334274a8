"""Requests of several adapters, and of one task of a multitask adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.fake_device import make_spec
from support.registries import Watched, host, multitask, prefix
from turret_adapters.errors import (
    AdapterCompositionError,
    AdapterTaskError,
)
from turret_adapters.host import HostAdapter
from turret_adapters.registry import Named
from turret_adapters.spec import TASK_MARK, Part, PrefixKind, RowGroup


@pytest.fixture
def registry() -> Watched:
    return Watched()


def test_a_request_runs_on_the_task_that_it_names(registry):
    registry.publish("many", multitask("1", 3))
    lease = registry.acquire([Named("many", task=2)])
    assert lease.revision == "1#2"
    assert registry.tensors("1#2").spec == lease.uses[0][0]
    registry.remove("many")
    assert registry.gone == []
    registry.release(lease)
    assert registry.gone == ["1", "1#0", "1#1", "1#2"]


@pytest.mark.parametrize("task", [None, -1, 3])
def test_a_task_that_is_none_of_the_adapters_is_refused_and_pins_nothing(registry, task):
    registry.publish("many", multitask("1", 3))
    with pytest.raises(AdapterTaskError, match="a task from 0 to 2"):
        registry.acquire([Named("many", task=task)])
    assert registry.status("many").active_requests == 0
    registry.publish("poet", host("2"))
    with pytest.raises(AdapterTaskError, match="expected no task"):
        registry.acquire([Named("poet", task=0)])


def test_loras_of_one_request_keep_their_weights_and_are_all_pinned(registry):
    registry.publish("poet", host("1"))
    registry.publish("bard", host("2"))
    lease = registry.acquire([Named("poet", 0.5), Named("bard", -2.0)])
    assert [(spec.revision, weight) for spec, weight in lease.uses] == [("1", 0.5), ("2", -2.0)]
    assert lease.revision == "1+2"
    assert {status.active_requests for status in registry.statuses()} == {1}
    registry.release(lease)
    assert {status.active_requests for status in registry.statuses()} == {0}


def test_prefixes_of_one_request_become_one_in_their_order(registry):
    registry.publish("first", prefix("1", 2))
    registry.publish("second", prefix("2", 3))
    registry.publish("poet", host("3"))
    lease = registry.acquire([Named("second"), Named("poet", 0.5), Named("first")])
    [(poet, weight), (joined, _)] = lease.uses
    assert (poet.revision, weight) == ("3", 0.5)
    assert joined.num_virtual_tokens == 5
    assert registry.tensors(joined.revision).prefix_kv[:, 0, 0, 0, 0].tolist() == [2, 2, 2, 1, 1]
    again = registry.acquire([Named("second"), Named("first")])
    assert again.uses[0][0] == joined
    registry.release(lease)
    assert registry.gone == []
    registry.release(again)
    assert registry.gone == [joined.revision]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ([Named("poet"), Named("gain")], "'gain' .* request this one alone"),
        ([Named("poet"), Named("activated")], "'activated' .* request this one alone"),
        ([Named("prefix", 0.5)], "'prefix' .* expected weight 1"),
        ([Named("gain", 0.5)], "'gain' .* expected weight 1"),
        ([Named("prefix"), Named("prompt")], "'prompt': expected no other adapter with virtual tokens"),
        ([Named("prompt"), Named("prompt")], "'prompt': expected no other adapter with virtual tokens"),
        ([Named("poet"), Named("classifier")], "'classifier' .* request this one alone"),
    ],
)
def test_an_invalid_composition_is_refused_by_name_and_pins_nothing(registry, named, said):
    registry.publish("poet", host("1"))
    registry.publish("prefix", prefix("2", 2))
    gain = replace(make_spec("3"), rows=(RowGroup("m", Part.GAIN, 1, 4),))
    registry.publish("gain", HostAdapter(spec=gain, deltas={}))
    activated = make_spec("4", slab_pages=1, invocation=(7,))
    registry.publish("activated", HostAdapter(spec=activated, deltas={}))
    prompt = make_spec("5", num_virtual=2, kind=PrefixKind.EMBEDDING, per_request=True)
    registry.publish("prompt", HostAdapter(spec=prompt, deltas={}))
    head = replace(make_spec("6"), rows=(RowGroup("score.weight", Part.HEAD, 2, 4),))
    registry.publish("classifier", HostAdapter(spec=head, deltas={}))
    with pytest.raises(AdapterCompositionError, match=said):
        registry.acquire(named)
    assert {status.active_requests for status in registry.statuses()} == {0}


def test_tasks_are_joined_like_whole_adapters_and_are_there_as_long_as_they_are_needed(registry):
    def with_tasks(revision: str, *values: int) -> HostAdapter:
        tasks = tuple(
            replace(prefix(str(value), 2), spec=make_spec(f"{revision}{TASK_MARK}{task}", num_virtual=2))
            for task, value in enumerate(values)
        )
        return replace(multitask(revision, len(values)), tasks=tasks)

    registry.publish("many", with_tasks("1", 10, 11))
    registry.publish("first", prefix("2", 3))
    lease = registry.acquire([Named("many", task=1), Named("first"), Named("many", task=0)])
    assert lease.revision == f"1{TASK_MARK}1+2+1{TASK_MARK}0"
    [(joined, weight)] = lease.uses
    assert (joined.num_virtual_tokens, joined.revision, weight) == (7, lease.joined, 1.0)
    assert [name for name, _ in lease.pins] == ["many", "first", "many"]
    assert registry.status("many").active_requests == 2
    assert registry.tensors(joined.revision).prefix_kv.flatten()[::2].tolist() == [11, 11, 2, 2, 2, 10, 10]
    needed = [joined.revision, "1", f"1{TASK_MARK}0", "2"]
    assert all(map(registry.has, needed))
    for name in ("many", "first"):
        registry.remove(name)
    assert all(map(registry.has, needed))
    registry.release(lease)
    assert not any(map(registry.has, needed))
    assert sorted(registry.gone) == sorted([*needed, f"1{TASK_MARK}1"])


def test_a_request_of_one_adapter_joins_nothing(registry):
    registry.publish("first", prefix("1", 2))
    lease = registry.acquire([Named("first")])
    assert (lease.joined, lease.uses) == (None, ((prefix("1", 2).spec, 1.0),))
    registry.release(lease)
    assert registry.gone == []
