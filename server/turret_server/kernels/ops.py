"""The ops: what each kernel computes, and its arguments.

Shape suffixes: T tokens of the step, S segments, Q sequences, P pages, B slots of a page, H query heads,
K key-value heads, D head dimension, I and O in and out features, R LoRA rows, M pages of the longest
context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from bitsandbytes.functional import QuantState


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """An NF4 weight, [O, I], as bitsandbytes stores it."""

    data: torch.Tensor
    state: QuantState
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedNF4Weight:
    """An NF4 weight in the layout of one implementation's kernel.

    `absmax` are the scales with double quantisation undone; `code` are the values of the codes.
    """

    data: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    block_size: int
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, eq=False)
class LoraRows:
    """The LoRA rows that one linear applies in this step, segment by segment.

    Segment s has tokens token_starts[s] … token_ends[s] - 1 and rows row_bounds[s] … row_bounds[s + 1] - 1.
    Row r reads A at a_offsets[r] and B at b_offsets[r], element offsets in the arena, and is scaled by
    weights[r]. Segment s changes out features columns[s][0] … columns[s][1] - 1, all if `columns` is empty;
    segments that change different ones may have the same tokens, see `Ops.group`. Compared by identity: while
    a batch decodes, every step has the same object, so an implementation can cache what it derives from it.
    """

    token_starts: tuple[int, ...]
    token_ends: tuple[int, ...]
    row_bounds: tuple[int, ...]
    a_offsets_R: torch.Tensor
    b_offsets_R: torch.Tensor
    weights_R: torch.Tensor
    columns: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Where the tokens of each sequence lie in the step, and its keys and values in the arena.

    Sequence q has tokens query_bounds[q] … query_bounds[q + 1] - 1, which end its context of
    context_lengths[q] tokens; both are int64 on the host. Position p lies in page block_tables[q, p // B],
    slot p % B. Block tables are as wide as the longest; the padding of shorter ones is not read. Token t is
    written to slot slots[t] of page pages[t].
    """

    query_bounds: torch.Tensor
    context_lengths_Q: torch.Tensor
    block_tables_QM: torch.Tensor
    pages_T: torch.Tensor
    slots_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """Options of attention, as the model passes them.

    `window` is the number of tokens that a query sees, itself included; without `causal`, as many on both
    sides of it. Scores become softcap · tanh(score / softcap). `sinks_H` are scores that enter the softmax's
    sum without a value. Without `causal`, a query sees later tokens too: all those of its sequence must be in
    the step.
    """

    scaling: float
    window: int | None
    softcap: float | None
    sinks_H: torch.Tensor | None
    causal: bool = True


class Ops(Protocol):
    """One implementation of every op. `reference.py` is the oracle that the others are tested against."""

    def pack_nf4(self, weight: NF4Weight) -> NF4Weight | PackedNF4Weight:
        """The weight in the layout of this implementation's kernel; once, at load."""

    def nf4_linear(self, x_TI: torch.Tensor, weight: NF4Weight | PackedNF4Weight) -> torch.Tensor:
        """X · Wᵀ, [T, O]."""

    def linear(self, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        """X · Wᵀ with an unquantised weight, [T, O]."""

    def rms_norm(self, x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Weight · x / √(mean(x²) + epsilon) in float32, rounded to the dtype before the weight and after."""

    def lora_add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, arena: torch.Tensor, rows: LoraRows) -> None:
        """y[t] += Σ_r weights[r] · (A_r · x[t]) · B_r over the rows of t's segment, in place."""

    def adapted_linear(
        self,
        x_TI: torch.Tensor,
        weight: NF4Weight | PackedNF4Weight,
        arena: torch.Tensor,
        rows: LoraRows | None,
    ) -> torch.Tensor:
        """`nf4_linear` followed by `lora_add` if there are rows, [T, O]."""

    def group(
        self, weights: Sequence[NF4Weight | PackedNF4Weight]
    ) -> tuple[PackedNF4Weight, list[PackedNF4Weight]] | None:
        """Weights of one number of in features as one, their out features side by side, and each of them
        again, in that one's memory. None where one product is not faster than one of each, or has other bits.
        """

    def silu_multiply(self, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
        """Gate · sigmoid(gate), rounded to the dtype, times up, [T, I]; rows may lie apart."""

    def rotate(self, x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        """Rotary embedding (arXiv 2104.09864) by halves: x · cos + (−second half, first half) · sin, each
        product rounded to the dtype, [T, H, D]; tokens may lie apart.
        """

    def write_kv(
        self, kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
    ) -> None:
        """Writes one layer's keys and values of the step to their slots."""

    def paged_attention(
        self, query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
    ) -> torch.Tensor:
        """Attention of every token over the pages of its sequence, [T, H, D]."""
