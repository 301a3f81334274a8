from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from support.device_traces import Waits
from turret_adapters.formats.kind import Rows
from turret_adapters.formats.parameters import StackedPair
from turret_adapters.host import HostAdapter, row_groups
from turret_adapters.spec import AdapterSpec, BaseSpec, Method, ModuleKind, ModuleShape, Part, slab_layout
from turret_server.kernels import NF4Weight
from turret_server.kernels.reference import ReferenceOps
from turret_server.model.adapted import base_modules
from turret_server.model.arena import Arena
from turret_server.model.context import StepContext, step_context
from turret_server.model.deltas import (
    DeltaBatch,
    GatheredRows,
    ResidentDelta,
    ResidentDeltas,
    ResidentRows,
    Segment,
    write_slab,
)
from turret_server.model.experts import EXPERT_MODELS, AdaptedRouter, ExpertLinear, Experts

HIDDEN, WIDTH, EXPERTS, TOP = 64, 128, 5, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "pad_token_id": 0,
}


def through_nf4(experts: nn.Module) -> Experts:
    """Ours for those of Hugging Face, which are rounded to what ours hold."""
    own = Experts(experts)
    for projection in ("gate_up_proj", "down_proj"):
        linears = own.get_submodule(projection)
        for expert, weight in enumerate(experts.get_parameter(projection).data):
            data, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            packed = NF4Weight(data, state, weight.shape[1], weight.shape[0])
            setattr(linears, str(expert), ExpertLinear(f"experts.{projection}.{expert}", packed))
            weight.copy_(dequantize_4bit(data, state))
    return own


@pytest.fixture(params=EXPERT_MODELS)
def block(request) -> nn.Module:
    config = AutoConfig.for_model(request.param, **SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.model.layers[0].mlp


@pytest.fixture
def experts(block) -> nn.Module:
    return block.experts


def routing(num_tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    chances_TE = torch.randn(num_tokens, EXPERTS).softmax(dim=-1)
    weights_TK, experts_TK = chances_TE.topk(TOP, dim=-1)
    return experts_TK, weights_TK


def run(own: nn.Module, inputs, arena: Arena | None = None, deltas: DeltaBatch | None = None) -> Any:
    context = StepContext(
        ops=ReferenceOps(), arena=arena, attention=None, deltas=deltas, head_deltas=None, attention_calls=[]
    )
    with torch.inference_mode(), step_context(context):
        return own(*inputs)


@pytest.mark.parametrize("num_tokens", [1, 2, 37])
def test_they_compute_what_the_class_of_hugging_face_computes(experts, num_tokens):
    own = through_nf4(experts)
    inputs = torch.randn(num_tokens, HIDDEN), *routing(num_tokens)
    found = run(own, inputs)
    assert found.std() > 0.1
    with torch.inference_mode():
        torch.testing.assert_close(found, experts(*inputs), rtol=1e-5, atol=1e-5)


def make_adapter(
    experts: nn.Module, base: BaseSpec, rank: int
) -> tuple[HostAdapter, dict[str, torch.Tensor]]:
    """Random pairs of both projections, and what peft's `ParamWrapper.get_delta_weight` makes of them."""
    rows, weights = Rows(base, None), {}
    for projection, parameter in experts.named_parameters():
        a_RI = torch.randn(rank * EXPERTS, parameter.shape[2]) * 0.2
        b_OR = torch.randn(parameter.shape[1], rank * EXPERTS) * 0.2
        pair = StackedPair(
            experts=[f"experts.{projection}.{expert}" for expert in range(EXPERTS)],
            shape=base.modules[f"experts.{projection}.0"],
            key=projection,
            rank=rank,
            scaling=0.5,
        )
        pair.add_to(rows, {f"{projection}.lora_A.weight": a_RI, f"{projection}.lora_B.weight": b_OR})
        a_ERI, b_ORE = a_RI.view(EXPERTS, rank, -1), b_OR.view(-1, rank, EXPERTS)
        weights[projection] = torch.einsum("ore,eri->eoi", b_ORE, a_ERI) * 0.5
    deltas = rows.deltas()
    spec = AdapterSpec(
        revision=str(rank),
        method=Method.LORA,
        rows=row_groups(deltas),
        prefix=None,
        max_rank=rank,
        num_parameters=0,
        file_bytes=0,
    )
    return HostAdapter(spec=spec, deltas=deltas), weights


@pytest.mark.parametrize("has_adapters", [True, False])
def test_the_host_waits_once_for_what_the_experts_compute(experts, has_adapters):
    own = through_nf4(experts)
    nobody = Segment(0, 37, ((ResidentDeltas(lora={}, others={}), 1.0),))
    deltas = DeltaBatch([nobody], GatheredRows()) if has_adapters else None
    with Waits() as waits:
        run(own, (torch.randn(37, HIDDEN), *routing(37)), deltas=deltas)
    assert waits.found == ["tolist"]


def test_each_token_gets_what_its_own_adapters_change(experts):
    own = through_nf4(experts)
    modules = base_modules(own)
    assert {shape.kind for shape in modules.values()} == {ModuleKind.EXPERT}
    base = BaseSpec(
        name_or_path="", hidden_size=HIDDEN, num_layers=1, num_kv_heads=1, head_dim=32, modules=modules
    )
    arena = Arena(base, 4 << 20, dtype=torch.float32, device=torch.device("cpu"))
    adapters, pages = [], 0
    for rank in (1, 3):
        host, weights = make_adapter(experts, base, rank)
        size = slab_layout(host.spec.rows, arena.page_elements).num_pages
        resident = write_slab(arena, host, tuple(range(pages, pages + size)), modules)
        adapters.append((resident, weights))
        pages += size
    # Two segments of one adapter, one without any, one of both, and one of a single token.
    bounds = [0, 9, 14, 20, 40, 41]
    of_segments = [[(0, 1.0)], [], [(1, -2.0)], [(0, 0.5), (1, 1.0)], [(1, 1.0)]]
    inputs = torch.randn(41, HIDDEN), *routing(41)
    segments = [
        Segment(start, end, tuple((adapters[index][0], weight) for index, weight in uses))
        for start, end, uses in zip(bounds, bounds[1:], of_segments, strict=False)
        if uses
    ]
    found = run(own, inputs, arena, DeltaBatch(segments, GatheredRows()))
    originals = {name: parameter.data.clone() for name, parameter in experts.named_parameters()}
    for start, end, uses in zip(bounds, bounds[1:], of_segments, strict=False):
        for name, parameter in experts.named_parameters():
            changes = (weight * adapters[index][1][name] for index, weight in uses)
            parameter.data = originals[name] + sum(changes, torch.zeros(()))
        some = tuple(tensor[start:end] for tensor in inputs)
        with torch.inference_mode():
            torch.testing.assert_close(found[start:end], experts(*some), rtol=1e-4, atol=1e-4)
        if uses:
            assert (found[start:end] - run(own, some)).abs().max() > 0.01


def test_a_router_chooses_for_each_token_with_its_own_adapters(block):
    own = AdaptedRouter("gate", block.gate)
    assert own.shape == ModuleShape(kind=ModuleKind.ROUTER, in_features=HIDDEN, out_features=EXPERTS)
    a_RH, b_RE = torch.randn(3, HIDDEN), torch.randn(3, EXPERTS)
    base = BaseSpec(
        name_or_path="",
        hidden_size=HIDDEN,
        num_layers=1,
        num_kv_heads=1,
        head_dim=32,
        modules={"gate": own.shape},
    )
    arena = Arena(base, 1 << 20, dtype=torch.float32, device=torch.device("cpu"))
    arena.write_rows(0, a_RH)
    arena.write_rows(a_RH.numel(), b_RE)
    rows = {
        Part.LORA_A: ResidentRows(torch.arange(3) * HIDDEN, HIDDEN),
        Part.LORA_B: ResidentRows(a_RH.numel() + torch.arange(3) * EXPERTS, EXPERTS),
    }
    delta = ResidentDelta(0.5, rows, torch.zeros(0, dtype=torch.long))
    adapter = ResidentDeltas(lora={}, others={"gate": delta})
    x_TH = torch.randn(20, HIDDEN)
    found = run(own, (x_TH,), arena, DeltaBatch([Segment(5, 12, ((adapter, -2.0),))], GatheredRows()))
    with torch.inference_mode():
        plain = block.gate(x_TH)
        block.gate.weight += -2.0 * 0.5 * b_RE.T @ a_RH
        changed = block.gate(x_TH)
    for found_TX, plain_TX, changed_TX in zip(found, plain, changed, strict=True):
        torch.testing.assert_close(found_TX[5:12], changed_TX[5:12])
        assert torch.equal(found_TX[:5], plain_TX[:5])
        assert torch.equal(found_TX[12:], plain_TX[12:])
    assert not torch.equal(found[2], plain[2])
