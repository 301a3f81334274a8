from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from turret_server.kernels import (
    BitsandbytesNF4,
    NF4Weight,
    PackedNF4Weight,
    ReferenceOps,
    has_avx512bf16,
    select_ops,
)

CPU = torch.device("cpu")
only_avx512bf16 = pytest.mark.skipif(not has_avx512bf16(), reason="the CPU has no AVX512-BF16")


def weight(out_features: int, in_features: int) -> NF4Weight:
    values = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    data, state = quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    return NF4Weight(data, state, in_features, out_features)


@only_avx512bf16
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 64])
@pytest.mark.parametrize(("out_features", "in_features"), [(32, 64), (96, 192), (320, 128)])
def test_the_packed_product_is_the_references(num_tokens, out_features, in_features):
    x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16)
    expected = ReferenceOps().nf4_linear(x.float(), weight_of := weight(out_features, in_features))
    packed = BitsandbytesNF4().pack_nf4(weight_of)
    assert isinstance(packed, PackedNF4Weight)
    found = BitsandbytesNF4().nf4_linear(x, packed).float()
    # bfloat16 has 8 bits; the scales are rounded to it once, the product once.
    torch.testing.assert_close(found, expected, atol=0.02 * in_features**0.5, rtol=0.02)


@only_avx512bf16
def test_a_rows_product_does_not_depend_on_the_other_rows():
    packed = BitsandbytesNF4().pack_nf4(weight(64, 128))
    x = torch.randn(33, 128, dtype=torch.bfloat16)
    together = BitsandbytesNF4().nf4_linear(x, packed)
    for index in range(33):
        assert torch.equal(BitsandbytesNF4().nf4_linear(x[index : index + 1], packed)[0], together[index])


@pytest.mark.parametrize(("out_features", "in_features"), [(40, 64), (64, 96)])
def test_shapes_that_the_kernel_cannot_take_stay_with_the_reference(out_features, in_features):
    unpacked = weight(out_features, in_features)
    assert BitsandbytesNF4().pack_nf4(unpacked) is unpacked
    x = torch.randn(3, in_features, dtype=torch.bfloat16)
    torch.testing.assert_close(
        BitsandbytesNF4().nf4_linear(x, unpacked), ReferenceOps().nf4_linear(x, unpacked)
    )


def test_float32_is_never_computed_in_bfloat16():
    whole = weight(64, 128)
    assert select_ops(CPU, torch.float32).pack_nf4(whole) is whole


@only_avx512bf16
def test_bfloat16_takes_the_packed_product():
    assert isinstance(select_ops(CPU, torch.bfloat16).pack_nf4(weight(64, 128)), PackedNF4Weight)


def test_a_dtype_without_kernels_takes_the_reference():
    assert isinstance(select_ops(CPU, torch.float16), ReferenceOps)
