"""Random inputs of kernels, and the device that GPU kernels are tested on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from turret_server.kernels import AttentionBatch, AttentionParams, LoraRows

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")

_Result = TypeVar("_Result")


def on_threads(count: int, compute: Callable[[], _Result]) -> _Result:
    """What is computed on so many threads; tests have one otherwise, which then does the shares of all."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return compute()
    finally:
        torch.set_num_threads(before)


SEGMENTS = {
    "none": [],
    "one token": [(0, 1, 16)],
    "a token each": [(0, 1, 1), (1, 2, 64), (2, 3, 8), (3, 4, 17)],
    "no rows in one": [(0, 2, 3), (2, 4, 0), (4, 5, 7)],
    "no tokens in one": [(0, 2, 3), (2, 2, 5), (2, 3, 7)],
    "long": [(0, 50, 13)],
    "mixed, with gaps": [(1, 2, 40), (2, 9, 1), (11, 45, 5), (45, 46, 8), (50, 70, 33)],
}


def lora(dtype, num_in, num_out, segments, *, start=5, device=DEVICE):
    """An arena and the rows of segments (first token, end, rank), scattered over it in no order."""
    ranks = [rank for _, _, rank in segments]
    width, slots = num_in + num_out, torch.randperm(sum(ranks) + 3)[: sum(ranks)]
    arena = torch.randn((sum(ranks) + 3) * width + start, dtype=dtype, device=device)
    return arena, LoraRows(
        token_starts=tuple(start for start, _, _ in segments),
        token_ends=tuple(end for _, end, _ in segments),
        row_bounds=tuple(sum(ranks[:index]) for index in range(len(ranks) + 1)),
        a_offsets_R=(slots * width + start).to(device),
        b_offsets_R=(slots * width + start + num_in).to(device),
        weights_R=torch.rand(sum(ranks), device=device) + 0.5,
    )


def paged(dtype, lengths, *, num_kv_heads=2, head_dim=64, block_size=16, device=DEVICE):
    """The second of three layers' view of random pages, and sequences (new tokens, context with them) all
    over them.
    """
    widths = [math.ceil(context / block_size) for _, context in lengths]
    kv = torch.randn(sum(widths) + 2, 3, 2, block_size, num_kv_heads, head_dim, dtype=dtype, device=device)
    pages = torch.randperm(len(kv))
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.long)
    pages_T, slots_T, bounds = [], [], [0]
    for table, width, (new, context) in zip(tables, widths, lengths, strict=True):
        table[:width], pages = pages[:width], pages[width:]
        positions = torch.arange(context - new, context)
        pages_T.append(table[positions // block_size])
        slots_T.append(positions % block_size)
        bounds.append(bounds[-1] + new)
    return kv[:, 1], AttentionBatch(
        query_bounds=torch.tensor(bounds),
        context_lengths_Q=torch.tensor([context for _, context in lengths]),
        block_tables_QM=tables.to(device),
        pages_T=torch.cat(pages_T).to(device),
        slots_T=torch.cat(slots_T).to(device),
    )


def params(num_heads, head_dim, *, window=None, softcap=None, sinks=False, causal=True, device=DEVICE):
    sinks_H = torch.randn(num_heads, device=device) if sinks else None
    return AttentionParams(head_dim**-0.5, window, softcap, sinks_H, causal)
