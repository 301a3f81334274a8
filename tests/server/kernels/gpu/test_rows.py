"""Rows of a step's adapters, put together on the GPU or in Triton's interpreter, and applied."""

from __future__ import annotations

import random

import pytest
import torch

from support.device_traces import Waits
from support.kernel_inputs import DEVICE, lora
from turret_server.kernels import LoraRows, ReferenceOps
from turret_server.kernels.gpu.lora import lora_add
from turret_server.kernels.gpu.rows import (
    MAX_TILE_ROWS,
    LinearRows,
    StepRows,
    float_bits,
    gather,
    make_directory,
)

NUM_IN, NUM_OUT, NUM_LINEARS = 64, 96, 3


def adapters(*ranks_of_linears):
    """Adapters by their ranks in each linear, 0 for none; an arena that holds them all."""
    every = [rank for ranks in ranks_of_linears for rank in ranks]
    arena, rows = lora(torch.float32, NUM_IN, NUM_OUT, [(0, 0, rank) for rank in every])
    bounds = iter(zip(rows.row_bounds, rows.row_bounds[1:], strict=False))
    made = []
    for ranks in ranks_of_linears:
        linears = []
        for rank in ranks:
            some = slice(*next(bounds))
            own = LinearRows(random.uniform(0.3, 3), rows.a_offsets_R[some], rows.b_offsets_R[some])
            linears.append(own if rank else None)
        made.append((linears, make_directory(linears, DEVICE)))
    return arena, made


def gathered(tiles, num_tiles, into=None):
    """`tiles`: (first token, end, [(adapter, weight), …]) each, the tiles beyond them empty."""
    pairs, table = [], []
    for start, end, uses in tiles:
        table.append((start, end, len(pairs), len(pairs) + len(uses)))
        pairs += [(made[1].table_MX.data_ptr(), made[1].width, float_bits(weight)) for made, weight in uses]
    table += [(0, 0, 0, 0)] * (num_tiles - len(table))
    into = into or StepRows.empty(NUM_LINEARS, num_tiles, DEVICE)
    gather(
        into,
        torch.tensor(table, dtype=torch.int32, device=DEVICE),
        torch.tensor(pairs or [(0, 0, 0)], device=DEVICE),
    )
    return into


def expected_rows(tiles, linear):
    """The same, as the ops know it without a graph."""
    starts, ends, bounds, a, b, weights = [], [], [0], [], [], []
    for start, end, uses in tiles:
        starts.append(start)
        ends.append(end)
        for (linears, _), weight in uses:
            own = linears[linear]
            if own is not None:
                a.append(own.a_offsets_R)
                b.append(own.b_offsets_R)
                weights.append(torch.full((len(a[-1]),), weight * own.scaling, device=DEVICE))
        bounds.append(sum(map(len, a)))
    return LoraRows(tuple(starts), tuple(ends), tuple(bounds), torch.cat(a), torch.cat(b), torch.cat(weights))


def tokens(count):
    return torch.randn(count, NUM_IN, device=DEVICE), torch.randn(count, NUM_OUT, device=DEVICE)


def test_tokens_get_what_the_rows_of_their_adapters_give():
    arena, (one, two, three) = adapters((8, 16, 5), (1, 0, 70), (3, 64, 2))
    tiles = [
        (0, 1, [(one, 1.0)]),
        (1, 4, [(two, 0.7), (one, -1.5), (three, 0.1)]),
        (5, 21, [(three, 1.0)]),
    ]
    into = gathered(tiles, num_tiles=6)
    for linear in range(NUM_LINEARS):
        x, y = tokens(24)
        rows, together, reference = expected_rows(tiles, linear), y.clone(), y.clone()
        lora_add(y, x, arena, into.of_linear(linear))
        lora_add(together, x, arena, rows)
        assert torch.equal(y, together), "a graph gives other bits than a step without one"
        ReferenceOps().lora_add(reference, x, arena, rows)
        torch.testing.assert_close(y, reference, atol=2e-6 * reference.abs().max().item(), rtol=0)


def test_a_linear_in_which_no_adapter_has_rows_is_left_alone():
    arena, (one,) = adapters((8, 0, 4))
    into = gathered([(0, 4, [(one, 1.0)])], num_tiles=2)
    x, y = tokens(4)
    y.fill_(-0.0)
    lora_add(y, x, arena, into.of_linear(1))
    assert torch.signbit(y).all()


def test_what_an_earlier_step_left_counts_for_nothing():
    arena, (one, two) = adapters((16, 16, 16), (4, 4, 0))
    full = [(index, index + 1, [(one, 1.0)]) for index in range(4)]
    into = gathered(full, num_tiles=4)
    tiles = [(2, 3, [(two, 2.0)])]
    gathered(tiles, 4, into)
    for linear in range(2):
        x, y = tokens(4)
        expected = y.clone()
        lora_add(y, x, arena, into.of_linear(linear))
        lora_add(expected, x, arena, expected_rows(tiles, linear))
        assert torch.equal(y, expected)


@pytest.mark.parametrize("num_tiles", [1, 2, 4])
def test_smaller_batches_use_the_same_memory(num_tiles):
    whole = StepRows.empty(NUM_LINEARS, 4, DEVICE)
    arena, (one,) = adapters((8, 16, 5))
    tiles = [(index, index + 1, [(one, 1.0)]) for index in range(num_tiles)]
    into = gathered(tiles, num_tiles, whole.of_tiles(num_tiles))
    assert into.tiles_MN4.data_ptr() == whole.tiles_MN4.data_ptr()
    for linear in range(NUM_LINEARS):
        x, y = tokens(num_tiles)
        expected = y.clone()
        lora_add(y, x, arena, into.of_linear(linear))
        lora_add(expected, x, arena, expected_rows(tiles, linear))
        assert torch.equal(y, expected)


def test_as_many_rows_as_a_tile_may_have():
    arena, (one, two) = adapters((MAX_TILE_ROWS - 1, 8, 8), (1, 8, 8))
    tiles = [(0, 1, [(one, 1.0), (two, 1.0)]), (1, 2, [(two, 1.0)])]
    into = gathered(tiles, num_tiles=2)
    x, y = tokens(2)
    expected = y.clone()
    lora_add(y, x, arena, into.of_linear(0))
    lora_add(expected, x, arena, expected_rows(tiles, 0))
    assert torch.equal(y, expected)


def test_a_directory_is_made_with_one_wait_for_the_device():
    offsets = torch.arange(5, device=DEVICE)
    with Waits() as waits:
        made = make_directory([LinearRows(2.0, offsets, offsets + 7), None] * 20, DEVICE)
    assert waits.found.count("cpu") == 1
    assert made.table_MX[2].tolist() == [5, float_bits(2.0), 0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert not made.table_MX[1].any()
