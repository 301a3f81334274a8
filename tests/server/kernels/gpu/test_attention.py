"""Paged attention on a GPU, or in Triton's interpreter, against the reference, on fresh random inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.kernel_inputs import DEVICE, paged, params
from turret_server.kernels import ReferenceOps
from turret_server.kernels.gpu import attention as gpu_attention
from turret_server.kernels.gpu.attention import AttentionTiles, attend, make_tiles
from turret_server.kernels.gpu.ops import GpuOps

# Outputs are means of standard normal values. In 16 bits, weights are rounded once and outputs once.
TOLERANCES = {torch.float32: (5e-6, 0.0), torch.float16: (2**-9, 2**-9), torch.bfloat16: (2**-6, 2**-7)}

LENGTHS = {
    "one token": [(1, 1)],
    "decode": [(1, 300), (1, 1), (1, 16), (1, 17)],
    "prefill": [(75, 75), (1, 1)],
    "mixed": [(1, 100), (40, 97), (3, 257)],
}
OPTIONS = {
    "plain": {},
    "window": {"window": 33},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "all": {"window": 5, "softcap": 2.0, "sinks": True},
}


def queries(dtype, batch, num_heads, head_dim):
    return torch.randn(int(batch.query_bounds[-1]), num_heads, head_dim, dtype=dtype, device=DEVICE)


def assert_close(found, expected):
    atol, rtol = TOLERANCES[found.dtype]
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def assert_attention_is_the_references(dtype, lengths, num_kv_heads, group, head_dim, block_size, options):
    num_heads = num_kv_heads * group
    kv, batch = paged(dtype, lengths, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size)
    query, how = queries(dtype, batch, num_heads, head_dim), params(num_heads, head_dim, **options)
    assert_close(
        GpuOps().paged_attention(query, kv, batch, how),
        ReferenceOps().paged_attention(query, kv, batch, how),
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_the_references(lengths, options):
    assert_attention_is_the_references(torch.float32, lengths, 2, 2, 80, 16, options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("options", [{}, {"window": 33}, OPTIONS["all"]], ids=["plain", "window", "all"])
def test_attention_to_both_sides_is_the_references(dtype, options):
    """Of all queries of a sequence, after a prefix in two of them."""
    lengths = [(1, 1), (75, 75), (5, 23), (70, 90)]
    assert_attention_is_the_references(dtype, lengths, 2, 2, 80, 16, {**options, "causal": False})


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 4, 64, 16), (1, 7, 96, 48), (2, 20, 20, 16), (1, 3, 256, 16)])
def test_heads_of_any_number_and_size(dtype, shape):
    assert_attention_is_the_references(dtype, [(1, 70), (19, 37)], *shape, OPTIONS["all"])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tokens_are_written_where_the_reference_writes_them(dtype):
    kv, batch = paged(dtype, LENGTHS["mixed"], num_kv_heads=3, head_dim=20)
    expected = kv.clone()
    # The layout of Hugging Face's models, heads before tokens.
    shape = (2, 3, int(batch.query_bounds[-1]), 20)
    key, value = torch.randn(shape, dtype=dtype, device=DEVICE).transpose(1, 2)
    GpuOps().write_kv(kv, key, value, batch)
    ReferenceOps().write_kv(expected, key, value, batch)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_size_are_weighed(dtype):
    kv, batch = paged(dtype, [(1, 40), (40, 60)], num_kv_heads=1)
    query = queries(dtype, batch, 2, 64) * 100
    for how in (params(2, 64), params(2, 64, softcap=30.0)):
        found = GpuOps().paged_attention(query, kv, batch, how)
        expected = ReferenceOps().paged_attention(query, kv, batch, how)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_queries_may_lie_heads_before_tokens():
    kv, batch = paged(torch.float32, LENGTHS["mixed"])
    query, how = queries(torch.float32, batch, 4, 64), params(4, 64)
    apart = query.transpose(0, 1).contiguous().transpose(0, 1)
    expected = ReferenceOps().paged_attention(query, kv, batch, how)
    assert_close(GpuOps().paged_attention(apart, kv, batch, how), expected)


def test_what_no_sequence_holds_is_not_read():
    kv, batch = paged(torch.float32, LENGTHS["mixed"])
    held = torch.zeros(len(kv), kv.shape[2], dtype=torch.bool)
    for table, context in zip(batch.block_tables_QM.cpu(), batch.context_lengths_Q, strict=True):
        positions = torch.arange(int(context))
        held[table[positions // 16], positions % 16] = True
    kv.transpose(1, 2)[~held] = torch.nan
    query, how = queries(torch.float32, batch, 4, 64), params(4, 64)
    assert GpuOps().paged_attention(query, kv, batch, how).isfinite().all()


def test_each_step_and_each_number_of_heads_has_its_own_tiles():
    ops = GpuOps()
    for lengths in ([(1, 20), (30, 30)], [(30, 30), (1, 20)]):
        kv, batch = paged(torch.float32, lengths)
        for num_heads in (2, 6):
            query, how = queries(torch.float32, batch, num_heads, 64), params(num_heads, 64)
            expected = ReferenceOps().paged_attention(query, kv, batch, how)
            assert_close(ops.paged_attention(query, kv, batch, how), expected)


def test_tiles_without_tokens_do_nothing():
    """As in a CUDA graph that was recorded for more sequences and longer ones."""
    kv, batch = paged(torch.float32, [(1, 300), (1, 7)])
    query, how = queries(torch.float32, batch, 4, 64), params(4, 64, sinks=True)
    used = make_tiles(batch, query, kv)
    split_N4 = torch.cat((used.split_N4, used.split_N4.new_zeros(3, 4)))
    tiles = AttentionTiles(split_N4, used.unsplit_N4, used.num_splits + 2, num_programs=1)
    found = attend(query, kv, batch.block_tables_QM, tiles, how)
    assert_close(found, ReferenceOps().paged_attention(query, kv, batch, how))


def test_a_long_context_has_longer_splits_and_not_more(monkeypatch):
    monkeypatch.setattr(gpu_attention, "_MAX_SPLITS", 2)
    kv, batch = paged(torch.float32, [(1, 1100), (1, 300), (1, 513)])
    query, how = queries(torch.float32, batch, 4, 64), params(4, 64, window=900)
    tiles = make_tiles(batch, query, kv)
    assert tiles.num_splits == 2
    found = attend(query, kv, batch.block_tables_QM, tiles, how)
    assert_close(found, ReferenceOps().paged_attention(query, kv, batch, how))
    shared = attend(query, kv, batch.block_tables_QM, replace(tiles, num_programs=1), how)
    assert torch.equal(shared, found), "who computes a split changes nothing"
