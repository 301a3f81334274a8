"""The first use of kernels."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from support.kernel_inputs import paged
from turret_server.kernels import AttentionParams, CpuOps, LoraRows, NF4Weight
from turret_server.kernels.cpu import attention, dense, lora, nf4, pointwise

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_no_request_waits_for_a_kernel_to_be_compiled(dtype, num_tokens):
    """Whatever its arrays are made of: numba compiles a kernel anew for other layouts of them."""
    kernels = (
        *(attention._write_kv, attention._attend, dense._linear, lora._lora_add, nf4._linear),
        *(pointwise._rms_norm, pointwise._silu_multiply, pointwise._rotate),
    )
    for kernel in kernels:
        kernel._reset_overloads()
    ops = CpuOps(dtype)
    compiled = [kernel.signatures for kernel in kernels]
    assert all(compiled)
    kv, batch = paged(dtype, [(num_tokens, 20)], num_kv_heads=2, head_dim=16, device=torch.device("cpu"))
    x, arena = torch.randn(num_tokens, 64, dtype=dtype), torch.randn(1000, dtype=dtype)
    values = torch.randn(64, 64, dtype=dtype)
    weight = ops.pack_nf4(NF4Weight(*quantize_4bit(values, quant_type="nf4"), 64, 64))
    two = torch.arange(2)
    rows = LoraRows((0,), (num_tokens,), (0, 2), two * 64, 500 + two * 64, torch.ones(2))
    # As models lay out heads: before the tokens.
    query, key, value = (
        torch.randn(heads, num_tokens, 16, dtype=dtype).transpose(0, 1) for heads in (4, 2, 2)
    )
    with torch.inference_mode():
        ops.nf4_linear(x, weight)
        ops.adapted_linear(x, weight, arena, rows)
        ops.linear(x, values)
        ops.rms_norm(x, values[0], 1e-6)
        ops.silu_multiply(x, x[:, ::2].repeat(1, 2))
        ops.silu_multiply(*torch.cat((x, x), dim=1).split(64, dim=1))
        ops.rotate(x[:, None], x, x)
        ops.write_kv(kv, key, value, batch)
        for how in ((None, None, None), (5, 2.0, torch.ones(4, dtype=dtype))):
            ops.paged_attention(query, kv, batch, AttentionParams(0.25, *how))
    assert [kernel.signatures for kernel in kernels] == compiled
