"""The product with a weight that is not quantised, against the reference."""

from __future__ import annotations

import pytest
import torch

from support.kernel_inputs import on_threads
from turret_server.kernels import CpuOps, ReferenceOps
from turret_server.kernels.cpu import dense

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 7, 33])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 32), (70, 96), (1000, 64), (40, 50)])
def test_it_is_the_references(dtype, num_tokens, num_out, num_in):
    x, weight = torch.randn(num_tokens, num_in, dtype=dtype), torch.randn(num_out, num_in, dtype=dtype)
    expected = ReferenceOps().linear(x.float(), weight.float())
    found = CpuOps(dtype).linear(x, weight)
    assert found.dtype == dtype
    # One rounding of the sum to bfloat16, which has 8 bits.
    torch.testing.assert_close(
        found.float(), expected, atol=1e-4, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_other_rows(dtype):
    x, weight = (torch.randn(count, 2048, dtype=dtype) for count in (10, 2050))
    ops = CpuOps(dtype)
    together = ops.linear(x, weight)
    for count in (1, 2, 3, 5):
        for start in range(10 - count):
            some = slice(start, start + count)
            assert torch.equal(ops.linear(x[some], weight), together[some])


@pytest.mark.parametrize(
    ("weight", "supported"),
    [
        (torch.ones(3, 32), True),
        (torch.ones(3, 96), True),
        (torch.ones(3, 16), False),
        (torch.ones(3, 50), False),
        (torch.ones(96, 32).T, False),
        (torch.ones(3, 128)[:, :64], False),
    ],
    ids=["32 features", "96", "16", "50", "transposed", "part of a row"],
)
def test_whole_vectors_in_order_are_multiplied_by_the_kernel_and_others_by_the_reference(
    weight, supported, monkeypatch
):
    ops, multiplied = CpuOps(torch.float32), []
    kernel = dense.linear

    def count(x, weight):
        multiplied.append(weight)
        return kernel(x, weight)

    monkeypatch.setattr(dense, "linear", count)
    x = torch.randn(2, weight.shape[1])
    torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)
    assert bool(multiplied) == supported


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.parametrize("num_out", [3, 70, 1000])
def test_the_number_of_threads_changes_nothing(num_threads, num_out):
    ops, x, weight = CpuOps(torch.float32), torch.randn(7, 96), torch.randn(num_out, 96)
    # First on many: memory that no thread writes must not hold what it should.
    on_many, on_one = (on_threads(count, lambda: ops.linear(x, weight)) for count in (num_threads, 1))
    assert torch.equal(on_many, on_one)
