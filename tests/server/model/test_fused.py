"""What one op computes in place of several of Hugging Face's: the same, and only where it is the same."""

from __future__ import annotations

import sys

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

from support.models import FAMILIES, MULTIMODAL
from support.tokenizers import VOCAB_SIZE, save_tokenizer
from turret_adapters.spec import Part
from turret_server.kernels import CpuOps, NF4Weight, ReferenceOps
from turret_server.model import fused
from turret_server.model.adapted import AdaptedLinear
from turret_server.model.context import StepContext, step_context
from turret_server.model.deltas import (
    DeltaBatch,
    GatheredRows,
    ResidentDelta,
    ResidentDeltas,
    ResidentRows,
    Segment,
)
from turret_server.model.load import load_model

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
NAMES = tuple(SIZES)
WIDTH = 128


class CountingOps(CpuOps):
    """Counts the products."""

    num_products = 0

    def adapted_linear(self, *arguments):
        self.num_products += arguments[-1] is not None  # otherwise it is `nf4_linear`
        return super().adapted_linear(*arguments)

    def nf4_linear(self, *arguments):
        self.num_products += 1
        return super().nf4_linear(*arguments)


OPS = {dtype: CountingOps(dtype) for dtype in DTYPES}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Memory:
    """An arena in which adapters' rows lie one after another."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.flat = torch.randn(1 << 16, dtype=dtype)
        self._end = 0

    def _rows(self, count: int, width: int) -> ResidentRows:
        offsets = torch.arange(count) * width + self._end
        self._end += count * width
        return ResidentRows(offsets, width)

    def lora(self, *modules: str, rank: int) -> ResidentDeltas:
        deltas = {}
        for module in modules:
            parts = {Part.LORA_A: self._rows(rank, WIDTH), Part.LORA_B: self._rows(rank, SIZES[module])}
            deltas[module] = ResidentDelta(0.5, parts, torch.empty(0, dtype=torch.long))
        return ResidentDeltas(lora=deltas, others={})

    def gain(self, module: str) -> ResidentDeltas:
        parts = {Part.GAIN: self._rows(1, SIZES[module])}
        return ResidentDeltas(
            lora={}, others={module: ResidentDelta(1.0, parts, torch.empty(0, dtype=torch.long))}
        )

    def row(self, offset: int, width: int) -> torch.Tensor:
        return self.flat[offset : offset + width]


def in_step(compute, ops, memory=None, deltas=None):
    context = StepContext(
        ops=ops, arena=memory, attention=None, deltas=deltas, head_deltas=None, attention_calls=[]
    )
    with torch.inference_mode(), step_context(context):
        return compute()


def linears(dtype: torch.dtype, *, has_bias: bool) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    for name, size in SIZES.items():
        data, state = quantize_4bit(torch.randn(size, WIDTH), quant_type="nf4", compress_statistics=True)
        bias = nn.Parameter(torch.randn(size, dtype=dtype), requires_grad=False) if has_bias else None
        packed = OPS[dtype].pack_nf4(NF4Weight(data, state, WIDTH, size))
        setattr(module, name, AdaptedLinear(name, packed, bias))
    return module


def segments(memory: Memory, kind: str) -> list[Segment]:
    if kind == "base":
        return []
    some = [
        Segment(1, 3, ((memory.lora("q_proj", "v_proj", rank=3), 1.0),)),
        Segment(3, 9, ((memory.lora(*NAMES, rank=16), -2.0), (memory.lora("k_proj", rank=1), 1.0))),
    ]
    return some if kind == "LoRAs" else [*some, Segment(9, 11, ((memory.gain("k_proj"), 1.0),))]


@each_dtype
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("kind", "num_products"), [("base", 1), ("LoRAs", 1), ("gains", 3)])
def test_linears_that_read_the_same_share_a_product(dtype, has_bias, kind, num_products):
    memory, ops, x = Memory(dtype), OPS[dtype], torch.randn(1, 12, WIDTH, dtype=dtype)
    found = segments(memory, kind)
    alone, grouped = linears(dtype, has_bias=has_bias), linears(dtype, has_bias=has_bias)
    fused._group(grouped, NAMES, ops)

    def compute(module: nn.Module) -> list[torch.Tensor]:
        deltas = DeltaBatch(found, GatheredRows()) if found else None
        return in_step(lambda: [getattr(module, name)(x) for name in NAMES], ops, memory, deltas)

    expected = compute(alone)
    for _ in range(2):
        before = ops.num_products
        assert all(torch.equal(*each) for each in zip(compute(grouped), expected, strict=True))
        assert ops.num_products - before == num_products


@each_dtype
def test_linears_that_read_something_else_after_all_compute_their_own(dtype):
    ops, grouped = OPS[dtype], linears(dtype, has_bias=True)
    one, other = torch.randn(2, 1, 5, WIDTH, dtype=dtype)
    expected = in_step(lambda: [grouped.q_proj(one), grouped.k_proj(other), grouped.v_proj(one)], ops)
    fused._group(grouped, NAMES, ops)
    for _ in range(2):
        found = in_step(lambda: [grouped.q_proj(one), grouped.k_proj(other), grouped.v_proj(one)], ops)
        assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
    before = ops.num_products
    in_step(lambda: grouped.q_proj(one), ops)
    assert grouped.q_proj.group is None
    assert ops.num_products == before + 1


def test_a_step_that_failed_halfway_leaves_nothing_to_the_next():
    ops, grouped = OPS[torch.float32], linears(torch.float32, has_bias=False)
    first, second = torch.randn(2, 1, 5, WIDTH)
    expected = in_step(lambda: [getattr(grouped, name)(second) for name in NAMES], ops)
    fused._group(grouped, NAMES, ops)
    in_step(lambda: grouped.q_proj(first), ops)
    found = in_step(lambda: [getattr(grouped, name)(second) for name in NAMES], ops)
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


def test_where_an_op_cannot_join_weights_they_stay_alone():
    grouped = linears(torch.float32, has_bias=False)
    weights = [getattr(grouped, name).weight for name in NAMES]
    fused._group(grouped, NAMES, ReferenceOps())
    assert [getattr(grouped, name).weight for name in NAMES] == weights
    assert all(getattr(grouped, name).group is None for name in NAMES)


# Gemma's gate is a GELU, Phi-3's and the experts' lie in one matrix, GPT-NeoX has none.
HAS_SWIGLU = {"llama", "llama-nf4", "llama-tied", "mistral", "qwen2", "qwen3"}
# GPT-NeoX calls the rotation of a part of a head, which our op leaves to its own.
TEXT_FAMILIES = sorted(FAMILIES.keys() - MULTIMODAL.keys())


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_parts_of_each_family_that_are_recognised(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family])
    mlps = [module for module in model.modules() if hasattr(module, "gate_proj")]
    assert {fused._is_swiglu(module) for module in mlps} == ({family in HAS_SWIGLU} if mlps else set())
    file = sys.modules[type(model).__module__]
    assert fused._is_rotation(file.apply_rotary_pos_emb)


class Doubled(LlamaMLP):
    def forward(self, x):
        return super().forward(2 * x)


class Elsewhere(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


@pytest.mark.parametrize("kind", [Doubled, Elsewhere])
def test_a_gate_that_computes_something_else_is_left_alone(kind):
    config = LlamaConfig(hidden_size=64, intermediate_size=64)
    assert fused._is_swiglu(LlamaMLP(config))
    assert not fused._is_swiglu(kind(config))


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, sin, cos),
        lambda q, k, cos, sin: (apply_rotary_pos_emb(q, k, cos, sin)[0], k),
        lambda q, k, cos, sin: apply_rotary_pos_emb(q.double(), k.double(), cos, sin),
        lambda q, angles: q * angles,
    ],
)
def test_another_rotation_is_left_alone(function):
    assert not fused._is_rotation(function)


class Gates(LlamaMLP):
    """With adapted linears, as in a loaded model."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__(LlamaConfig(hidden_size=64, intermediate_size=64))
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, AdaptedLinear(name, torch.randn(64, 64), None))
        self.act_fn = activation


class Heads(nn.Module):
    def forward(self, *arguments):
        return apply_rotary_pos_emb(*arguments)


@pytest.mark.parametrize("is_recognised", [True, False])
def test_only_what_is_recognised_is_computed_by_an_op(is_recognised, monkeypatch):
    gates, heads = Gates(nn.SiLU() if is_recognised else nn.GELU()), Heads()
    if not is_recognised:
        monkeypatch.setitem(globals(), "apply_rotary_pos_emb", lambda query, key, *_: (query, key))
    fused._fuse_gate(gates)
    fused._fuse_rotation(heads)
    assert ["forward" in vars(module) for module in (gates, heads)] == [is_recognised] * 2


def test_what_the_op_does_not_rotate_the_models_own_function_does():
    rotate = fused._rotation(apply_rotary_pos_emb)
    query, key = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 3, 64)
    angles = torch.randn(2, 1, 3, 64)
    ops = OPS[torch.float32]
    for cos, sin in (angles, angles.double()):
        found = in_step(lambda cos=cos, sin=sin: rotate(query, key, cos, sin), ops)
        expected = apply_rotary_pos_emb(query, key, cos, sin)
        assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
    tokens_first = query.transpose(1, 2), key.transpose(1, 2)
    found = in_step(lambda: rotate(*tokens_first, *angles, unsqueeze_dim=2), ops)
    expected = apply_rotary_pos_emb(*tokens_first, *angles, unsqueeze_dim=2)
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


def test_a_loaded_model_computes_what_it_computes_without_and_others_of_its_class_are_as_they_were(
    tmp_path, monkeypatch
):
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB_SIZE,
    )
    torch.manual_seed(0)
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    forwards = [type(module).forward for module in whole.modules()]
    models = []
    for each in (fused.fuse, lambda *_: None):
        monkeypatch.setattr("turret_server.model.load.fuse", each)
        loaded = load_model(
            str(tmp_path / "model"),
            device=torch.device("cpu"),
            dtype=torch.float32,
            cache=tmp_path / "cache",
            ops=OPS[torch.float32],
        )
        models.append(loaded.model)
    token_ids, before = torch.randint(64, (1, 9)), OPS[torch.float32].num_products
    for model in models:
        model.set_attn_implementation("eager")
    logits = [in_step(lambda model=model: model(token_ids).logits, OPS[torch.float32]) for model in models]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    # Of two layers: the products of q, k and v, of gate and up, and two more; against seven.
    assert OPS[torch.float32].num_products - before == 2 * 4 + 2 * 7
    assert [type(module).forward for module in whole.modules()] == forwards
