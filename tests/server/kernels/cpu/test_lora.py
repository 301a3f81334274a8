"""LoRA on the CPU against the reference, on fresh random inputs."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from support.kernel_inputs import on_threads
from turret_server.kernels import CpuOps, LoraRows, NF4Weight, ReferenceOps

DTYPES = [torch.float32, torch.bfloat16]


def lora(dtype, num_in, num_out, segments):
    """An arena and the rows of segments (first token, end, rank), scattered over it in no order."""
    ranks = [rank for _, _, rank in segments]
    slots = torch.randperm(sum(ranks) + 3)[: sum(ranks)]
    arena = torch.randn((sum(ranks) + 3) * (num_in + num_out) + 5, dtype=dtype)
    return arena, LoraRows(
        token_starts=tuple(start for start, _, _ in segments),
        token_ends=tuple(end for _, end, _ in segments),
        row_bounds=tuple(sum(ranks[:index]) for index in range(len(ranks) + 1)),
        a_offsets_R=slots * (num_in + num_out) + 5,
        b_offsets_R=slots * (num_in + num_out) + 5 + num_in,
        weights_R=torch.rand(sum(ranks)) + 0.5,
    )


def assert_close(found, expected, dtype, num_in):
    """Both sum in float32, in other orders; in bfloat16 the reference rounds the sum before it adds it, so
    that the two may differ by an ulp of the sum and an ulp of the result.
    """
    scale = expected.float().abs().max().item()
    tolerance = 2**-7 * scale if dtype == torch.bfloat16 else 1e-6 * num_in**0.5 * scale
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


SEGMENTS = {
    "none": [],
    "one token": [(0, 1, 16)],
    "a token each": [(index, index + 1, random.randint(1, 64)) for index in range(9)],
    "no rows in one": [(0, 2, 3), (2, 4, 0), (4, 5, 7)],
    "long": [(0, 150, 13)],
    "mixed, with gaps": [(1, 2, 64), (2, 9, 1), (11, 80, 5), (80, 81, 8), (90, 160, 33)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 256), (2048, 320), (7, 3), (100, 1000)])
def test_every_segment_gets_its_own_rows(dtype, segments, num_in, num_out):
    arena, rows = lora(dtype, num_in, num_out, segments)
    num_tokens = max((end for _, end, _ in segments), default=0) + 2
    x, y = torch.randn(num_tokens, num_in, dtype=dtype), torch.randn(num_tokens, num_out, dtype=dtype)
    expected = y.clone()
    ReferenceOps().lora_add(expected, x, arena, rows)
    CpuOps(dtype).lora_add(y, x, arena, rows)
    assert_close(y, expected, dtype, num_in)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_whoever_shares_the_step(dtype):
    num_in, num_out = 200, 328
    segments = SEGMENTS["mixed, with gaps"]
    arena, rows = lora(dtype, num_in, num_out, segments)
    x, y = torch.randn(165, num_in, dtype=dtype), torch.randn(165, num_out, dtype=dtype)
    together = y.clone()
    CpuOps(dtype).lora_add(together, x, arena, rows)
    for index, (start, end, _) in enumerate(segments):
        some = slice(rows.row_bounds[index], rows.row_bounds[index + 1])
        for token in range(start, end):
            alone = y[token : token + 1].clone()
            own = LoraRows(
                (0,),
                (1,),
                (0, some.stop - some.start),
                rows.a_offsets_R[some],
                rows.b_offsets_R[some],
                rows.weights_R[some],
            )
            CpuOps(dtype).lora_add(alone, x[token : token + 1], arena, own)
            assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_linears_side_by_side_get_the_bits_of_each_alone(dtype, segments):
    num_in, sizes = 200, {(0, 328): segments, (328, 392): segments[1:], (392, 1000): segments}
    own = {columns: lora(dtype, num_in, columns[1] - columns[0], part) for columns, part in sizes.items()}
    ends = [0, *(len(arena) for arena, _ in own.values())]
    x, y = torch.randn(165, num_in, dtype=dtype), torch.randn(165, 1000, dtype=dtype)
    expected = y.clone()
    starts, all_rows = [sum(ends[: index + 1]) for index in range(len(own))], []
    for (low, high), (arena, rows) in own.items():
        alone = y[:, low:high].contiguous()
        CpuOps(dtype).lora_add(alone, x, arena, rows)
        expected[:, low:high] = alone
        all_rows.append(((low, high), rows))
    counts = [high - low for _, rows in all_rows for low, high in pairwise(rows.row_bounds)]
    together = LoraRows(
        token_starts=sum((rows.token_starts for _, rows in all_rows), ()),
        token_ends=sum((rows.token_ends for _, rows in all_rows), ()),
        row_bounds=tuple(accumulate(counts, initial=0)),
        a_offsets_R=torch.cat(
            [rows.a_offsets_R + at for at, (_, rows) in zip(starts, all_rows, strict=True)]
        ),
        b_offsets_R=torch.cat(
            [rows.b_offsets_R + at for at, (_, rows) in zip(starts, all_rows, strict=True)]
        ),
        weights_R=torch.cat([rows.weights_R for _, rows in all_rows]),
        columns=tuple(columns for columns, rows in all_rows for _ in rows.token_starts),
    )
    arena = torch.cat([arena for arena, _ in own.values()])
    by_reference = y.clone()
    ReferenceOps().lora_add(by_reference, x, arena, together)
    CpuOps(dtype).lora_add(y, x, arena, together)
    assert torch.equal(y, expected)
    assert_close(y, by_reference, dtype, num_in)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_so_and_infinities_too(dtype):
    arena, rows = lora(dtype, 32, 64, [(0, 3, 4)])
    x, y = torch.randn(3, 32, dtype=dtype), torch.zeros(3, 64, dtype=dtype)
    x[0, 5], y[1, 7], y[2, 9] = torch.nan, -torch.inf, torch.inf
    CpuOps(dtype).lora_add(y, x, arena, rows)
    assert y[0].isnan().all()
    assert y[1, 7] == -torch.inf
    assert y[2, 9] == torch.inf


@pytest.mark.parametrize("num_threads", [2, 5])
def test_the_number_of_threads_changes_nothing(num_threads):
    arena, rows = lora(torch.float32, 200, 900, SEGMENTS["mixed, with gaps"])
    x, y = torch.randn(165, 200), torch.randn(165, 900)
    ops, on_one, on_many = CpuOps(torch.float32), y.clone(), y.clone()
    on_threads(num_threads, lambda: ops.lora_add(on_many, x, arena, rows))
    on_threads(1, lambda: ops.lora_add(on_one, x, arena, rows))
    assert torch.equal(on_one, on_many)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 256), (1024, 70), (640, 1600)])
def test_an_adapted_linear_is_the_product_and_the_rows(dtype, num_in, num_out):
    ops = CpuOps(dtype)
    values = torch.randn(num_out, num_in, dtype=dtype)
    weight = ops.pack_nf4(NF4Weight(*quantize_4bit(values, quant_type="nf4"), num_in, num_out))
    arena, rows = lora(dtype, num_in, num_out, SEGMENTS["mixed, with gaps"])
    x = torch.randn(165, num_in, dtype=dtype)
    expected = ops.nf4_linear(x, weight)
    assert torch.equal(ops.adapted_linear(x, weight, arena, None), expected)
    ops.lora_add(expected, x, arena, rows)
    assert torch.equal(ops.adapted_linear(x, weight, arena, rows), expected)


def test_rows_are_read_from_the_arena_that_is_given():
    ops, (arena, rows) = CpuOps(torch.float32), lora(torch.float32, 32, 64, [(0, 3, 4)])
    x, other = torch.randn(3, 32), torch.randn(len(arena))
    for own in (arena, other, arena):
        y, expected = torch.zeros(3, 64), torch.zeros(3, 64)
        ops.lora_add(y, x, own, rows)
        ReferenceOps().lora_add(expected, x, own, rows)
        assert_close(y, expected, torch.float32, 32)
