"""Every op in plain torch, with float32 accumulation: the oracle of the kernels, and their fallback.

For shape suffixes see `ops.py`; also N the context of one sequence, n its new tokens, G the query heads that
share a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from bitsandbytes.functional import dequantize_4bit

from turret_server.kernels.ops import AttentionBatch, AttentionParams, LoraRows, NF4Weight, PackedNF4Weight


class ReferenceOps:
    """See `ops.Ops`."""

    def pack_nf4(self, weight: NF4Weight) -> NF4Weight | PackedNF4Weight:
        return weight

    def nf4_linear(self, x_TI: torch.Tensor, weight: NF4Weight | PackedNF4Weight) -> torch.Tensor:
        assert isinstance(weight, NF4Weight)
        weight_OI = dequantize_4bit(weight.data, weight.state).to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI)

    def linear(self, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x_TI, weight_OI)

    def rms_norm(self, x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
        x32_TI = x_TI.float()
        scale_T1 = torch.rsqrt(x32_TI.square().mean(-1, keepdim=True) + epsilon)
        return weight_I * (x32_TI * scale_T1).to(x_TI.dtype)

    def lora_add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, arena: torch.Tensor, rows: LoraRows) -> None:
        for segment, (start, end) in enumerate(zip(rows.token_starts, rows.token_ends, strict=True)):
            segment_rows = slice(rows.row_bounds[segment], rows.row_bounds[segment + 1])
            a_RI = _gather_rows(arena, rows.a_offsets_R[segment_rows], x_TI.shape[1])
            first, last = rows.columns[segment] if rows.columns else (0, y_TO.shape[1])
            b_RO = _gather_rows(arena, rows.b_offsets_R[segment_rows], last - first)
            shrunk_TR = (x_TI[start:end].float() @ a_RI.T) * rows.weights_R[segment_rows]
            y_TO[start:end, first:last] += (shrunk_TR @ b_RO).to(y_TO.dtype)

    def adapted_linear(
        self,
        x_TI: torch.Tensor,
        weight: NF4Weight | PackedNF4Weight,
        arena: torch.Tensor,
        rows: LoraRows | None,
    ) -> torch.Tensor:
        y_TO = self.nf4_linear(x_TI, weight)
        if rows is not None:
            self.lora_add(y_TO, x_TI, arena, rows)
        return y_TO

    def group(self, weights: Sequence[NF4Weight | PackedNF4Weight]) -> None:
        """None: weights in bitsandbytes' layout are multiplied one by one."""

    def silu_multiply(self, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate_TI) * up_TI

    def rotate(self, x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        first, second = x_THD.chunk(2, dim=-1)
        return x_THD * cos_TD[:, None] + torch.cat((-second, first), dim=-1) * sin_TD[:, None]

    def write_kv(
        self,
        kv_P2BKD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        kv_P2BKD[batch.pages_T, 0, batch.slots_T] = key_TKD
        kv_P2BKD[batch.pages_T, 1, batch.slots_T] = value_TKD

    def paged_attention(
        self, query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
    ) -> torch.Tensor:
        out_THD = torch.empty_like(query_THD)
        bounds = batch.query_bounds.tolist()
        for index, num_context in enumerate(batch.context_lengths_Q.tolist()):
            new = slice(bounds[index], bounds[index + 1])
            num_pages = -(-num_context // kv_P2BKD.shape[2])
            pages_N2BKD = kv_P2BKD[batch.block_tables_QM[index, :num_pages]]
            key_NKD = pages_N2BKD[:, 0].flatten(0, 1)[:num_context]
            value_NKD = pages_N2BKD[:, 1].flatten(0, 1)[:num_context]
            out_THD[new] = _attend(query_THD[new], key_NKD, value_NKD, params)
        return out_THD


def _gather_rows(arena: torch.Tensor, offsets_R: torch.Tensor, length: int) -> torch.Tensor:
    columns = torch.arange(length, device=arena.device)
    return arena[offsets_R[:, None] + columns].float()


def _attend(
    query_nHD: torch.Tensor, key_NKD: torch.Tensor, value_NKD: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    """Attention of the last n of N tokens, with the query heads of a key-value head as rows of one matrix."""
    num_new, num_heads, head_dim = query_nHD.shape
    num_context, num_kv_heads, _ = key_NKD.shape
    query_KGnD = query_nHD.view(num_new, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).float()
    scores_KGnN = query_KGnD @ key_NKD.float().permute(1, 2, 0)[:, None] * params.scaling
    if params.softcap is not None:
        scores_KGnN = params.softcap * torch.tanh(scores_KGnN / params.softcap)
    mask_nN = _mask(num_new, num_context, params, query_nHD.device)
    scores_KGnN = scores_KGnN.masked_fill(~mask_nN, -torch.inf)
    if params.sinks_H is not None:
        sinks = params.sinks_H.float().view(num_kv_heads, -1, 1, 1).expand(-1, -1, num_new, 1)
        scores_KGnN = torch.cat([scores_KGnN, sinks], dim=-1)
    weights_KGnN = torch.softmax(scores_KGnN, dim=-1)[..., :num_context]
    out_KGnD = weights_KGnN @ value_NKD.float().permute(1, 0, 2)[:, None]
    return out_KGnD.permute(2, 0, 1, 3).reshape(num_new, num_heads, -1).to(query_nHD.dtype)


def _mask(num_new: int, num_context: int, params: AttentionParams, device: torch.device) -> torch.Tensor:
    position_N = torch.arange(num_context, device=device)
    distance_nN = position_N - position_N[num_context - num_new :, None]
    window = num_context if params.window is None else params.window
    return (distance_nN > -window) & (distance_nN < (1 if params.causal else window))
