"""The NF4 product of bitsandbytes for CPUs with AVX512-BF16.

The kernel computes in bfloat16, and wants out features in multiples of 32 and in features in multiples
of the quantisation block. Weights of other shapes stay with the reference.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch

from turret_server.kernels.ops import NF4Weight, PackedNF4Weight
from turret_server.kernels.reference import ReferenceOps

_ROWS_PER_PACK = 32


class BitsandbytesNF4(ReferenceOps):
    """See `ops.Ops`; the ops that are not about NF4 are the reference's."""

    def pack_nf4(self, weight: NF4Weight) -> NF4Weight | PackedNF4Weight:
        if weight.out_features % _ROWS_PER_PACK or weight.in_features % weight.state.blocksize:
            return weight
        data, state = bnb._convert_weight_packed_for_cpu(weight.data, weight.state)  # noqa: SLF001
        return PackedNF4Weight(
            data, state.absmax, state.code, state.blocksize, weight.in_features, weight.out_features
        )

    def nf4_linear(self, x_TI: torch.Tensor, weight: NF4Weight | PackedNF4Weight) -> torch.Tensor:
        if isinstance(weight, NF4Weight):
            return super().nf4_linear(x_TI, weight)
        y_TO: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit(
            x_TI,
            weight.data,
            (weight.out_features, weight.in_features),
            weight.absmax,
            weight.code,
            weight.block_size,
        )
        return y_TO
