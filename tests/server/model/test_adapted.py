"""The modules that take the place of the base's own."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from support.models import FAMILIES, MULTIMODAL
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part
from turret_server.kernels import CpuOps, NF4Weight, ReferenceOps
from turret_server.model.adapted import (
    AdaptedEmbedding,
    AdaptedHead,
    AdaptedLinear,
    AdaptedNorm,
    _is_norm,
    rms_epsilon,
)
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
FUSED = {
    family: family not in {"gemma2", "gemma3", "gpt-neox"} for family in FAMILIES.keys() - MULTIMODAL.keys()
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("family", "fused"), sorted(FUSED.items()))
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
    of_head = isinstance(module, AdaptedHead)
    context = StepContext(
        ops=ops,
        arena=arena,
        attention=None,
        deltas=None if of_head else deltas,
        head_deltas=deltas if of_head else None,
        attention_calls=[],
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


class Shelf:
    """An arena in which rows lie one part after another."""

    def __init__(self) -> None:
        linear = ModuleShape(kind=ModuleKind.LINEAR, in_features=24, out_features=24)
        base = BaseSpec(
            name_or_path="", hidden_size=24, num_layers=1, num_kv_heads=1, head_dim=24, modules={"a": linear}
        )
        self.arena = Arena(base, 1 << 20, dtype=torch.float32, device=torch.device("cpu"))
        self._end = 30

    def adapter(self, name: str, parts, *, scaling=1.0, token_ids=(), is_linear=False) -> ResidentDeltas:
        rows = {}
        for part, rows_NX in parts.items():
            self.arena.write_rows(self._end, rows_NX)
            rows[part] = ResidentRows(
                torch.arange(len(rows_NX)) * rows_NX.shape[1] + self._end, rows_NX.shape[1]
            )
            self._end += rows_NX.numel()
        delta = ResidentDelta(scaling, rows, torch.tensor(token_ids, dtype=torch.long))
        is_lora = is_linear and Part.LORA_A in parts
        is_other = not is_linear or parts.keys() - {Part.LORA_A, Part.LORA_B}
        return ResidentDeltas(lora={name: delta} if is_lora else {}, others={name: delta} if is_other else {})


SEGMENTS = [(1, 3, -2.0), (3, 6, 0.5)]


def assert_each_segment_is_changed_by_its_own(module, x, shelf, adapters, expected):
    """Tokens outside of `SEGMENTS` get what they get without adapters; `expected` are all tokens computed
    with the first adapter's changes, and with the second's.
    """
    segments = [
        Segment(start, end, ((adapter, weight),))
        for (start, end, weight), adapter in zip(SEGMENTS, adapters, strict=True)
    ]
    before = x.clone()
    plain = run(module, x, ReferenceOps())
    found = run(module, x, ReferenceOps(), DeltaBatch(segments, GatheredRows()), shelf.arena)
    assert torch.equal(x, before), "others read it too"
    for (start, end, _), own in zip(SEGMENTS, expected, strict=True):
        torch.testing.assert_close(found[0, start:end], own[0, start:end], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[0, start:end], plain[0, start:end], atol=1e-2)
    for some in (slice(0, SEGMENTS[0][0]), slice(SEGMENTS[-1][1], None)):
        assert torch.equal(found[0, some], plain[0, some])


LORA = (Part.LORA_A, Part.LORA_B)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "parts",
    [LORA, (Part.GAIN,), (Part.INPUT_GAIN,), (Part.BIAS,), (*LORA, Part.GAIN), (*LORA, Part.GAIN, Part.BIAS)],
    ids=lambda parts: "+".join(part.value for part in parts),
)
@pytest.mark.parametrize("is_quantised", [True, False])
def test_each_token_of_a_linear_gets_what_its_own_adapters_change(parts, has_bias, is_quantised):
    weight_OI = torch.randn(40, 64)
    held: NF4Weight | nn.Parameter = nn.Parameter(weight_OI, requires_grad=False)
    if is_quantised:
        held = NF4Weight(*quantize_4bit(weight_OI, quant_type="nf4"), 64, 40)
        weight_OI = dequantize_4bit(held.data, held.state)
    bias = torch.randn(40) if has_bias else None
    parameter = nn.Parameter(bias, requires_grad=False) if has_bias else None
    module, shelf = AdaptedLinear("m", held, parameter), Shelf()
    x, adapters, expected = torch.randn(1, 8, 64), [], []
    for _, _, weight in SEGMENTS:
        shapes = {
            Part.LORA_A: (3, 64),
            Part.LORA_B: (3, 40),
            Part.INPUT_GAIN: (1, 64),
            Part.GAIN: (1, 40),
            Part.BIAS: (1, 40),
        }
        own = {part: torch.randn(shapes[part]) for part in parts}
        adapters.append(shelf.adapter("m", own, scaling=3.0, is_linear=True))
        own_OI = weight_OI
        if Part.LORA_A in own:
            own_OI = own_OI + weight * 3.0 * own[Part.LORA_B].T @ own[Part.LORA_A]
        own_OI = own_OI * own.get(Part.INPUT_GAIN, 1.0) * own.get(Part.GAIN, torch.ones(1, 1)).T
        own_bias = own[Part.BIAS][0] if Part.BIAS in own else bias
        expected.append(nn.functional.linear(x, own_OI, own_bias))
    assert_each_segment_is_changed_by_its_own(module, x, shelf, adapters, expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        *[(Part.WEIGHT,), (Part.TOKENS,), LORA, (Part.GAIN,), (Part.BIAS,)],
        *[(*LORA, Part.GAIN), (Part.WEIGHT, Part.BIAS)],
    ],
    ids=lambda parts: "+".join(part.value for part in parts),
)
def test_each_token_that_samples_gets_what_its_own_adapters_change_in_the_head(parts, has_bias):
    head = nn.Linear(24, 10, bias=has_bias).requires_grad_(requires_grad=False)
    module, shelf = AdaptedHead("m", head), Shelf()
    x, adapters, expected = torch.randn(1, 8, 24), [], []
    for _, _, weight in SEGMENTS:
        shapes = {
            Part.WEIGHT: (10, 24),
            Part.TOKENS: (2, 24),
            Part.LORA_A: (3, 24),
            Part.LORA_B: (10, 3),
            Part.GAIN: (10, 1),
            Part.BIAS: (10, 1),
        }
        own = {part: torch.randn(shapes[part]) for part in parts}
        adapters.append(shelf.adapter("m", own, scaling=3.0, token_ids=(4, 7)))
        weight_VE = own.get(Part.WEIGHT, head.weight).clone()
        if Part.TOKENS in own:
            weight_VE[[4, 7]] = own[Part.TOKENS]
        if Part.LORA_A in own:
            weight_VE += weight * 3.0 * own[Part.LORA_B] @ own[Part.LORA_A]
        weight_VE *= own.get(Part.GAIN, 1.0)
        own_bias = own[Part.BIAS][:, 0] if Part.BIAS in own else head.bias
        expected.append(nn.functional.linear(x, weight_VE, own_bias))
    assert_each_segment_is_changed_by_its_own(module, x, shelf, adapters, expected)


@pytest.mark.parametrize("embedding", [nn.Embedding, Gemma3TextScaledWordEmbedding])
@pytest.mark.parametrize(
    "parts", [(Part.WEIGHT,), (Part.TOKENS,), LORA], ids=lambda parts: "+".join(part.value for part in parts)
)
def test_each_token_is_embedded_with_what_its_own_adapters_change(parts, embedding):
    """Of tokens that are replaced, each segment has one, beside smaller or larger ones."""
    scale = {} if embedding is nn.Embedding else {"embed_scale": 5.0}
    table = embedding(10, 24, padding_idx=9, **scale).requires_grad_(requires_grad=False)
    module, shelf = AdaptedEmbedding("m", table), Shelf()
    tokens, adapters, expected = torch.tensor([[4, 4, 9, 3, 7, 0, 4, 9]]), [], []
    for _, _, weight in SEGMENTS:
        shapes = {
            Part.WEIGHT: (10, 24),
            Part.TOKENS: (2, 24),
            Part.LORA_A: (10, 3),
            Part.LORA_B: (3, 24),
        }
        own = {part: torch.randn(shapes[part]) for part in parts}
        adapters.append(shelf.adapter("m", own, scaling=3.0, token_ids=(4, 7)))
        weight_VE = own.get(Part.WEIGHT, table.weight).clone()
        if Part.TOKENS in own:
            weight_VE[[4, 7]] = own[Part.TOKENS]
        if Part.LORA_A in own:
            weight_VE += weight * 3.0 * own[Part.LORA_A] @ own[Part.LORA_B]
        expected.append(functional_call(table, {"weight": weight_VE}, (tokens,)))
    assert_each_segment_is_changed_by_its_own(module, tokens, shelf, adapters, expected)


def test_an_adapters_weight_of_a_norm_applies_to_its_own_tokens():
    shelf, weight, norm, x = Shelf(), torch.randn(24), llama_norm(), torch.randn(1, 6, 24)
    adapter = shelf.adapter("norm", {Part.WEIGHT: weight[None]})
    deltas = DeltaBatch([Segment(2, 4, ((adapter, 1.0),))], GatheredRows())
    found = run(AdaptedNorm("norm", norm), x, ReferenceOps(), deltas, shelf.arena)
    expected = norm(x).clone()
    expected[:, 2:4] = functional_call(norm, {"weight": weight}, (x[:, 2:4],))
    assert torch.equal(found, expected)
