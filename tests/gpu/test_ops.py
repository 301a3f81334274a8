"""The GPU ops at the sizes of real models, and what the interpreter cannot show: that a token gets the same
bits in any company, and that CUDA graphs can be recorded.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from support.kernel_inputs import lora, paged, params
from turret_server.kernels import NF4Weight, ReferenceOps
from turret_server.kernels.gpu.attention import attend, make_tiles
from turret_server.kernels.gpu.lora import add_tiles
from turret_server.kernels.gpu.nf4 import MAX_FUSED_TOKENS
from turret_server.kernels.gpu.ops import GpuOps

CUDA = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(2048, 5632), (5632, 2048), (4096, 14336), (4096, 1024)]  # in and out features
SEGMENTS = [(index, index + 1, 8 * (1 + index % 8)) for index in range(24)] + [(24, 300, 16), (310, 400, 64)]
LENGTHS = [(1, 1500), (1, 1), (1, 256), (1, 257), (200, 200), (64, 900), (3, 700), (1, 31)]


def assert_close(found, expected, tolerance):
    scale = expected.float().abs().max().item()
    limit = {torch.float32: tolerance / 256, torch.float16: tolerance / 4}.get(found.dtype, tolerance) * scale
    torch.testing.assert_close(found.float(), expected.float(), atol=limit, rtol=0)


def random(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, device=CUDA)


def weight(dtype, num_in, num_out):
    data, state = quantize_4bit(
        random(num_out, num_in, dtype=dtype), quant_type="nf4", compress_statistics=True
    )
    return NF4Weight(data, state, num_in, num_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 32, MAX_FUSED_TOKENS, MAX_FUSED_TOKENS + 1, 500])
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_nf4(dtype, num_tokens, num_in, num_out):
    whole, x = weight(dtype, num_in, num_out), random(num_tokens, num_in, dtype=dtype)
    found = GpuOps().nf4_linear(x, GpuOps().pack_nf4(whole))
    assert_close(found, ReferenceOps().nf4_linear(x.float(), whole), 2**-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
@pytest.mark.parametrize("start", [0, 3])
def test_lora(dtype, num_in, num_out, start):
    arena, rows = lora(dtype, num_in, num_out, SEGMENTS, start=start, device=CUDA)
    x, y = random(400, num_in, dtype=dtype), random(400, num_out, dtype=dtype)
    expected = y.clone()
    ReferenceOps().lora_add(expected, x, arena, rows)
    GpuOps().lora_add(y, x, arena, rows)
    assert_close(y, expected, 2**-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim"), [(4, 8, 64), (8, 4, 128), (2, 7, 80), (1, 4, 256)]
)
@pytest.mark.parametrize("options", [{}, {"window": 100, "softcap": 20.0, "sinks": True}])
def test_attention(dtype, num_kv_heads, group, head_dim, options):
    kv, batch = paged(dtype, LENGTHS, num_kv_heads=num_kv_heads, head_dim=head_dim, device=CUDA)
    num_heads = num_kv_heads * group
    num_tokens = int(batch.query_bounds[-1])
    key, value = random(2, num_kv_heads, num_tokens, head_dim, dtype=dtype).transpose(1, 2)
    GpuOps().write_kv(kv, key, value, batch)
    assert torch.equal(kv[batch.pages_T, 0, batch.slots_T], key)
    assert torch.equal(kv[batch.pages_T, 1, batch.slots_T], value)
    query = random(num_tokens, num_heads, head_dim, dtype=dtype)
    how = params(num_heads, head_dim, **options, device=CUDA)
    found = GpuOps().paged_attention(query, kv, batch, how)
    assert_close(found, ReferenceOps().paged_attention(query, kv, batch, how), 2**-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_a_token_gets_the_same_product_in_any_company(dtype, num_in, num_out):
    packed, x = (
        GpuOps().pack_nf4(weight(dtype, num_in, num_out)),
        random(MAX_FUSED_TOKENS, num_in, dtype=dtype),
    )
    together = GpuOps().nf4_linear(x, packed)
    for count in (1, 2, 16, 17, 33):
        assert torch.equal(GpuOps().nf4_linear(x[:count], packed), together[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_lora_in_any_company(dtype):
    arena, rows = lora(dtype, 2048, 1024, SEGMENTS, start=0, device=CUDA)
    x, y = random(400, 2048, dtype=dtype), random(400, 1024, dtype=dtype)
    together = y.clone()
    GpuOps().lora_add(together, x, arena, rows)
    for index in (0, 7, 24, 25):
        some = slice(rows.row_bounds[index], rows.row_bounds[index + 1])
        own = replace(
            rows,
            token_starts=(0,),
            token_ends=(1,),
            row_bounds=(0, some.stop - some.start),
            a_offsets_R=rows.a_offsets_R[some],
            b_offsets_R=rows.b_offsets_R[some],
            weights_R=rows.weights_R[some],
        )
        for token in (rows.token_starts[index], rows.token_ends[index] - 1):
            alone = y[token : token + 1].clone()
            GpuOps().lora_add(alone, x[token : token + 1], arena, own)
            assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_gets_the_same_attention_in_any_company(dtype):
    kv, batch = paged(dtype, LENGTHS, num_kv_heads=4, device=CUDA)
    query, how = random(int(batch.query_bounds[-1]), 16, 64, dtype=dtype), params(16, 64, device=CUDA)
    together = GpuOps().paged_attention(query, kv, batch, how)
    for index in range(len(LENGTHS)):
        some = slice(batch.query_bounds[index], batch.query_bounds[index + 1])
        alone = replace(
            batch,
            query_bounds=torch.tensor([0, some.stop - some.start]),
            context_lengths_Q=batch.context_lengths_Q[index : index + 1],
            block_tables_QM=batch.block_tables_QM[index : index + 1],
        )
        assert torch.equal(GpuOps().paged_attention(query[some], kv, alone, how), together[some])


def test_one_graph_serves_any_adapters_and_contexts():
    dtype, ops, count, size = torch.bfloat16, GpuOps(), 4, 1024
    packed = ops.pack_nf4(weight(dtype, size, size))
    arena, rows = lora(dtype, size, size, [(index, index + 1, 16) for index in range(count)], device=CUDA)
    tiles_N4 = torch.tensor([[i, i + 1, 16 * i, 16 * i + 16] for i in range(count)], device=CUDA).int()
    kv, batch = paged(dtype, [(1, 700), (1, 9), (1, 300), (1, 64)], num_kv_heads=4, device=CUDA)
    query_THD = torch.empty(count, 16, 64, dtype=dtype, device=CUDA)
    tiles = make_tiles(batch, query_THD, kv)
    x, how = random(count, size, dtype=dtype), params(16, 64, device=CUDA)

    def step():
        y = ops.nf4_linear(x, packed)
        add_tiles(y, x, arena, tiles_N4, 16, rows)
        return attend(y.view(count, 16, 64), kv, batch.block_tables_QM, tiles, how)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    # The same buffers with other adapters, one of a smaller rank, one without, and other contexts.
    tiles_N4.copy_(torch.tensor([[0, 1, 32, 48], [1, 2, 0, 5], [0, 0, 0, 0], [3, 4, 16, 32]], device=CUDA))
    tiles.split_N4[:, 3] = torch.tensor([255, 256, 3, 100], dtype=torch.int32, device=CUDA)
    batch.block_tables_QM.copy_(batch.block_tables_QM.flip(0).roll(1, dims=0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, step())
