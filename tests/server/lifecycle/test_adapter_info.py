"""What is said of an adapter, and to whom."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from support.fake_device import make_spec
from turret_adapters.registry import AdapterStatus
from turret_adapters.spec import Split
from turret_adapters.store.names import Published
from turret_server.engine.admission import TenantLimits
from turret_server.lifecycle.adapter_info import AdapterDescriber, AdapterState
from turret_server.tenancy.tenants import Tenant

SPEC = replace(make_spec("r1", slab_pages=3, num_virtual=5), num_parameters=7, file_bytes=9)
PUBLISHED = Published("poet", "r1", "/srv/poet", 12.5, 1, "acme", "marks")


class Arena:
    """An engine as far as descriptions go."""

    def __init__(self, *resident: str) -> None:
        self._resident = resident

    def num_pages(self, spec) -> int:
        return spec.max_rank

    def is_resident(self, revision: str) -> bool:
        return revision in self._resident


def describer(*resident: str) -> AdapterDescriber:
    return AdapterDescriber(Arena(*resident), page_bytes=1000)


def status(spec=SPEC, **fields) -> AdapterStatus:
    return AdapterStatus(name="poet", spec=spec, **fields)


@pytest.mark.parametrize(
    ("found", "resident", "state"),
    [
        (status(), (), AdapterState.STAGED),
        (status(), ("r2",), AdapterState.STAGED),
        (status(), ("r1",), AdapterState.RESIDENT),
        (status(None, error="broken"), (), AdapterState.FAILED),
        (status(unloaded=True, active_requests=1), ("r1",), AdapterState.DRAINING),
        (status(unloaded=True), ("r1",), AdapterState.UNLOADED),
        (status(None, unloaded=True), (), AdapterState.UNLOADED),
    ],
)
def test_the_state_of_an_adapter(found, resident, state):
    assert describer(*resident).state(found) is state
    assert describer(*resident).describe(found).state is state


def test_everything_that_is_known_is_described():
    split = Split("r0", 20)
    found = status(active_requests=2, draining_revisions=("r0",), split=split)
    info = describer().describe(found, [PUBLISHED])
    assert (info.name, info.revision, info.method) == ("poet", "r1", SPEC.method)
    assert (info.max_rank, info.num_virtual_tokens, info.num_tasks) == (3, 5, 0)
    assert (info.num_parameters, info.file_bytes) == (7, 9)
    assert info.arena_bytes == 3000
    assert (info.active_requests, info.draining_revisions, info.split) == (2, ("r0",), split)
    [revision] = info.history
    assert (revision.revision, revision.source, revision.published_at) == ("r1", "/srv/poet", 12.5)


def test_of_an_adapter_with_tasks_each_takes_pages_and_one_in_the_arena_is_enough():
    found = status(replace(SPEC, num_tasks=2))
    assert (describer().describe(found).num_tasks, describer().describe(found).arena_bytes) == (2, 6000)
    first, second = found.spec.resident_revisions
    for resident in (first, second):
        assert describer(resident).state(found) is AdapterState.RESIDENT
    assert describer().state(found) is AdapterState.STAGED


def test_what_could_not_be_loaded_has_a_reason_and_nothing_else():
    info = describer().describe(status(None, error="no such folder"))
    known = {field.name: getattr(info, field.name) for field in fields(info)}
    assert (known.pop("name"), known.pop("state")) == ("poet", AdapterState.FAILED)
    assert known.pop("error") == "no such folder"
    assert not any(known.values()), known


def test_only_those_who_may_load_it_see_where_it_comes_from_and_why_it_failed():
    owner, user = (
        Tenant(name=name, limits=TenantLimits(), use=("poet",), load=load)
        for name, load in (("owner", ("poet",)), ("user", ()))
    )
    served = describer().describe(status(), [PUBLISHED])
    assert served.visible_to(owner) is served
    assert [each.source for each in served.visible_to(user).history] == [""]
    assert [each.revision for each in served.visible_to(user).history] == ["r1"]
    assert served.visible_to(user).error == ""
    failed = describer().describe(status(None, error="/srv/poet is gone"))
    assert failed.visible_to(owner).error == "/srv/poet is gone"
    assert failed.visible_to(user).error == "it could not be loaded; ask the server's operator why"
