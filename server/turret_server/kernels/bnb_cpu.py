"""The NF4 product of bitsandbytes for CPUs with AVX512-BF16; every other op is the reference's.

The kernel computes in bfloat16, and wants out features in multiples of 32 and in features in multiples
of the quantisation block. Linears of other shapes stay with the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch

from turret_server.kernels.reference import DequantisedNF4, ReferenceOps

_ROWS_PER_PACK = 32


@dataclass(frozen=True, slots=True)
class PackedNF4:
    """Nibbles in the kernel's order and plain bfloat16 scales: de-nesting them at every use costs 10 %."""

    data: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    block_size: int
    in_features: int
    out_features: int


class BitsandbytesCpuOps(ReferenceOps):
    """See `ops.Ops`."""

    def pack_nf4(self, weight: torch.nn.Parameter) -> DequantisedNF4 | PackedNF4:
        out_features, in_features = weight.quant_state.shape
        if out_features % _ROWS_PER_PACK or in_features % weight.quant_state.blocksize:
            return super().pack_nf4(weight)
        data, state = bnb._convert_weight_packed_for_cpu(weight.data, weight.quant_state)  # noqa: SLF001
        return PackedNF4(data, state.absmax, state.code, state.blocksize, in_features, out_features)

    def nf4_linear(self, x_TI: torch.Tensor, weight: DequantisedNF4 | PackedNF4) -> torch.Tensor:
        if isinstance(weight, DequantisedNF4):
            return super().nf4_linear(x_TI, weight)
        return torch.ops.bitsandbytes.gemv_4bit(
            x_TI,
            weight.data,
            (weight.out_features, weight.in_features),
            weight.absmax,
            weight.code,
            weight.block_size,
        )
