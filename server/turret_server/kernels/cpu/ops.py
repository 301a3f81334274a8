"""The ops for CPUs, in numba, for bfloat16 and float32; and RMSNorm, which no other file needs."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit

from turret_server.kernels.cpu import attention as cpu_attention
from turret_server.kernels.cpu import dense as cpu_dense
from turret_server.kernels.cpu import lora as cpu_lora
from turret_server.kernels.cpu import nf4 as cpu_nf4
from turret_server.kernels.cpu.llvm.jit import as_array, compiled
from turret_server.kernels.cpu.llvm.parallel import THREADS, run_parallel
from turret_server.kernels.cpu.llvm.vectors import (
    LANES,
    broadcast,
    fma_outer,
    load,
    load_masked,
    multiply,
    reduce_add,
    store,
    store_masked,
    zeros,
)
from turret_server.kernels.ops import AttentionBatch, AttentionParams, LoraRows, NF4Weight, PackedNF4Weight
from turret_server.kernels.reference import ReferenceOps

log = logging.getLogger(__name__)

_MANY = 64  # tokens for which RMSNorm wakes the other threads


class CpuOps:
    """See `ops.Ops`. A token's bits do not depend on the other tokens of the step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._no_prefetch = as_array(torch.empty(0, dtype=dtype)), np.empty(0, np.int64)
        self._reference = ReferenceOps()
        self._arena: tuple[torch.Tensor, Any] | None = None
        started = time.perf_counter()
        log.info("CPU kernels for %s on %d threads: the first start compiles them", dtype, THREADS)
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
        x_TI = x_TI.contiguous()
        y_TI = torch.empty_like(x_TI)
        _rms_norm(as_array(y_TI), as_array(x_TI), as_array(weight_I), epsilon)
        return y_TI

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
        self.linear(torch.ones(1, 64, dtype=dtype), torch.ones(1, 64, dtype=dtype))
        data, state = quantize_4bit(torch.ones(64, 64, dtype=dtype), quant_type="nf4")
        self.nf4_linear(torch.ones(1, 64, dtype=dtype), self.pack_nf4(NF4Weight(data, state, 64, 64)))


@compiled
def _rms_norm(y_TI: Any, x_TI: Any, weight_I: Any, epsilon: float) -> None:
    """RMSNorm (arXiv 1910.07467) in one pass over memory, where torch takes six."""
    arguments = (y_TI, x_TI, weight_I, np.float32(epsilon))
    if len(x_TI) < _MANY:
        _rms_norm_tokens(0, 1, arguments)
    else:
        run_parallel(_rms_norm_tokens, arguments)


@compiled
def _rms_norm_tokens(worker: int, workers: int, arguments: Any) -> None:
    """This worker's tokens."""
    y_TI, x_TI, weight_I, epsilon = arguments
    num_tokens, width = x_TI.shape
    full = width - width % LANES
    for token in range(num_tokens * worker // workers, num_tokens * (worker + 1) // workers):
        start = token * width
        squares = zeros(1)
        for i in range(0, full, LANES):
            x = load(x_TI, (start,), i)
            squares = fma_outer(squares, x, x)
        if full < width:
            x = load_masked(x_TI, (start,), full, width - full)
            squares = fma_outer(squares, x, x)
        mean = reduce_add(squares)[0] / np.float32(width)
        scale = broadcast(np.float32(1) / np.sqrt(mean + epsilon))
        for i in range(0, full, LANES):
            # Stored and loaded again: x̂ is rounded to the dtype before it is weighted.
            store(y_TI, start + i, multiply(load(x_TI, (start,), i)[0], scale))
            rounded = load(y_TI, (start,), i)[0]
            store(y_TI, start + i, multiply(rounded, load(weight_I, (0,), i)[0]))
        if full < width:
            rest = width - full
            x = load_masked(x_TI, (start,), full, rest)
            store_masked(y_TI, start + full, multiply(x[0], scale), rest)
            rounded = load_masked(y_TI, (start,), full, rest)[0]
            weighted = multiply(rounded, load_masked(weight_I, (0,), full, rest)[0])
            store_masked(y_TI, start + full, weighted, rest)
