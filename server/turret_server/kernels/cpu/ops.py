"""The ops for CPUs, in numba, for bfloat16 and float32."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit

from turret_server.kernels.cpu import attention as cpu_attention
from turret_server.kernels.cpu import dense as cpu_dense
from turret_server.kernels.cpu import lora as cpu_lora
from turret_server.kernels.cpu import nf4 as cpu_nf4
from turret_server.kernels.cpu import pointwise as cpu_pointwise
from turret_server.kernels.cpu.llvm.jit import as_array
from turret_server.kernels.cpu.llvm.parallel import THREADS
from turret_server.kernels.ops import AttentionBatch, AttentionParams, LoraRows, NF4Weight, PackedNF4Weight
from turret_server.kernels.reference import ReferenceOps

log = logging.getLogger(__name__)


class CpuOps:
    """See `ops.Ops`. A token's bits do not depend on the other tokens of the step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._no_prefetch = as_array(torch.empty(0, dtype=dtype)), np.empty(0, np.int64)
        self._reference = ReferenceOps()
        self._arena: tuple[torch.Tensor, Any] | None = None
        started = time.perf_counter()
        log.info(
            "CPU kernels for %s on %d threads: the first start compiles them, which takes about a minute",
            dtype,
            THREADS,
        )
        self._warm_up(dtype)
        log.info("CPU kernels: ready in %.1f s", time.perf_counter() - started)

    def pack_nf4(self, weight: NF4Weight) -> NF4Weight | PackedNF4Weight:
        return cpu_nf4.pack(weight, self._dtype)

    def nf4_linear(self, x_TI: torch.Tensor, weight: NF4Weight | PackedNF4Weight) -> torch.Tensor:
        if isinstance(weight, NF4Weight):
            return self._reference.nf4_linear(x_TI, weight)
        y_TO = x_TI.new_empty(len(x_TI), weight.out_features)
        cpu_nf4.multiply(as_array(y_TO), as_array(x_TI.contiguous()), weight, self._no_prefetch)
        return y_TO

    def linear(self, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        if cpu_dense.is_supported(weight_OI):
            return cpu_dense.linear(x_TI, weight_OI)
        return self._reference.linear(x_TI, weight_OI)

    def rms_norm(self, x_TI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
        return cpu_pointwise.rms_norm(x_TI, weight_I, epsilon)

    def lora_add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, arena: torch.Tensor, rows: LoraRows) -> None:
        cpu_lora.lora_add(as_array(y_TO), as_array(x_TI.contiguous()), self._array_of(arena), rows)

    def adapted_linear(
        self,
        x_TI: torch.Tensor,
        weight: NF4Weight | PackedNF4Weight,
        arena: torch.Tensor,
        rows: LoraRows | None,
    ) -> torch.Tensor:
        if rows is None:
            return self.nf4_linear(x_TI, weight)
        if isinstance(weight, NF4Weight):
            y_TO = self._reference.nf4_linear(x_TI, weight)
            self.lora_add(y_TO, x_TI, arena, rows)
            return y_TO
        y_TO = x_TI.new_empty(len(x_TI), weight.out_features)
        arrays = as_array(y_TO), as_array(x_TI.contiguous())
        # The product is bound by registers, so memory has time for the rows.
        run = cpu_nf4.PREFETCH_RUN
        offsets = cpu_lora.prefetch_offsets(rows, weight.in_features, weight.out_features, run)
        cpu_nf4.multiply(*arrays, weight, (self._array_of(arena), offsets))
        cpu_lora.lora_add(*arrays, self._array_of(arena), rows)
        return y_TO

    def _array_of(self, arena: torch.Tensor) -> Any:
        """Kept because every linear of every step has the same arena."""
        if self._arena is None or self._arena[0] is not arena:
            self._arena = arena, as_array(arena)
        return self._arena[1]

    def group(
        self, weights: Sequence[NF4Weight | PackedNF4Weight]
    ) -> tuple[PackedNF4Weight, list[PackedNF4Weight]] | None:
        return cpu_nf4.group(weights)

    def silu_multiply(self, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
        return cpu_pointwise.silu_multiply(gate_TI, up_TI)

    def rotate(self, x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        return cpu_pointwise.rotate(x_THD, cos_TD, sin_TD)

    def write_kv(
        self, kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
    ) -> None:
        cpu_attention.write_kv(kv_P2BKD, key_TKD, value_TKD, batch)

    def paged_attention(
        self, query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
    ) -> torch.Tensor:
        return cpu_attention.paged_attention(query_THD, kv_P2BKD, batch, params)

    def _warm_up(self, dtype: torch.dtype) -> None:
        """Compiles every kernel, or loads it from the cache, so that the first request does not wait."""
        one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        rows = LoraRows((0,), (1,), (0, 1), zero, zero, torch.ones(1))
        token, kv = torch.zeros(1, 1, 2, dtype=dtype), torch.zeros(1, 2, 1, 1, 2, dtype=dtype)
        self.lora_add(token[0], token[0].clone(), kv.view(-1), rows)
        batch = AttentionBatch(torch.arange(2), one, zero[None], zero, zero)
        self.write_kv(kv, token, token, batch)
        self.paged_attention(token, kv, batch, AttentionParams(1.0, None, None, None))
        self.rms_norm(token[0], token[0, 0], 0.0)
        self.silu_multiply(token[0], token[0])
        wide = torch.zeros(1, 1, 64, dtype=dtype)
        self.rotate(wide, wide[0], wide[0])
        self.linear(torch.ones(1, 64, dtype=dtype), torch.ones(1, 64, dtype=dtype))
        data, state = quantize_4bit(torch.ones(64, 64, dtype=dtype), quant_type="nf4")
        self.nf4_linear(torch.ones(1, 64, dtype=dtype), self.pack_nf4(NF4Weight(data, state, 64, 64)))
