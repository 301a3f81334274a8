"""The modules that take the place of the base's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from support.models import FAMILIES
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part
from turret_server.kernels import CpuOps, ReferenceOps
from turret_server.model.adapted import AdaptedNorm, _is_norm, rms_epsilon
from turret_server.model.arena import Arena
from turret_server.model.context import StepContext, step_context
from turret_server.model.deltas import (
    DeltaBatch,
    GatheredRows,
    ResidentDelta,
    ResidentDeltas,
    ResidentRows,
    Segment,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Gemma multiplies by 1 + weight and rounds once; GPT-NeoX has layer norms.
FUSED = {family: family not in {"gemma2", "gemma3", "gpt-neox"} for family in FAMILIES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("family", "fused"), FUSED.items())
def test_the_norms_of_each_family_are_fused_or_not(family, fused, device, dtype):
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype)
    norms = [module for module in model.modules() if _is_norm(module)]
    assert len(norms) >= 7
    epsilon = model.config.rms_norm_eps if fused else None
    assert [rms_epsilon(norm) for norm in norms] == [epsilon] * len(norms)


class Norm(nn.Module):
    """Llama's, with each step open to a change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24), requires_grad=False)
        self.slope = 0.5
        self.eps = 1e-5

    def forward(self, x):
        return self.weigh(self.normalise(x.float()), x.dtype)

    def normalise(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def weigh(self, x, dtype):
        return self.weight * x.to(dtype)


class WeightPlusOne(Norm):
    def weigh(self, x, dtype):
        return ((1 + self.weight) * x.to(dtype)).to(dtype)


class RoundedOnce(Norm):
    def weigh(self, x, dtype):
        return (self.weight.float() * x).to(dtype)


class NotRounded(Norm):
    def weigh(self, x, dtype):  # noqa: ARG002
        return self.weight.float() * x


class EpsilonIgnored(Norm):
    def normalise(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


class EpsilonOutside(Norm):
    def normalise(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class EpsilonAsMaximum(Norm):
    def normalise(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=self.eps))


class MeanSubtracted(Norm):
    def normalise(self, x):
        return super().normalise(x - x.mean(-1, keepdim=True))


class SumOfSquares(Norm):
    def normalise(self, x):
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)


class Biased(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(24), requires_grad=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_epsilon_is_whichever_attribute_explains_the_numbers(dtype):
    assert rms_epsilon(Norm().to(dtype)) == 1e-5
    assert rms_epsilon(LlamaRMSNorm(64, eps=1e-3).to(dtype)) == 1e-3


@pytest.mark.parametrize(
    "norm",
    [WeightPlusOne, EpsilonIgnored, EpsilonOutside, EpsilonAsMaximum, MeanSubtracted, SumOfSquares, Biased],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_another_formula_is_not_fused(norm, dtype):
    assert rms_epsilon(norm().to(dtype)) is None


@pytest.mark.parametrize("norm", [RoundedOnce, NotRounded])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_that_rounds_at_another_point_is_not_fused(norm, dtype):
    assert rms_epsilon(norm().to(dtype)) is None
    assert rms_epsilon(norm()) == 1e-5, "nothing is rounded in float32"


def test_other_norms_of_the_libraries_are_not_fused():
    assert rms_epsilon(Gemma2RMSNorm(24)) is None
    assert rms_epsilon(nn.LayerNorm(24)) is None
    assert rms_epsilon(nn.LayerNorm(24, bias=False)) is None


def test_the_probe_leaves_the_random_numbers_of_the_process_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rms_epsilon(Norm())
    assert torch.equal(torch.rand(3), expected)


def run(module: nn.Module, x: torch.Tensor, ops, deltas=None, arena=None) -> torch.Tensor:
    context = StepContext(
        ops=ops, arena=arena, attention=None, deltas=deltas, head_deltas=None, layers_seen=set()
    )
    with torch.inference_mode(), step_context(context):
        return module(x)


def llama_norm() -> LlamaRMSNorm:
    norm = LlamaRMSNorm(24, eps=1e-3).requires_grad_(requires_grad=False)
    norm.weight.normal_()
    return norm


def test_a_fused_norm_is_computed_by_the_op_and_any_other_by_the_module():
    class Counting(ReferenceOps):
        calls = 0

        def rms_norm(self, x_TI, weight_I, epsilon):
            self.calls += 1
            return super().rms_norm(x_TI, weight_I, epsilon)

    x, ops = torch.randn(1, 5, 3, 24), Counting()
    for norm, calls in ((llama_norm(), 1), (Gemma2RMSNorm(24), 1), (nn.LayerNorm(24), 1)):
        assert torch.equal(run(AdaptedNorm("norm", norm), x, ops), norm(x))
        assert ops.calls == calls


def test_a_norm_whose_weight_has_another_dtype_than_its_input_is_computed_by_the_module():
    norm, x = llama_norm(), torch.randn(1, 5, 24, dtype=torch.bfloat16)
    found = run(AdaptedNorm("norm", norm), x, CpuOps(torch.bfloat16))
    assert found.dtype == torch.float32
    assert torch.equal(found, norm(x))


def test_an_adapters_weight_of_a_norm_applies_to_its_own_tokens():
    base = BaseSpec(
        name_or_path="",
        hidden_size=24,
        num_layers=1,
        num_kv_heads=1,
        head_dim=24,
        modules={"a": ModuleShape(kind=ModuleKind.LINEAR, in_features=24, out_features=24)},
    )
    arena = Arena(base, 1 << 16, dtype=torch.float32, device=torch.device("cpu"))
    weight, norm, x = torch.randn(24), llama_norm(), torch.randn(1, 6, 24)
    arena.write_rows(30, weight[None])
    rows = {Part.WEIGHT: ResidentRows(torch.tensor([30]), 24)}
    delta = ResidentDelta(1.0, rows, torch.zeros(0, dtype=torch.long))
    adapter = ResidentDeltas(lora={}, others={"norm": delta})
    deltas = DeltaBatch([Segment(2, 4, ((adapter, 1.0),))], GatheredRows())
    found = run(AdaptedNorm("norm", norm), x, ReferenceOps(), deltas, arena)
    expected = norm(x).clone()
    expected[:, 2:4] = functional_call(norm, {"weight": weight}, (x[:, 2:4],))
    assert torch.equal(found, expected)
