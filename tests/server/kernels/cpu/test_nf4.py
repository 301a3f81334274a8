from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from support.kernel_inputs import lora, on_threads
from turret_server.kernels import CpuOps, NF4Weight, PackedNF4Weight, ReferenceOps, select_ops
from turret_server.kernels.cpu import nf4 as cpu_nf4

CPU = torch.device("cpu")
OPS = {dtype: CpuOps(dtype) for dtype in (torch.bfloat16, torch.float32)}
each_dtype = pytest.mark.parametrize("dtype", OPS)


def weight(out_features: int, in_features: int, block_size: int = 64) -> NF4Weight:
    values = torch.randn(out_features, in_features)
    data, state = quantize_4bit(values, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    return NF4Weight(data, state, in_features, out_features)


@each_dtype
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 9, 19, 20, 27, 140, 300])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 64), (64, 64), (100, 192), (320, 128)])
def test_the_packed_product_is_the_references(dtype, num_tokens, out_features, in_features):
    ops, x = OPS[dtype], torch.randn(num_tokens, in_features, dtype=dtype)
    expected = ReferenceOps().nf4_linear(x.float(), weight_of := weight(out_features, in_features))
    packed = ops.pack_nf4(weight_of)
    assert isinstance(packed, PackedNF4Weight)
    found = ops.nf4_linear(x, packed).float()
    # bfloat16 has 8 bits; the scales are rounded to it once, the product once.
    error = 0.02 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found, expected, atol=error * in_features**0.5, rtol=error)


@each_dtype
def test_a_rows_product_does_not_depend_on_the_other_rows(dtype):
    ops = OPS[dtype]
    packed = ops.pack_nf4(weight(72, 256))
    x = torch.randn(151, 256, dtype=dtype)
    together = ops.nf4_linear(x, packed)
    for count in (1, 2, 3, 18, 21):
        for start in range(0, 151 - count, count):
            some = slice(start, start + count)
            assert torch.equal(ops.nf4_linear(x[some], packed), together[some])


@each_dtype
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_a_group_and_its_parts_have_the_bits_of_each_alone(dtype, num_tokens):
    ops, x = OPS[dtype], torch.randn(num_tokens, 192, dtype=dtype)
    alone = [ops.pack_nf4(weight(size, 192)) for size in (128, 64, 320)]
    group, parts = ops.group(alone)
    expected = [ops.nf4_linear(x, each) for each in alone]
    assert torch.equal(ops.nf4_linear(x, group), torch.cat(expected, dim=1))
    assert all(torch.equal(ops.nf4_linear(x, each), own) for each, own in zip(parts, expected, strict=True))
    memory = group.data.untyped_storage().data_ptr()
    assert {each.data.untyped_storage().data_ptr() for each in parts} == {memory}


@each_dtype
def test_weights_that_are_not_whole_blocks_or_not_packed_are_no_group(dtype):
    packed = OPS[dtype].pack_nf4(weight(64, 64))
    assert OPS[dtype].group([packed, OPS[dtype].pack_nf4(weight(72, 64))]) is None
    assert OPS[dtype].group([packed, weight(64, 64)]) is None


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.parametrize("num_tokens", [1, 300])
@pytest.mark.parametrize("out_features", [64, 320])
def test_the_number_of_threads_changes_nothing(num_threads, num_tokens, out_features):
    ops, x = OPS[torch.float32], torch.randn(num_tokens, 128)
    packed = ops.pack_nf4(weight(out_features, 128))
    arena, rows = lora(torch.float32, 128, out_features, [(0, num_tokens, 13)], device=CPU)

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.nf4_linear(x, packed), ops.adapted_linear(x, packed, arena, rows)

    # First on many: memory that no thread writes must not hold what it should.
    on_many, on_one = on_threads(num_threads, compute), on_threads(1, compute)
    assert all(torch.equal(*each) for each in zip(on_many, on_one, strict=True))


@each_dtype
def test_the_scales_need_not_be_quantised_themselves(dtype):
    values = torch.randn(64, 128)
    data, state = quantize_4bit(values, quant_type="nf4", compress_statistics=False)
    plain = NF4Weight(data, state, 128, 64)
    x = torch.randn(3, 128, dtype=dtype)
    expected = ReferenceOps().nf4_linear(x.float(), plain)
    found = OPS[dtype].nf4_linear(x, OPS[dtype].pack_nf4(plain)).float()
    error = 0.02 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found, expected, atol=10 * error, rtol=error)


@each_dtype
def test_what_is_not_a_number_and_infinities_stay_with_their_token(dtype):
    packed = OPS[dtype].pack_nf4(weight(64, 64))
    x = torch.randn(3, 64, dtype=dtype)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    y = OPS[dtype].nf4_linear(x, packed)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert y[2].isfinite().all()


@each_dtype
@pytest.mark.parametrize(
    ("out_features", "in_features", "block_size"), [(64, 32, 64), (64, 96, 64), (64, 128, 128)]
)
def test_shapes_that_the_kernel_cannot_take_stay_with_the_reference(
    dtype, out_features, in_features, block_size
):
    unpacked = weight(out_features, in_features, block_size)
    assert OPS[dtype].pack_nf4(unpacked) is unpacked
    x = torch.randn(3, in_features, dtype=dtype)
    torch.testing.assert_close(OPS[dtype].nf4_linear(x, unpacked), ReferenceOps().nf4_linear(x, unpacked))


def test_nothing_of_a_weight_that_is_dropped_stays():
    packed = OPS[torch.float32].pack_nf4(weight(64, 64))
    OPS[torch.float32].nf4_linear(torch.ones(1, 64), packed)
    assert packed in cpu_nf4._arrays
    gc.collect()  # weights of other tests
    data, known = weakref.ref(packed.data), len(cpu_nf4._arrays)
    del packed
    gc.collect()
    assert data() is None
    assert len(cpu_nf4._arrays) == known - 1


@each_dtype
def test_a_cpu_takes_the_kernels_for_cpus(dtype):
    assert isinstance(select_ops(CPU, dtype), CpuOps)


def test_a_dtype_without_kernels_takes_the_reference():
    assert isinstance(select_ops(CPU, torch.float16), ReferenceOps)


@pytest.mark.parametrize(
    ("features", "said"),
    [("+avx,+avx2,+fma", "equal, in torch.float32"), ("", "not packed")],
    ids=["AVX2", "neither"],
)
@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"])
def test_other_cpus_compute_the_same(dtype, features, said):
    """numba compiles for another CPU, of which this one can do everything."""
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "support.nf4_product", dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stdout.strip() == said, done.stderr
