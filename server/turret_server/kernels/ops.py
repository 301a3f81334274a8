"""The table of ops: what a kernel computes, and the tensors it is given.

Shapes: T tokens of the step, S segments, Q sequences, P pages, B slots of a page, H query heads,
K key-value heads, D head dimension, I and O in and out features, R LoRA rows, M pages of the longest
context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from bitsandbytes.functional import QuantState


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """A 4-bit weight, [O, I], as bitsandbytes loaded it."""

    data: torch.Tensor
    state: QuantState
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedNF4Weight:
    """A 4-bit weight in the order of a table's kernel, its scales de-nested once, in the compute dtype."""

    data: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    block_size: int
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, eq=False)
class LoraRows:
    """The LoRA rows that one linear applies in this step, segment by segment.

    Segment s covers the tokens token_starts[s] … token_ends[s] and the rows
    row_bounds[s] … row_bounds[s + 1]. Row r reads A at a_offsets[r] and B at b_offsets[r], both element
    offsets in the arena, and counts weights[r]-fold. A decode step has the very rows of the step before it,
    so that a table may keep what it makes of them.
    """

    token_starts: tuple[int, ...]
    token_ends: tuple[int, ...]
    row_bounds: tuple[int, ...]
    a_offsets_R: torch.Tensor
    b_offsets_R: torch.Tensor
    weights_R: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Where the tokens of each sequence lie in the step, and its keys and values in the arena.

    Sequence q has the tokens query_bounds[q] … query_bounds[q + 1], the last of its context of
    context_lengths[q] tokens; both are int64 on the host. Position p lies in page
    block_tables[q, p // B], slot p % B. Block tables are as wide as the longest; what a shorter one has
    at its end counts for nothing.
    """

    query_bounds: torch.Tensor
    context_lengths_Q: torch.Tensor
    block_tables_QM: torch.Tensor
    pages_T: torch.Tensor
    slots_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What the model's own attention would be called with.

    `window` is how many tokens a query sees, itself included; `softcap` bounds the scores;
    `sinks_H` are scores that take weight and give no value.
    """

    scaling: float
    window: int | None
    softcap: float | None
    sinks_H: torch.Tensor | None


class Ops(Protocol):
    """One implementation of every op; `reference.py` is the oracle of the others."""

    def pack_nf4(self, weight: NF4Weight) -> NF4Weight | PackedNF4Weight:
        """Bring a weight into the layout that this table multiplies with, once at load."""

    def nf4_linear(self, x_TI: torch.Tensor, weight: NF4Weight | PackedNF4Weight) -> torch.Tensor:
        """X · Wᵀ, [T, O]."""

    def linear(self, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        """X · Wᵀ with a weight that is not quantised, [T, O]."""

    def rms_norm(self, x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Weight · (x / √(mean(x²) + epsilon)), in float32, rounded before the weight and after."""

    def lora_add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, arena: torch.Tensor, rows: LoraRows) -> None:
        """y[t] += Σ_r weights[r] · (A_r · x[t]) · B_r over the rows of t's segment, in place."""

    def adapted_linear(
        self,
        x_TI: torch.Tensor,
        weight: NF4Weight | PackedNF4Weight,
        arena: torch.Tensor,
        rows: LoraRows | None,
    ) -> torch.Tensor:
        """`nf4_linear`, to which `lora_add` adds the rows if there are any, [T, O]."""

    def write_kv(
        self, kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
    ) -> None:
        """Write the step's keys and values of one layer to their slots."""

    def paged_attention(
        self, query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
    ) -> torch.Tensor:
        """Causal attention of every token over its sequence's pages, [T, H, D]."""
