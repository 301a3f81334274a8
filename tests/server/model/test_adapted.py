"""The modules that take the place of the base's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from support.models import FAMILIES
from turret_server.model.adapted import _is_norm, rms_epsilon

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
