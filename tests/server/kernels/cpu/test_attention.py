"""Paged attention on the CPU against the reference, on fresh random inputs."""

from __future__ import annotations

import math

import pytest
import torch

from support.kernel_inputs import on_threads
from turret_server.kernels import AttentionBatch, AttentionParams, CpuOps, ReferenceOps

DTYPES = [torch.float32, torch.bfloat16]
NUM_LAYERS, LAYER = 3, 1


def paged(dtype, lengths, *, num_kv_heads=2, head_dim=64, block_size=16):
    """One layer's view of random pages, and sequences (new tokens, context with them) all over them."""
    widths = [math.ceil(context / block_size) for _, context in lengths]
    kv = torch.randn(sum(widths) + 2, NUM_LAYERS, 2, block_size, num_kv_heads, head_dim, dtype=dtype)
    pages = torch.randperm(len(kv))
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.long)
    pages_T, slots_T, bounds = [], [], [0]
    for table, width, (new, context) in zip(tables, widths, lengths, strict=True):
        table[:width], pages = pages[:width], pages[width:]
        positions = torch.arange(context - new, context)
        pages_T.append(table[positions // block_size])
        slots_T.append(positions % block_size)
        bounds.append(bounds[-1] + new)
    return kv[:, LAYER], AttentionBatch(
        query_bounds=torch.tensor(bounds),
        context_lengths_Q=torch.tensor([context for _, context in lengths]),
        block_tables_QM=tables,
        pages_T=torch.cat(pages_T),
        slots_T=torch.cat(slots_T),
    )


def params(num_heads, head_dim, *, window=None, softcap=None, sinks=False, causal=True):
    sinks_H = torch.randn(num_heads) if sinks else None
    return AttentionParams(head_dim**-0.5, window, softcap, sinks_H, causal)


def assert_close(found, expected):
    """Outputs are means of standard normal values. Both sum in float32; in bfloat16 both round once."""
    tolerance = {"atol": 2**-9, "rtol": 2**-7} if found.dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 0}
    torch.testing.assert_close(found, expected, **tolerance)


LENGTHS = {
    "one token": [(1, 1)],
    "decode": [(1, 600), (1, 1), (1, 16), (1, 17), (1, 333), (1, 48)],
    "prefill": [(75, 75), (1, 1), (16, 16)],
    "mixed": [(1, 200), (40, 97), (1, 31), (3, 600)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim", "block_size"),
    [(4, 8, 64, 16), (3, 1, 32, 48), (2, 2, 80, 16), (2, 4, 128, 48), (1, 7, 256, 16), (2, 3, 20, 16)],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 33}, {"softcap": 20.0}, {"sinks": True}, {"window": 5, "softcap": 2.0, "sinks": True}],
    ids=["plain", "window", "softcap", "sinks", "all"],
)
def test_attention_is_the_references(dtype, lengths, num_kv_heads, group, head_dim, block_size, options):
    num_heads = num_kv_heads * group
    kv, batch = paged(dtype, lengths, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size)
    query = torch.randn(batch.query_bounds[-1], num_heads, head_dim, dtype=dtype)
    how = params(num_heads, head_dim, **options)
    assert_close(
        CpuOps(dtype).paged_attention(query, kv, batch, how),
        ReferenceOps().paged_attention(query, kv, batch, how),
    )


# All queries of a sequence, after a prefix in two of them.
WHOLE = [(1, 1), (75, 75), (16, 23), (130, 150)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim", "block_size"), [(4, 1, 64, 16), (3, 1, 32, 48), (2, 4, 20, 16)]
)
@pytest.mark.parametrize(
    "options", [{}, {"window": 33}, {"window": 1}, {"window": 5, "softcap": 2.0, "sinks": True}]
)
def test_attention_to_both_sides_is_the_references(dtype, num_kv_heads, group, head_dim, block_size, options):
    num_heads = num_kv_heads * group
    kv, batch = paged(dtype, WHOLE, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size)
    query = torch.randn(batch.query_bounds[-1], num_heads, head_dim, dtype=dtype)
    how = params(num_heads, head_dim, causal=False, **options)
    assert_close(
        CpuOps(dtype).paged_attention(query, kv, batch, how),
        ReferenceOps().paged_attention(query, kv, batch, how),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_attended_to_both_sides_gets_the_same_in_any_step(dtype):
    kv, batch = paged(dtype, WHOLE)
    query, how = torch.randn(222, 4, 64, dtype=dtype), params(4, 64, causal=False)
    together = CpuOps(dtype).paged_attention(query, kv, batch, how)
    for index, (new, context) in enumerate(WHOLE):
        alone = AttentionBatch(
            query_bounds=torch.tensor([0, new]),
            context_lengths_Q=torch.tensor([context]),
            block_tables_QM=batch.block_tables_QM[index : index + 1],
            pages_T=torch.zeros(new, dtype=torch.long),
            slots_T=torch.zeros(new, dtype=torch.long),
        )
        rows = slice(batch.query_bounds[index], batch.query_bounds[index + 1])
        assert torch.equal(CpuOps(dtype).paged_attention(query[rows], kv, alone, how), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_written_where_the_reference_writes_them(dtype):
    kv, batch = paged(dtype, LENGTHS["mixed"])
    expected = kv.clone()
    # The layout of Hugging Face's models, heads before tokens.
    key, value = torch.randn(2, 2, batch.query_bounds[-1], 64, dtype=dtype).transpose(1, 2)
    CpuOps(dtype).write_kv(kv, key, value, batch)
    ReferenceOps().write_kv(expected, key, value, batch)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"window": 21, "softcap": 20.0, "sinks": True}])
def test_a_token_gets_the_same_in_any_step_and_any_chunk(dtype, group, options):
    """To the bit: alone in a step, with others, first in a prompt's chunk or in its middle."""
    num_heads, head_dim = 2 * group, 80
    lengths = [(1, 130), (50, 130), (7, 7), (1, 3)]
    kv, batch = paged(dtype, lengths, head_dim=head_dim)
    query = torch.randn(59, num_heads, head_dim, dtype=dtype)
    how = params(num_heads, head_dim, **options)
    together = CpuOps(dtype).paged_attention(query, kv, batch, how)
    for index, (new, context) in enumerate(lengths):
        for token in range(new):
            alone = AttentionBatch(
                query_bounds=torch.tensor([0, 1]),
                context_lengths_Q=torch.tensor([context - new + token + 1]),
                block_tables_QM=batch.block_tables_QM[index : index + 1],
                pages_T=torch.zeros(1, dtype=torch.long),
                slots_T=torch.zeros(1, dtype=torch.long),
            )
            at = batch.query_bounds[index] + token
            found = CpuOps(dtype).paged_attention(query[at : at + 1], kv, alone, how)
            assert torch.equal(found[0], together[at])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size_are_weighed(dtype):
    kv, batch = paged(dtype, [(1, 40), (9, 20)])
    query = torch.randn(10, 4, 64, dtype=dtype) * 100
    for how in (params(4, 64), params(4, 64, softcap=30.0)):
        found = CpuOps(dtype).paged_attention(query, kv, batch, how)
        assert found.isfinite().all()
        expected = ReferenceOps().paged_attention(query, kv, batch, how)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_number_of_threads_changes_nothing(num_threads, lengths):
    kv, batch = paged(torch.float32, lengths)
    ops, query = CpuOps(torch.float32), torch.randn(batch.query_bounds[-1], 4, 64)

    def compute() -> torch.Tensor:
        return ops.paged_attention(query, kv, batch, params(4, 64, window=33))

    # First on many: memory that no thread writes must not hold what it should.
    on_many, on_one = on_threads(num_threads, compute), on_threads(1, compute)
    assert torch.equal(on_many, on_one)
