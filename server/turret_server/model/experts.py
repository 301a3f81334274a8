"""Mixtures of experts: every expert's projections as quantised linears that adapters can change.

transformers stacks the experts of a layer, [experts, out, in], which bitsandbytes does not quantise. Here
they become one linear per expert and projection before the weights are read, so each is quantised while it is
read, and saved and loaded like any other linear.

Shape suffixes: T tokens of the step, n those of an expert, K experts of a token, E experts, H hidden size,
I and O in and out features.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.func import functional_call
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from turret_adapters.spec import ModuleKind, ModuleShape, Part
from turret_server.kernels import LoraRows, NF4Weight, Ops, PackedNF4Weight
from turret_server.model.adapted import Adapted, pack
from turret_server.model.arena import Arena
from turret_server.model.context import current_step
from turret_server.model.deltas import ResidentDelta

# The parts of gate_up_proj and down_proj in checkpoints with one tensor per expert and part.
_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mixtral": (("w1", "w3"), ("w2",)),
    "olmoe": (("gate_proj", "up_proj"), ("down_proj",)),
    "qwen2_moe": (("gate_proj", "up_proj"), ("down_proj",)),
    "qwen3_moe": (("gate_proj", "up_proj"), ("down_proj",)),
}
_PROJECTIONS = ("gate_up_proj", "down_proj")

EXPERT_MODELS = tuple(_PARTS)
EXPERTS_METHOD = "turret_nf4"


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether models of this type have experts of the supported kind."""
    return config.model_type in _PARTS


def is_stacked(parameter: str) -> bool:
    """Whether a parameter of such a model holds stacked experts."""
    return parameter.rpartition(".")[2] in _PROJECTIONS


class ExpertLinear(Adapted):
    """One projection of one expert, quantised, without a bias."""

    def __init__(self, name: str, weight: NF4Weight | PackedNF4Weight) -> None:
        super().__init__(
            name,
            ModuleShape(
                kind=ModuleKind.EXPERT, in_features=weight.in_features, out_features=weight.out_features
            ),
        )
        self.weight = weight

    def forward(self, x_nI: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """`tokens` are the rows' indices in the step, ascending; only read if the step has adapters."""
        step = current_step()
        y_nO = step.ops.nf4_linear(x_nI, self.weight)
        rows = step.deltas.lora(self.name) if step.deltas else None
        if rows is not None:
            step.ops.lora_add(y_nO, x_nI, step.arena.flat, _of_tokens(rows, tokens))
        return y_nO


class Experts(nn.Module):
    """The experts of one layer.

    `gate_up_proj.e` and `down_proj.e` belong to expert e: plain linears until the weights are read, then
    Linear4bit, finally `ExpertLinear`.
    """

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = _unstacked(stacked.get_parameter("gate_up_proj"))
        self.down_proj = _unstacked(stacked.get_parameter("down_proj"))
        self.act_fn = stacked.get_submodule("act_fn")

    def forward(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """What transformers' `MixtralExperts` computes, in the same order."""
        sum_TH = torch.zeros_like(x_TH)
        has_deltas = current_step().deltas is not None
        # Stable, so that the tokens of an expert stay in order.
        choices, by_expert = experts_TK.flatten().sort(stable=True)
        tokens = by_expert // experts_TK.shape[1]
        experts = torch.arange(len(self.down_proj), device=choices.device)
        ends = torch.searchsorted(choices, experts, right=True)
        # The host waits for a GPU once in a layer: also for the tokens, if adapters' segments are among them.
        known = (torch.cat((ends, tokens)) if has_deltas else ends).tolist()
        ends_E, known_tokens = known[: len(experts)], known[len(experts) :]
        for expert, (start, end) in enumerate(pairwise((0, *ends_E))):
            if start == end:
                continue
            chosen_n, tokens_n = by_expert[start:end], tokens[start:end]
            y_nH = self._apply_expert(expert, x_TH[tokens_n], known_tokens[start:end])
            y_nH = y_nH * weights_TK.flatten()[chosen_n, None]
            sum_TH.index_add_(0, tokens_n, y_nH.to(sum_TH.dtype))
        return sum_TH

    def _apply_expert(self, expert: int, x_nH: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        gate_nI, up_nI = self.gate_up_proj[expert](x_nH, tokens).chunk(2, dim=-1)
        y_nH: torch.Tensor = self.down_proj[expert](self.act_fn(gate_nI) * up_nI, tokens)
        return y_nH


def _unstacked(weight_EOI: torch.Tensor) -> nn.ModuleList:
    """A linear per expert, on the meta device."""
    num_experts, out_features, in_features = weight_EOI.shape
    return nn.ModuleList(
        nn.Linear(in_features, out_features, bias=False, device="meta", dtype=weight_EOI.dtype)
        for _ in range(num_experts)
    )


def _of_tokens(rows: LoraRows, tokens: Sequence[int]) -> LoraRows:
    """The segments' bounds among some of the step's tokens, which are ascending."""
    return replace(
        rows,
        token_starts=tuple(bisect_left(tokens, start) for start in rows.token_starts),
        token_ends=tuple(bisect_left(tokens, end) for end in rows.token_ends),
    )


class AdaptedRouter(Adapted):
    """The router that selects a token's experts, unquantised; x [T, hidden]."""

    def __init__(self, name: str, module: nn.Module) -> None:
        weight_EH = module.get_parameter("weight")
        num_experts, hidden_size = weight_EH.shape
        super().__init__(
            name, ModuleShape(kind=ModuleKind.ROUTER, in_features=hidden_size, out_features=num_experts)
        )
        self.module = module
        self.weight = weight_EH

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits, weights and experts of each token."""
        step = current_step()
        chosen: tuple[torch.Tensor, ...] = self.module(x_TH)
        for segment in step.deltas.segments if step.deltas else ():
            own = [
                (adapter.others[self.name], weight)
                for adapter, weight in segment.adapters
                if self.name in adapter.others
            ]
            if own:
                changed = self._choose(x_TH[segment.rows], own, step.arena)
                for all_TX, own_nX in zip(chosen, changed, strict=True):
                    all_TX[segment.rows] = own_nX
        return chosen

    def _choose(
        self, x_nH: torch.Tensor, own: Sequence[tuple[ResidentDelta, float]], arena: Arena
    ) -> tuple[torch.Tensor, ...]:
        weight_EH = self.weight.float()
        for delta, weight in own:
            a_RH, b_RE = (delta.parts[part].gather(arena).float() for part in (Part.LORA_A, Part.LORA_B))
            weight_EH = weight_EH + weight * delta.scaling * (b_RE.T @ a_RH)
        changed: tuple[torch.Tensor, ...] = functional_call(
            self.module, {"weight": weight_EH.to(self.weight.dtype)}, (x_nH,)
        )
        return changed


def adapt_experts(model: PreTrainedModel, ops: Ops) -> None:
    """Replaces every quantised linear of an expert, and the routers."""
    if has_experts(model.config):
        # Some checkpoints request it, but only training reads it.
        model.config.output_router_logits = False
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            router = name.removesuffix("experts") + "gate"
            model.set_submodule(router, AdaptedRouter(router, model.get_submodule(router)))
            for projection in _PROJECTIONS:
                linears = module.get_submodule(projection)
                for expert, linear in list(linears.named_children()):
                    assert isinstance(linear, Linear4bit)
                    own = ExpertLinear(f"{name}.{projection}.{expert}", pack(linear, ops))
                    setattr(linears, expert, own)


@register_quantization_config(EXPERTS_METHOD)
class ExpertsConfig(BitsAndBytesConfig):  # type: ignore[misc]  # transformers is not typed
    """bitsandbytes' configuration, with experts; a quantised copy is saved with its method's name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "load_in_4bit": True})
        self.quant_method = EXPERTS_METHOD

    def to_dict(self) -> dict[str, Any]:
        # With these keys transformers selects bitsandbytes' quantizer, whatever the method.
        loads = {"load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"}
        return {key: value for key, value in super().to_dict().items() if key not in loads}


@register_quantizer(EXPERTS_METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """bitsandbytes' quantizer, which first turns stacked experts into linears."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any, **options: Any
    ) -> None:
        for name, module in list(model.named_modules()):
            if all(projection in dict(module.named_parameters(recurse=False)) for projection in _PROJECTIONS):
                model.set_submodule(name, Experts(module))
        super()._process_model_before_weight_loading(model, device_map, **options)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Replaces the conversions that stack experts."""
        stacked = tuple(f"experts.{projection}" for projection in _PROJECTIONS)
        others = [each for each in weight_conversions if not each.target_patterns[0].endswith(stacked)]
        own = [] if self.pre_quantized else _conversions(model.config.model_type)
        return [*super().update_weight_conversions(others, model), *own]


def _conversions(model_type: str) -> list[WeightTransform]:
    conversions: list[WeightTransform] = []
    for projection, parts in zip(_PROJECTIONS, _PARTS[model_type], strict=True):
        of_each = [rf"\.experts\.(\d+)\.{part}\.weight" for part in parts]
        conversions += [
            WeightConverter(of_each, rf".experts.{projection}.\1.weight", [_Concatenate()]),
            WeightConverter(rf"\.experts\.{projection}$", f".experts.{projection}.0.weight", [_Unstack()]),
        ]
    return conversions


class _Concatenate(ConversionOps):  # type: ignore[misc]
    """Concatenates the parts of one expert's projection."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        *,
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        parts_OI = [input_dict[pattern][0] for pattern in source_patterns]
        return {full_layer_name: torch.cat(parts_OI) if len(parts_OI) > 1 else parts_OI[0]}


class _Unstack(ConversionOps):  # type: ignore[misc]
    """Splits a stacked projection into its experts; `full_layer_name` is that of expert 0."""

    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], *, full_layer_name: str, **_: Any
    ) -> dict[str, torch.Tensor]:
        [[weight_EOI]] = input_dict.values()
        stem = full_layer_name.removesuffix("0.weight")
        return {f"{stem}{expert}.weight": weight_OI for expert, weight_OI in enumerate(weight_EOI)}
