"""The LoRA rows that a step's adapters come to, and how long they are cached."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import torch

from support.device_traces import Launches
from turret_adapters.host import HostAdapter, ModuleDelta, row_groups
from turret_adapters.spec import AdapterSpec, Method, Part
from turret_server.model.deltas import (
    DeltaBatch,
    GatheredRows,
    ResidentDelta,
    ResidentDeltas,
    ResidentRows,
    Segment,
    write_slab,
)

NO_TOKENS = torch.zeros(0, dtype=torch.long)


def adapter(start: int, rank: int = 2, *, linears: str = "q", scaling: float = 1.0) -> ResidentDeltas:
    """LoRA rows in some linears, A's from offset `start` on and B's 100 later."""

    def rows(offset: int) -> ResidentRows:
        return ResidentRows(torch.arange(rank) + offset, 1)

    delta = ResidentDelta(scaling, {Part.LORA_A: rows(start), Part.LORA_B: rows(start + 100)}, NO_TOKENS)
    return ResidentDeltas(lora=dict.fromkeys(linears, delta), others={})


def test_rows_are_those_of_each_segments_adapters_with_weights_times_scaling():
    one, two = adapter(0, scaling=0.5), adapter(10, 3, linears="qv", scaling=2.0)
    segments = [Segment(0, 2, ((one, 1.0),)), Segment(3, 4, ((two, 0.25), (one, -1.0)))]
    batch = DeltaBatch(segments, GatheredRows())
    rows = batch.lora("q")
    assert (rows.token_starts, rows.token_ends, rows.row_bounds) == ((0, 3), (2, 4), (0, 2, 7))
    assert rows.a_offsets_R.tolist() == [0, 1, 10, 11, 12, 0, 1]
    assert rows.b_offsets_R.tolist() == [100, 101, 110, 111, 112, 100, 101]
    assert rows.weights_R.tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, -0.5, -0.5]
    only = batch.lora("v")
    assert (only.token_starts, only.token_ends, only.row_bounds) == ((3,), (4,), (0, 3))
    assert batch.lora("o") is None


def test_a_batch_that_decodes_has_the_same_rows_step_after_step():
    gathered, one = GatheredRows(), adapter(0)
    first, again, moved = (
        DeltaBatch([Segment(start, start + 1, ((one, 1.0),))], gathered).lora("q") for start in (0, 0, 4)
    )
    assert again is first
    assert moved.token_starts == (4,)
    assert moved.a_offsets_R is first.a_offsets_R, "the offsets are gathered once"


def test_another_weight_or_another_place_in_the_arena_has_rows_of_its_own():
    gathered, one = GatheredRows(), adapter(0)
    for own, weight in ((one, 1.0), (one, 2.0), (adapter(50), 1.0), (adapter(60, 1), 1.0), (one, 1.0)):
        rows = DeltaBatch([Segment(0, 1, ((own, weight),))], gathered).lora("q")
        assert rows.a_offsets_R.tolist() == own.lora["q"].parts[Part.LORA_A].offsets_N.tolist()
        assert rows.weights_R.tolist() == [weight] * len(rows.a_offsets_R)


def test_the_order_of_the_segments_matters():
    gathered, one, two = GatheredRows(), adapter(0), adapter(10)
    for first, second in ((one, two), (two, one)):
        segments = [Segment(0, 1, ((first, 1.0),)), Segment(1, 2, ((second, 1.0),))]
        offsets = DeltaBatch(segments, gathered).lora("q").a_offsets_R.tolist()
        assert offsets == [first.lora["q"].parts[Part.LORA_A].offsets_N[0] + i for i in (0, 1)] + [
            second.lora["q"].parts[Part.LORA_A].offsets_N[0] + i for i in (0, 1)
        ]


def test_what_only_earlier_steps_used_is_dropped():
    """Otherwise the rows of every adapter that was ever used would stay in memory."""
    gathered, used = GatheredRows(), []
    for start in range(40):
        one = adapter(start)
        used.append(weakref.ref(one.lora["q"].parts[Part.LORA_A].offsets_N))
        for place in range(40):
            DeltaBatch([Segment(place, place + 1, ((one, 1.0),))], gathered).lora("q")
    assert len(gathered._by_adapters) <= 8
    assert all(len(each._rows) <= 4 for each in gathered._by_adapters.values())
    del one
    gc.collect()
    assert [each() is None for each in used] == [True] * 32 + [False] * 8


def test_the_least_recently_used_combination_is_dropped_first():
    gathered, first = GatheredRows(), adapter(0)
    expected = DeltaBatch([Segment(0, 1, ((first, 1.0),))], gathered).lora("q")
    for start in range(1, 20):
        DeltaBatch([Segment(0, 1, ((adapter(start), 1.0),))], gathered).lora("q")
        assert DeltaBatch([Segment(0, 1, ((first, 1.0),))], gathered).lora("q") is expected


def test_changes_beyond_lora_rows_are_found_by_module_and_part():
    rows = {Part.GAIN: ResidentRows(torch.tensor([3]), 4)}
    gain = ResidentDelta(1.0, rows, NO_TOKENS)
    one, plain = ResidentDeltas(lora={}, others={"q": gain}), adapter(0)
    segments = [Segment(0, 1, ((plain, 1.0),)), Segment(1, 3, ((plain, 1.0), (one, 0.5)))]
    batch = DeltaBatch(segments, GatheredRows())
    assert batch.changes("q")
    assert not batch.changes("v")
    assert list(batch.with_parts("q", Part.GAIN, Part.BIAS)) == [(segments[1], gain, 0.5)]
    assert list(batch.with_parts("q", Part.BIAS)) == []
    assert list(batch.with_parts("v", Part.GAIN)) == []


def test_the_offsets_of_an_adapter_go_to_the_device_in_one_copy():
    names = [f"m{index}" for index in range(20)]
    rows = {Part.LORA_A: torch.zeros(3, 8), Part.LORA_B: torch.zeros(3, 4)}
    deltas = {name: ModuleDelta(rows=rows) for name in names}
    spec = AdapterSpec(
        revision="r",
        method=Method.LORA,
        rows=row_groups(deltas),
        prefix=None,
        max_rank=3,
        num_parameters=0,
        file_bytes=0,
    )
    host, flat = HostAdapter(spec=spec, deltas=deltas), torch.empty(0, device="meta")
    arena = SimpleNamespace(page_elements=64, flat=flat, write_rows=lambda *_: None)
    with Launches() as launches:
        resident = write_slab(arena, host, tuple(range(50)), names)
    assert resident.lora["m19"].parts[Part.LORA_A].offsets_N.device == flat.device
    token_ids = resident.lora["m19"].token_ids
    assert (token_ids.device, token_ids.dtype) == (flat.device, torch.long), "also of none"
    computed = [name for name, *_ in launches.trace if "slice" not in name and "split" not in name]
    assert computed == ["aten.lift_fresh.default", "aten._to_copy.default"]
