from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fake_device import make_spec
from turret_adapters.spec import Part, RowGroup, slab_layout

PAGE = 32
GROUPS = st.lists(
    st.builds(
        RowGroup, st.just("m"), st.just(Part.LORA_A), count=st.integers(1, 70), width=st.integers(1, PAGE)
    ),
    max_size=12,
)


def group(count: int, width: int) -> RowGroup:
    return RowGroup("m", Part.LORA_A, count, width)


@given(GROUPS)
def test_every_row_has_a_place_of_its_own_inside_one_page(groups):
    layout = slab_layout(groups, PAGE)
    assert len(layout.runs) == len(groups)
    taken: list[int] = []
    for of, runs in zip(groups, layout.runs, strict=True):
        assert sum(run.count for run in runs) == of.count
        for run in runs:
            for row in range(run.count):
                offset = run.offset + row * of.width
                assert offset // PAGE == (offset + of.width - 1) // PAGE
                taken += range(offset, offset + of.width)
    assert len(taken) == len(set(taken))
    assert all(0 <= element < layout.num_pages * PAGE for element in taken)


@given(GROUPS)
def test_it_takes_no_page_that_holds_nothing(groups):
    layout = slab_layout(groups, PAGE)
    used = {run.offset // PAGE for runs in layout.runs for run in runs}
    assert used == set(range(layout.num_pages))


@given(GROUPS)
def test_a_group_has_one_run_in_a_page_at_most(groups):
    for runs in slab_layout(groups, PAGE).runs:
        pages = [run.offset // PAGE for run in runs]
        assert len(pages) == len(set(pages))


@pytest.mark.parametrize(
    ("groups", "num_pages"),
    [
        pytest.param([], 0, id="no rows"),
        pytest.param([group(1, 1)], 1, id="one element"),
        pytest.param([group(4, 8)], 1, id="a page to its last element"),
        pytest.param([group(4, 8), group(1, 1)], 2, id="one element more"),
        pytest.param([group(2, 20)], 2, id="rows that do not share a page"),
        pytest.param([group(2, 32)], 2, id="rows as wide as a page"),
        pytest.param([group(3, 11), group(3, 1)], 2, id="small rows behind wide ones"),
    ],
)
def test_number_of_pages(groups, num_pages):
    assert slab_layout(groups, PAGE).num_pages == num_pages


def test_a_small_rank_takes_the_pages_of_a_small_rank():
    pages = [slab_layout([group(rank, 16)] * 8, PAGE).num_pages for rank in (1, 2, 8, 64)]
    assert pages == [4, 8, 32, 256]


def test_a_row_wider_than_a_page_is_a_mistake_of_the_arena():
    with pytest.raises(AssertionError, match="widest row"):
        slab_layout([group(1, 33)], PAGE)


@pytest.mark.parametrize(
    ("rows", "num_virtual", "num_pages"),
    [((), 0, 0), ((), 1, 1), ((), 8, 1), ((), 9, 2), ((group(5, 8),), 0, 2), ((group(5, 8),), 9, 4)],
)
def test_pages_of_rows_and_of_virtual_tokens_add_up(rows, num_virtual, num_pages):
    spec = replace(make_spec("1", num_virtual=num_virtual), rows=rows)
    assert spec.num_pages(PAGE, block_size=8) == num_pages
    assert spec.num_slab_pages(2 * PAGE) == slab_layout(rows, 2 * PAGE).num_pages
