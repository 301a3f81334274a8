"""The NF4 product on a GPU, or in Triton's interpreter, against the reference, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from support.kernel_inputs import DEVICE
from turret_server.kernels import NF4Weight, PackedNF4Weight, ReferenceOps
from turret_server.kernels.gpu.nf4 import MAX_FUSED_TOKENS, dequantize
from turret_server.kernels.gpu.ops import GpuOps

# What is rounded to the dtype: codes, or weights, and the sum, where the reference in float32 rounds nothing.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def weight(dtype, out_features, in_features, *, block_size=64, nested=True):
    values = torch.randn(out_features, in_features, dtype=dtype, device=DEVICE)
    data, state = quantize_4bit(values, blocksize=block_size, quant_type="nf4", compress_statistics=nested)
    return NF4Weight(data, state, in_features, out_features)


def assert_close(found, expected, dtype):
    tolerance = TOLERANCES[dtype] * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_tokens", [1, 17, MAX_FUSED_TOKENS, MAX_FUSED_TOKENS + 1])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (130, 192), (7, 1024)])
def test_the_product_is_the_references(dtype, num_tokens, out_features, in_features):
    whole = weight(dtype, out_features, in_features)
    packed = GpuOps().pack_nf4(whole)
    assert isinstance(packed, PackedNF4Weight)
    x = torch.randn(num_tokens, in_features, dtype=dtype, device=DEVICE)
    found = GpuOps().nf4_linear(x, packed)
    assert found.dtype == dtype
    assert_close(found, ReferenceOps().nf4_linear(x.float(), whole), dtype)


@pytest.mark.parametrize("num_tokens", [5, MAX_FUSED_TOKENS + 1])
@pytest.mark.parametrize(("block_size", "nested"), [(32, True), (128, True), (64, False)])
def test_other_quantisation_is_read_as_well(num_tokens, block_size, nested):
    whole = weight(torch.float32, 70, 256, block_size=block_size, nested=nested)
    x = torch.randn(num_tokens, 256, device=DEVICE)
    found = GpuOps().nf4_linear(x, GpuOps().pack_nf4(whole))
    assert_close(found, ReferenceOps().nf4_linear(x, whole), torch.float32)


def test_the_weight_made_whole_is_bitsandbytes_own():
    whole = weight(torch.float32, 100, 192)
    packed = GpuOps().pack_nf4(whole)
    assert isinstance(packed, PackedNF4Weight)
    expected = dequantize_4bit(whole.data, whole.state)
    torch.testing.assert_close(dequantize(packed, torch.float32), expected, atol=0, rtol=0)


# In float16, because the interpreter truncates to bfloat16 where a GPU rounds.


def test_a_weight_made_whole_is_rounded_once():
    packed = GpuOps().pack_nf4(weight(torch.float16, 100, 192))
    assert isinstance(packed, PackedNF4Weight)
    exact = dequantize(packed, torch.float32)
    assert torch.equal(dequantize(packed, torch.float16), exact.to(torch.float16))


@pytest.mark.parametrize("num_tokens", [MAX_FUSED_TOKENS, MAX_FUSED_TOKENS + 1])
def test_no_number_of_tokens_costs_precision(num_tokens):
    """The weights and the sums are rounded once each: the root of the mean square of the errors is then 0.3
    of a float16's epsilon. Scales in float16 would make it 0.36 with few tokens and 0.4 with many.
    """
    packed = GpuOps().pack_nf4(weight(torch.float16, 256, 512))
    assert isinstance(packed, PackedNF4Weight)
    x = torch.randn(num_tokens, 512, dtype=torch.float16, device=DEVICE)
    exact = x.double() @ dequantize(packed, torch.float32).double().T
    error = (GpuOps().nf4_linear(x, packed).double() - exact).square().mean() / exact.square().mean()
    assert error.sqrt() < 0.33 * torch.finfo(torch.float16).eps


def test_a_packed_weight_takes_four_and_a_half_bits():
    packed = GpuOps().pack_nf4(weight(torch.bfloat16, 128, 256))
    assert isinstance(packed, PackedNF4Weight)
    assert packed.data.nbytes + packed.absmax.nbytes == 128 * 256 * 4.5 / 8


def test_tokens_may_lie_apart():
    whole = weight(torch.float32, 64, 128)
    x = torch.randn(128, 4, device=DEVICE).T
    found = GpuOps().nf4_linear(x, GpuOps().pack_nf4(whole))
    assert_close(found, ReferenceOps().nf4_linear(x, whole), torch.float32)


def test_rows_that_end_within_a_block_stay_with_the_reference():
    whole = weight(torch.float32, 64, 96)
    assert GpuOps().pack_nf4(whole) is whole
    x = torch.randn(3, 96, device=DEVICE)
    assert torch.equal(GpuOps().nf4_linear(x, whole), ReferenceOps().nf4_linear(x, whole))
