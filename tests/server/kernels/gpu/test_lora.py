"""LoRA on a GPU, or in Triton's interpreter, against the reference, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch

from support.kernel_inputs import DEVICE, SEGMENTS, lora
from turret_server.kernels import ReferenceOps
from turret_server.kernels.gpu import lora as gpu_lora
from turret_server.kernels.gpu.lora import add_tiles
from turret_server.kernels.gpu.ops import GpuOps

# In 16 bits the reference rounds the sum before it adds it.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def assert_close(found, expected):
    tolerance = TOLERANCES[found.dtype] * expected.float().abs().max().item()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def tokens(dtype, num_tokens, num_in, num_out):
    x = torch.randn(num_tokens, num_in, dtype=dtype, device=DEVICE)
    return x, torch.randn(num_tokens, num_out, dtype=dtype, device=DEVICE)


def assert_is_the_references(dtype, segments, num_in, num_out, start):
    arena, rows = lora(dtype, num_in, num_out, segments, start=start)
    x, y = tokens(dtype, max((end for _, end, _ in segments), default=0) + 2, num_in, num_out)
    expected = y.clone()
    ReferenceOps().lora_add(expected, x, arena, rows)
    GpuOps().lora_add(y, x, arena, rows)
    assert_close(y, expected)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("start", [0, 5])
def test_every_segment_gets_its_own_rows(segments, start):
    assert_is_the_references(torch.float32, segments, 64, 136, start)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_in", "num_out"), [(1200, 40), (40, 300), (7, 3)])
def test_linears_of_any_shape(dtype, num_in, num_out):
    segments = [(0, 1, 9), (1, 20, 3), (20, 21, 18)]
    assert_is_the_references(dtype, segments, num_in, num_out, 8)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_what_is_not_a_number_stays_so_and_infinities_too(dtype):
    arena, rows = lora(dtype, 32, 64, [(0, 3, 4)])
    x, y = tokens(dtype, 3, 32, 64)
    x[0, 5], y[1, 7], y[2, 9] = torch.nan, -torch.inf, torch.inf
    GpuOps().lora_add(y, x, arena, rows)
    assert y[0].isnan().all()
    assert y[1, 7] == -torch.inf
    assert y[2, 9] == torch.inf
    assert y[1:].isfinite().sum() == 2 * 64 - 2


def test_what_lies_beside_the_rows_is_not_read():
    arena, rows = lora(torch.float32, 40, 24, [(0, 2, 3), (2, 20, 5)])
    read = torch.zeros(len(arena), dtype=torch.bool)
    for offsets, width in ((rows.a_offsets_R, 40), (rows.b_offsets_R, 24)):
        read[(offsets.cpu()[:, None] + torch.arange(width)).flatten()] = True
    arena[~read] = torch.nan
    x, y = tokens(torch.float32, 20, 40, 24)
    GpuOps().lora_add(y, x, arena, rows)
    assert y.isfinite().all()


def test_tiles_without_tokens_do_nothing():
    """As in a CUDA graph that was recorded for more."""
    arena, rows = lora(torch.float32, 64, 96, [(0, 2, 3), (2, 4, 20)])
    x, y = tokens(torch.float32, 4, 64, 96)
    expected = y.clone()
    ReferenceOps().lora_add(expected, x, arena, rows)
    used = torch.tensor([[0, 2, 0, 3], [2, 4, 3, 23]])
    tiles = torch.cat((used, torch.zeros(3, 4, dtype=torch.long))).to(DEVICE, torch.int32)
    add_tiles(y, x, arena, tiles, 32, rows)
    assert_close(y, expected)


def test_the_tiles_of_many_experts_leave_those_of_the_linears_in_the_cache():
    linears = ((0,), (500,), (0, 16), DEVICE)
    before = gpu_lora._tiles(*linears)
    for expert in range(256):
        for rank in (8, 16):
            gpu_lora._tiles((0,), (1 + expert,), (0, rank), DEVICE)
    assert gpu_lora._tiles(*linears) is before
