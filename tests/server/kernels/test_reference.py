"""The reference ops against the plainest way to say the same, on fresh random inputs."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from turret_server.kernels import AttentionBatch, AttentionParams, LoraRows, NF4Weight, ReferenceOps

OPS = ReferenceOps()
BLOCK = 4


def test_nf4_linear_multiplies_with_the_dequantised_weight():
    data, state = quantize_4bit(torch.randn(48, 64), quant_type="nf4", compress_statistics=True)
    x = torch.randn(5, 64)
    weight = OPS.pack_nf4(NF4Weight(data, state, 64, 48))
    torch.testing.assert_close(OPS.nf4_linear(x, weight), x @ dequantize_4bit(data, state).T)


@pytest.mark.parametrize(
    "segments", [[(0, 1, 3)], [(0, 7, 1)], [(1, 2, 5), (2, 6, 2)], [(0, 3, 8), (5, 7, 1)]]
)
def test_lora_add_applies_each_segments_own_rows(segments):
    """Segments are (first token, end, rank); ranks are ragged, and tokens between have no adapter."""
    num_tokens, num_in, num_out = 7, 6, 10
    arena = torch.randn(2000)
    a_offsets, b_offsets, weights, bounds = [], [], [], [0]
    for _, _, rank in segments:
        a_offsets += torch.randint(0, 1000 - num_in, (rank,)).tolist()
        b_offsets += torch.randint(1000, 2000 - num_out, (rank,)).tolist()
        weights += torch.randn(rank).tolist()
        bounds.append(bounds[-1] + rank)
    rows = LoraRows(
        token_starts=tuple(start for start, _, _ in segments),
        token_ends=tuple(end for _, end, _ in segments),
        row_bounds=tuple(bounds),
        a_offsets_R=torch.tensor(a_offsets),
        b_offsets_R=torch.tensor(b_offsets),
        weights_R=torch.tensor(weights),
    )
    x, y = torch.randn(num_tokens, num_in), torch.randn(num_tokens, num_out)
    expected = y.clone()
    for index, (start, end, _) in enumerate(segments):
        for row in range(bounds[index], bounds[index + 1]):
            a = arena[a_offsets[row] : a_offsets[row] + num_in]
            b = arena[b_offsets[row] : b_offsets[row] + num_out]
            for token in range(start, end):
                expected[token] += weights[row] * (a @ x[token]) * b
    OPS.lora_add(y, x, arena, rows)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def naive_attention(query, keys, values, params):
    """One query at a time, one head at a time."""
    num_new, num_heads, _ = query.shape
    group = num_heads // keys.shape[1]
    out = torch.empty(num_new, num_heads, values.shape[-1])
    for n in range(num_new):
        position = len(keys) - num_new + n
        first = 0 if params.window is None else max(0, position - params.window + 1)
        end = position + 1 if params.causal else position + (params.window or len(keys))
        for head in range(num_heads):
            scores = keys[first:end, head // group] @ query[n, head] * params.scaling
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            weights = scores.exp()
            total = weights.sum()
            if params.sinks_H is not None:
                total = total + params.sinks_H[head].exp()
            out[n, head] = (weights / total) @ values[first:end, head // group]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_paged_attention_reads_each_sequence_through_its_block_table(window, softcap, sinks, causal):
    num_heads, num_kv_heads, dim = 4, 2, 8
    lengths = [(1, 1), (1, 9), (5, 5), (3, 12), (8, 20)]  # new tokens, context with them
    pages = torch.randperm(32).tolist()
    tables, histories = [], []
    kv = torch.zeros(32, 2, BLOCK, num_kv_heads, dim)
    for _, context in lengths:
        table = [pages.pop() for _ in range(math.ceil(context / BLOCK))]
        history = torch.randn(2, context, num_kv_heads, dim)
        tables.append(table)
        histories.append(history)
    bounds = [0]
    for new, _ in lengths:
        bounds.append(bounds[-1] + new)
    positions = [p for new, context in lengths for p in range(context - new, context)]
    owner = [index for index, (new, _) in enumerate(lengths) for _ in range(new)]
    # What earlier steps wrote, and then what this one writes.
    for table, history, (new, context) in zip(tables, histories, lengths, strict=True):
        for position in range(context - new):
            kv[table[position // BLOCK], :, position % BLOCK] = history[:, position]
    batch = AttentionBatch(
        query_bounds=torch.tensor(bounds),
        context_lengths_Q=torch.tensor([context for _, context in lengths]),
        # Behind a sequence's own, the table may say anything.
        block_tables_QM=torch.tensor([table + [len(kv)] * (5 - len(table)) for table in tables]),
        pages_T=torch.tensor([tables[index][p // BLOCK] for index, p in zip(owner, positions, strict=True)]),
        slots_T=torch.tensor(positions) % BLOCK,
    )
    new_kv = torch.stack([histories[index][:, p] for index, p in zip(owner, positions, strict=True)], dim=1)
    OPS.write_kv(kv, new_kv[0], new_kv[1], batch)
    query = torch.randn(bounds[-1], num_heads, dim)
    params = AttentionParams(
        scaling=0.3,
        window=window,
        softcap=softcap,
        sinks_H=torch.randn(num_heads) if sinks else None,
        causal=causal,
    )
    found = OPS.paged_attention(query, kv, batch, params)
    for index, history in enumerate(histories):
        some = slice(bounds[index], bounds[index + 1])
        expected = naive_attention(query[some], history[0], history[1], params)
        torch.testing.assert_close(found[some], expected, atol=1e-5, rtol=1e-5)
