"""The ops for GPUs, in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret_server.kernels.gpu import attention as gpu_attention
from turret_server.kernels.gpu import lora as gpu_lora
from turret_server.kernels.gpu import nf4 as gpu_nf4
from turret_server.kernels.gpu import pointwise as gpu_pointwise
from turret_server.kernels.ops import AttentionBatch, AttentionParams, LoraRows, NF4Weight, PackedNF4Weight
from turret_server.kernels.reference import ReferenceOps


class GpuOps:
    """See `ops.Ops`. Each kernel's file says whether a token's bits depend on the rest of the step."""

    def __init__(self) -> None:
        self._reference = ReferenceOps()
        # Every layer of a step has the same batch. It is kept, so that no other batch gets its identity.
        self._tiles: tuple[AttentionBatch, tuple[int, ...], gpu_attention.AttentionTiles] | None = None

    def pack_nf4(self, weight: NF4Weight) -> NF4Weight | PackedNF4Weight:
        return gpu_nf4.pack(weight) if gpu_nf4.is_packable(weight) else weight

    def nf4_linear(self, x_TI: torch.Tensor, weight: NF4Weight | PackedNF4Weight) -> torch.Tensor:
        if isinstance(weight, NF4Weight):
            return self._reference.nf4_linear(x_TI, weight)
        return gpu_nf4.linear(x_TI, weight)

    def linear(self, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        return self._reference.linear(x_TI, weight_OI)

    def rms_norm(self, x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
        return gpu_pointwise.rms_norm(x_TI, weight_I, epsilon)

    def lora_add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, arena: torch.Tensor, rows: LoraRows) -> None:
        gpu_lora.lora_add(y_TO, x_TI, arena, rows)

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
        """None: the parts of a sum follow from a weight's shape, so a group's product has other bits than its
        weights'.
        """

    def silu_multiply(self, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
        return gpu_pointwise.silu_multiply(gate_TI, up_TI)

    def rotate(self, x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        return gpu_pointwise.rotate(x_THD, cos_TD, sin_TD)

    def write_kv(
        self, kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
    ) -> None:
        gpu_attention.write_kv(kv_P2BKD, key_TKD, value_TKD, batch)

    def paged_attention(
        self, query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
    ) -> torch.Tensor:
        if isinstance(batch, gpu_attention.TiledBatch):
            return gpu_attention.attend(query_THD, kv_P2BKD, batch.block_tables_QM, batch.tiles, params)
        heads = (*query_THD.shape[1:], kv_P2BKD.shape[3], params.causal)
        if self._tiles is None or self._tiles[0] is not batch or self._tiles[1] != heads:
            tiles = gpu_attention.make_tiles(batch, query_THD, kv_P2BKD, causal=params.causal)
            self._tiles = batch, heads, tiles
        tiles = self._tiles[2]
        return gpu_attention.attend(query_THD, kv_P2BKD, batch.block_tables_QM, tiles, params)
