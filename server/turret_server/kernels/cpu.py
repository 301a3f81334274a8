"""The ops for CPUs: kernels in numba, and bitsandbytes' NF4 product where the CPU and the dtype have it."""

from __future__ import annotations

import logging
import time

import torch
from bitsandbytes.functional import has_avx512bf16

from turret_server.kernels import cpu_attention, cpu_lora
from turret_server.kernels.bnb_cpu import BitsandbytesNF4
from turret_server.kernels.ops import AttentionBatch, AttentionParams, LoraRows, NF4Weight, PackedNF4Weight
from turret_server.kernels.parallel import THREADS
from turret_server.kernels.reference import ReferenceOps

log = logging.getLogger(__name__)


class CpuOps:
    """See `ops.Ops`. What a token gets does not depend on the other tokens of the step, to the bit."""

    def __init__(self, dtype: torch.dtype) -> None:
        fast = dtype == torch.bfloat16 and has_avx512bf16()
        self._nf4 = BitsandbytesNF4() if fast else ReferenceOps()
        started = time.perf_counter()
        self._warm(dtype)
        seconds = time.perf_counter() - started
        log.info("kernels for %s on %d threads, ready in %.1f s", dtype, THREADS, seconds)

    def pack_nf4(self, weight: NF4Weight) -> NF4Weight | PackedNF4Weight:
        return self._nf4.pack_nf4(weight)

    def nf4_linear(self, x_TI: torch.Tensor, weight: NF4Weight | PackedNF4Weight) -> torch.Tensor:
        return self._nf4.nf4_linear(x_TI, weight)

    def lora_add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, arena: torch.Tensor, rows: LoraRows) -> None:
        cpu_lora.lora_add(y_TO, x_TI, arena, rows)

    def write_kv(
        self, kv_P2BKD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, batch: AttentionBatch
    ) -> None:
        cpu_attention.write_kv(kv_P2BKD, key_TKD, value_TKD, batch)

    def paged_attention(
        self, query_THD: torch.Tensor, kv_P2BKD: torch.Tensor, batch: AttentionBatch, params: AttentionParams
    ) -> torch.Tensor:
        return cpu_attention.paged_attention(query_THD, kv_P2BKD, batch, params)

    def _warm(self, dtype: torch.dtype) -> None:
        """Compile every kernel, or read it from the cache: the first request must not wait for that."""
        one, place = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        rows = LoraRows((0,), (1,), (0, 1), place, place, torch.ones(1))
        token, kv = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 2, 1, 1, 1, dtype=dtype)
        self.lora_add(token[0], token[0].clone(), kv.view(-1), rows)
        batch = AttentionBatch(torch.arange(2), one, place[None], place, place)
        self.write_kv(kv, token, token, batch)
        self.paged_attention(token, kv, batch, AttentionParams(1.0, None, None, None))
