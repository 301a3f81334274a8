from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from turret_server.kernels import (
    CpuOps,
    NF4Weight,
    PackedNF4Weight,
    ReferenceOps,
    has_avx512bf16,
    select_ops,
)

CPU = torch.device("cpu")
OPS = CpuOps(torch.bfloat16)
only_avx512bf16 = pytest.mark.skipif(not has_avx512bf16(), reason="the CPU has no AVX512-BF16")


def weight(out_features: int, in_features: int) -> NF4Weight:
    values = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    data, state = quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    return NF4Weight(data, state, in_features, out_features)


@only_avx512bf16
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 9, 19, 20, 27, 140, 300])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 64), (64, 64), (100, 192), (320, 128)])
def test_the_packed_product_is_the_references(num_tokens, out_features, in_features):
    x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16)
    expected = ReferenceOps().nf4_linear(x.float(), weight_of := weight(out_features, in_features))
    packed = OPS.pack_nf4(weight_of)
    assert isinstance(packed, PackedNF4Weight)
    found = OPS.nf4_linear(x, packed).float()
    # bfloat16 has 8 bits; the scales are rounded to it once, the product once.
    torch.testing.assert_close(found, expected, atol=0.02 * in_features**0.5, rtol=0.02)


@only_avx512bf16
def test_a_rows_product_does_not_depend_on_the_other_rows():
    packed = OPS.pack_nf4(weight(72, 256))
    x = torch.randn(151, 256, dtype=torch.bfloat16)
    together = OPS.nf4_linear(x, packed)
    for count in (1, 2, 3, 18, 21):
        for start in range(0, 151 - count, count):
            some = slice(start, start + count)
            assert torch.equal(OPS.nf4_linear(x[some], packed), together[some])


@only_avx512bf16
def test_the_scales_need_not_be_quantised_themselves():
    values = torch.randn(64, 128, dtype=torch.bfloat16)
    data, state = quantize_4bit(values, quant_type="nf4", compress_statistics=False)
    plain = NF4Weight(data, state, 128, 64)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    expected = ReferenceOps().nf4_linear(x.float(), plain)
    found = OPS.nf4_linear(x, OPS.pack_nf4(plain)).float()
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0.02)


@only_avx512bf16
def test_what_is_not_a_number_and_infinities_stay_with_their_token():
    packed = OPS.pack_nf4(weight(64, 64))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    y = OPS.nf4_linear(x, packed)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert y[2].isfinite().all()


@pytest.mark.parametrize(("out_features", "in_features"), [(64, 32), (64, 96)])
def test_shapes_that_the_kernel_cannot_take_stay_with_the_reference(out_features, in_features):
    unpacked = weight(out_features, in_features)
    assert OPS.pack_nf4(unpacked) is unpacked
    x = torch.randn(3, in_features, dtype=torch.bfloat16)
    torch.testing.assert_close(OPS.nf4_linear(x, unpacked), ReferenceOps().nf4_linear(x, unpacked))


def test_float32_is_never_computed_in_bfloat16():
    whole = weight(64, 128)
    assert select_ops(CPU, torch.float32).pack_nf4(whole) is whole


@only_avx512bf16
def test_bfloat16_takes_the_packed_product():
    assert isinstance(select_ops(CPU, torch.bfloat16).pack_nf4(weight(64, 128)), PackedNF4Weight)


def test_a_dtype_without_kernels_takes_the_reference():
    assert isinstance(select_ops(CPU, torch.float16), ReferenceOps)
