"""RMS norm against the reference and against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from turret_server.kernels import CpuOps, ReferenceOps

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
