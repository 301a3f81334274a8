"""RMSNorm, SwiGLU and the rotary embedding against the reference and against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from support.kernel_inputs import on_threads
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


@pytest.mark.parametrize("num_threads", [2, 5])
def test_the_number_of_threads_changes_nothing(num_threads):
    ops, x, weight = CpuOps(torch.float32), torch.randn(203, 72), torch.randn(72)
    # First on many: memory that no thread writes must not hold what it should.
    on_many, on_one = (on_threads(count, lambda: ops.rms_norm(x, weight, 1e-6)) for count in (num_threads, 1))
    assert torch.equal(on_many, on_one)


def gates(num_tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Side by side in one product, with numbers of every size."""
    sizes = torch.logspace(-3, 2, num_tokens * 2 * width).view(num_tokens, 2 * width)
    return (torch.randn(num_tokens, 2 * width) * sizes).to(dtype).split(width, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 128), (3, 7), (5, 100), (200, 64), (0, 32)])
def test_gates_are_those_of_the_reference(dtype, num_tokens, width):
    gate, up = gates(num_tokens, width, dtype)
    found = CpuOps(dtype).silu_multiply(gate, up)
    # exp differs in its last bits: a number may be rounded to the next one, twice.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found, ReferenceOps().silu_multiply(gate, up), atol=1e-30, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_that_are_closed_and_those_that_are_no_numbers(dtype):
    gate = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0, torch.inf, torch.nan, 1.0]], dtype=dtype)
    up = torch.tensor([[2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, torch.nan]], dtype=dtype)
    found = CpuOps(dtype).silu_multiply(gate, up)[0]
    assert found[:3].abs().max() < 1e-30
    assert found[3:6].tolist() == [176, 400, torch.inf]
    assert found[6:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "width"), [(1, 4, 64), (3, 1, 32), (70, 3, 128), (5, 2, 48)]
)
def test_rotations_have_the_bits_of_transformers(dtype, num_tokens, num_heads, width):
    both = torch.randn(num_tokens, 2 * num_heads * width, dtype=dtype)
    x = both[:, : num_heads * width].view(num_tokens, num_heads, width)
    cos, sin = torch.randn(2, num_tokens, width, dtype=dtype)
    heads_first = x.transpose(0, 1)[None]
    expected = apply_rotary_pos_emb(heads_first, heads_first, cos[None], sin[None])[0][0].transpose(0, 1)
    assert torch.equal(ReferenceOps().rotate(x, cos, sin), expected)
    assert torch.equal(CpuOps(dtype).rotate(x, cos, sin), expected)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_share_the_tokens_of_gates_and_rotations(num_threads):
    ops, (gate, up) = CpuOps(torch.float32), gates(203, 64, torch.float32)

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.silu_multiply(gate, up), ops.rotate(gate[:, None], up, up)

    on_many, on_one = on_threads(num_threads, compute), on_threads(1, compute)
    assert all(torch.equal(*each) for each in zip(on_many, on_one, strict=True))
