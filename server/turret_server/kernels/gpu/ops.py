"""The ops for GPUs: kernels in Triton, and the matrix library for many tokens."""

from __future__ import annotations

import torch

from turret_server.kernels.gpu import attention as gpu_attention
from turret_server.kernels.gpu import lora as gpu_lora
from turret_server.kernels.gpu import nf4 as gpu_nf4
from turret_server.kernels.gpu import norm as gpu_norm
from turret_server.kernels.ops import AttentionBatch, AttentionParams, LoraRows, NF4Weight, PackedNF4Weight
from turret_server.kernels.reference import ReferenceOps


class GpuOps:
    """See `ops.Ops`. What holds of a token's result in company is said beside each kernel."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._reference = ReferenceOps()
        # Every layer of a step asks with the same batch. Kept, so that its identity is nobody else's.
        self._tiles: tuple[AttentionBatch, int, gpu_attention.AttentionTiles] | None = None

    def pack_nf4(self, weight: NF4Weight) -> NF4Weight | PackedNF4Weight:
        return gpu_nf4.pack(weight, self._dtype) if gpu_nf4.is_packable(weight) else weight

    def nf4_linear(self, x_TI: torch.Tensor, weight: NF4Weight | PackedNF4Weight) -> torch.Tensor:
        if isinstance(weight, NF4Weight):
            return self._reference.nf4_linear(x_TI, weight)
        return gpu_nf4.linear(x_TI, weight)

    def linear(self, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        return self._reference.linear(x_TI, weight_OI)

    def rms_norm(self, x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
        return gpu_norm.rms_norm(x_TI, weight_I, epsilon)

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

    def write_kv(
        self, kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
    ) -> None:
        gpu_attention.write_kv(kv_P2BKD, key_TKD, value_TKD, batch)

    def paged_attention(
        self, query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
    ) -> torch.Tensor:
        if isinstance(batch, gpu_attention.TiledBatch):
            return gpu_attention.attend(query_THD, kv_P2BKD, batch.block_tables_QM, batch.tiles, params)
        group = query_THD.shape[1] // kv_P2BKD.shape[3]
        if self._tiles is None or self._tiles[0] is not batch or self._tiles[1] != group:
            self._tiles = batch, group, gpu_attention.make_tiles(batch, group, query_THD.device)
        tiles = self._tiles[2]
        return gpu_attention.attend(query_THD, kv_P2BKD, batch.block_tables_QM, tiles, params)
