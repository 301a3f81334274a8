from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fake_device import make_spec
from turret_server.engine.residency.resident import EvictionOrder, Resident

NOW = 1000


def resident(
    name: str,
    *,
    num_pages: int = 1,
    last_used: int = NOW - 100,
    tenant: str = "a",
    num_uses: float = 0.0,
    num_users: int = 0,
) -> Resident:
    return Resident(
        spec=make_spec(name, slab_pages=num_pages),
        slab_pages=list(range(num_pages)),
        prefix_pages=[],
        tenant=tenant,
        copying=False,
        num_virtual_computed=0,
        num_users=num_users,
        last_requested=last_used,
        last_used=last_used,
        counted_at=NOW,
        num_uses=num_uses,
    )


def order(**weights: float) -> EvictionOrder:
    return EvictionOrder(lambda tenant: weights.get(tenant, 1.0))


def names(residents: list[Resident], eviction: EvictionOrder, clock: int = NOW) -> list[str]:
    """All of them in the order in which they go."""
    left, gone = list(residents), []
    while worst := eviction.next_victim(left, clock):
        worst.freed = True
        left.remove(worst)
        gone.append(worst.spec.revision)
    return gone


@pytest.mark.parametrize(
    "stays",
    [
        {"last_used": NOW - 10},
        {"num_uses": 3.0},
        {"tenant": "b"},
        {"num_users": 1},
        {"last_used": NOW},
    ],
    ids=["used lately", "used often", "of a tenant who has little", "in use", "looked at in this step"],
)
def test_what_is_worth_less_goes_first(stays):
    """Each beside two that differ from it in nothing else."""
    better, *others = resident("stays", **stays), resident("x"), resident("y")
    first = order().next_victim([better, *others], NOW)
    assert first in others


def test_the_large_one_goes_first():
    assert names([resident("small"), resident("large", num_pages=2)], order()) == ["large", "small"]


def test_a_tenant_with_more_weight_keeps_more():
    residents = [resident("light", tenant="light"), resident("heavy", tenant="heavy")]
    assert names(residents, order(heavy=2.0)) == ["light", "heavy"]


def test_where_nobody_is_idle_nobody_goes():
    assert order().next_victim([], NOW) is None
    assert order().next_victim([resident("used", num_users=1), resident("empty", num_pages=0)], NOW) is None


def test_uses_are_forgotten_by_and_by():
    often = resident("often", num_uses=8.0)
    assert often.recent_uses(NOW) == 8.0
    assert often.recent_uses(NOW + 5000) == pytest.approx(4.0)
    assert often.staleness(NOW + 5000) == pytest.approx(5100 / 5)


def test_one_that_is_used_while_the_order_is_kept_is_passed_over():
    eviction = order()
    residents = [resident(f"r{index}", last_used=NOW - 100 + index) for index in range(8)]
    assert eviction.next_victim(residents, NOW) is residents[0]
    residents[0].last_used = residents[0].last_requested = NOW + 1
    assert eviction.next_victim(residents, NOW + 2) is residents[1]


def test_the_order_is_made_anew_after_some_steps():
    eviction = order()
    residents = [resident(f"r{index}", last_used=NOW - 100) for index in range(8)]
    eviction.next_victim(residents, NOW)
    large = resident("large", num_pages=50)
    assert eviction.next_victim([*residents, large], NOW + 15) is not large
    assert eviction.next_victim([*residents, large], NOW + 16) is large


@settings(max_examples=200, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(
            st.integers(1, 16),
            st.integers(0, NOW),
            st.sampled_from("abc"),
            st.floats(0, 50),
            st.integers(0, 1),
        ),
        max_size=30,
    )
)
def test_all_that_are_idle_go_once_and_nobody_else(drawn):
    residents = [
        resident(f"{index}", num_pages=pages, last_used=used, tenant=tenant, num_uses=begun, num_users=users)
        for index, (pages, used, tenant, begun, users) in enumerate(drawn)
    ]
    idle = {one.spec.revision for one in residents if one.is_idle(NOW)}
    gone = names(residents, order(b=2.0))
    assert len(gone) == len(set(gone))
    assert set(gone) == idle
