"""RMS norm against the reference and against transformers' own; the first use of kernels."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from support.kernel_inputs import on_threads, paged
from turret_server.kernels import AttentionParams, CpuOps, LoraRows, NF4Weight, ReferenceOps
from turret_server.kernels.cpu import attention, dense, lora, nf4
from turret_server.kernels.cpu import ops as cpu_ops

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 2048), (3, 7), (5, 100), (200, 64), (0, 32)])
def test_it_is_the_references_and_transformers(dtype, num_tokens, width):
    norm = LlamaRMSNorm(width, eps=1e-3).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(num_tokens, width, dtype=dtype)
    found = CpuOps(dtype).rms_norm(x, norm.weight.data, 1e-3)
    # The sums of squares differ in their order: a number may be rounded to the next one, twice.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    expected = norm(x).detach()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=tolerance)
    assert torch.equal(ReferenceOps().rms_norm(x, norm.weight.data, 1e-3), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_whoever_shares_the_step(dtype):
    x, weight = torch.randn(150, 72, dtype=dtype), torch.randn(72, dtype=dtype)
    together = CpuOps(dtype).rms_norm(x, weight, 1e-6)
    for token in range(150):
        assert torch.equal(CpuOps(dtype).rms_norm(x[token : token + 1], weight, 1e-6)[0], together[token])


@pytest.mark.parametrize("num_threads", [2, 5])
def test_the_number_of_threads_changes_nothing(num_threads):
    ops, x, weight = CpuOps(torch.float32), torch.randn(203, 72), torch.randn(72)
    # First on many: memory that no thread writes must not hold what it should.
    on_many, on_one = (on_threads(count, lambda: ops.rms_norm(x, weight, 1e-6)) for count in (num_threads, 1))
    assert torch.equal(on_many, on_one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_no_request_waits_for_a_kernel_to_be_compiled(dtype, num_tokens):
    """Whatever its arrays are made of: numba compiles a kernel anew for other layouts of them."""
    kernels = (
        *(attention._write_kv, attention._attend, cpu_ops._rms_norm),
        *(dense._linear, lora._lora_add, nf4._linear),
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
        ops.write_kv(kv, key, value, batch)
        for how in ((None, None, None), (5, 2.0, torch.ones(4, dtype=dtype))):
            ops.paged_attention(query, kv, batch, AttentionParams(0.25, *how))
    assert [kernel.signatures for kernel in kernels] == compiled
