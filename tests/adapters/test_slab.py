from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret_adapters.slab import slab_layout
from turret_adapters.spec import LoraModule

PAGE = 32
MODULES = st.lists(
    st.builds(
        LoraModule,
        name=st.just("m"),
        rank=st.integers(1, 9),
        in_features=st.integers(1, PAGE),
        out_features=st.integers(1, PAGE),
        scaling=st.just(1.0),
    ),
    max_size=6,
)


def module(rank: int, in_features: int, out_features: int) -> LoraModule:
    return LoraModule(name="m", rank=rank, in_features=in_features, out_features=out_features, scaling=1.0)


@given(MODULES)
def test_every_row_has_a_place_of_its_own_inside_one_page(modules):
    layout = slab_layout(modules, PAGE)
    assert len(layout.modules) == len(modules)
    taken: list[int] = []
    for spec, rows in zip(modules, layout.modules, strict=True):
        assert (len(rows.a_offsets), len(rows.b_offsets)) == (spec.rank, spec.rank)
        for offsets, length in ((rows.a_offsets, spec.in_features), (rows.b_offsets, spec.out_features)):
            for offset in offsets:
                assert offset // PAGE == (offset + length - 1) // PAGE
                taken += range(offset, offset + length)
    assert len(taken) == len(set(taken))
    assert all(0 <= element < layout.num_pages * PAGE for element in taken)


@given(MODULES)
def test_it_takes_no_page_that_holds_nothing(modules):
    layout = slab_layout(modules, PAGE)
    used = {offset // PAGE for rows in layout.modules for offset in (*rows.a_offsets, *rows.b_offsets)}
    assert used == set(range(layout.num_pages))


@pytest.mark.parametrize(
    ("modules", "num_pages"),
    [
        pytest.param([], 0, id="no LoRA"),
        pytest.param([module(1, 1, 1)], 1, id="two elements"),
        pytest.param([module(2, 8, 8)], 1, id="a page to its last element"),
        pytest.param([module(2, 8, 8), module(1, 1, 1)], 2, id="one element more"),
        pytest.param([module(1, 20, 20)], 2, id="rows that do not share a page"),
        pytest.param([module(1, 32, 32)], 2, id="rows as wide as a page"),
        pytest.param([module(3, 11, 1)], 2, id="small rows behind wide ones"),
    ],
)
def test_number_of_pages(modules, num_pages):
    assert slab_layout(modules, PAGE).num_pages == num_pages


def test_a_small_rank_takes_the_pages_of_a_small_rank():
    pages = [slab_layout([module(rank, 16, 16)] * 4, PAGE).num_pages for rank in (1, 2, 8, 64)]
    assert pages == [4, 8, 32, 256]


def test_a_row_wider_than_a_page_is_a_mistake_of_the_arena():
    with pytest.raises(AssertionError, match="widest row"):
        slab_layout([module(1, 33, 1)], PAGE)
