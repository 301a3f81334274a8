"""The linear that takes the place of every `Linear4bit`: an NF4 product, and the step's LoRA rows on top."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from turret_server.kernels import NF4Weight, Ops, PackedNF4Weight
from turret_server.model.context import current_step


class AdaptedLinear(nn.Module):
    """y = x · Wᵀ + bias + Σ of the LoRA rows that the step applies to each token; x [1, T, in_features]."""

    def __init__(self, name: str, weight: NF4Weight | PackedNF4Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.name = name
        self.weight = weight
        self.bias = bias
        self.in_features = weight.in_features
        self.out_features = weight.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = current_step()
        x_TI = x.reshape(-1, self.in_features)
        y_TO = step.ops.nf4_linear(x_TI, self.weight)
        if self.bias is not None:
            y_TO += self.bias
        rows = step.lora.rows(self.name) if step.lora else None
        if rows is not None:
            step.ops.lora_add(y_TO, x_TI, step.arena.flat, rows)
        return y_TO.view(*x.shape[:-1], self.out_features)


def replace_linears(model: nn.Module, ops: Ops) -> None:
    """Put an `AdaptedLinear` in the place of every bitsandbytes 4-bit linear, one by one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            out_features, in_features = state.shape
            weight = ops.pack_nf4(NF4Weight(module.weight.data, state, in_features, out_features))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdaptedLinear(name, weight, module.bias))
