"""What Hugging Face's modules compute with several ops and one op of ours computes alone: the products of
linears that read the same input, rotary embeddings, SwiGLU.

Rotations and SwiGLUs are recognised by what they compute of random numbers. Outputs stay the same.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from turret_server.kernels import Ops, ReferenceOps
from turret_server.model.adapted import AdaptedLinear, LinearGroup
from turret_server.model.context import current_step

# Linears of one module that families call one after another with the same input.
_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
)
_ROTATION = "apply_rotary_pos_emb"


def fuse(model: PreTrainedModel, ops: Ops) -> None:
    """Lets the adapted modules of a model use the ops for several of their parts."""
    for module in model.modules():
        for names in _GROUPS:
            _group(module, names, ops)
        _fuse_rotation(module)
        _fuse_gate(module)


def _group(module: nn.Module, names: tuple[str, ...], ops: Ops) -> None:
    members = [getattr(module, name, None) for name in names]
    linears = [member for member in members if isinstance(member, AdaptedLinear)]
    weights = [each.weight for each in linears if not isinstance(each.weight, torch.Tensor)]
    if len(weights) < len(names) or len({weight.in_features for weight in weights}) > 1:
        return
    grouped = ops.group(weights)
    if grouped is not None:
        weight, parts = grouped
        for linear, part in zip(linears, parts, strict=True):
            linear.weight = part
        LinearGroup(linears, weight)


def _fuse_rotation(module: nn.Module) -> None:
    """Lets a module's own forward call our rotation, where it calls one that computes the same."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or _ROTATION not in forward.__code__.co_names:
        return
    original = forward.__globals__.get(_ROTATION)
    if original is None or not _is_rotation(original):
        return
    own_globals = forward.__globals__ | {_ROTATION: _rotation(original)}
    own = types.FunctionType(
        forward.__code__, own_globals, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(own, module)  # of this module alone


def _is_rotation(function: Callable[..., Any]) -> bool:
    """Whether it computes `Ops.rotate` of query and key, heads first."""
    random = torch.Generator().manual_seed(0)
    query_1HTD, key_1HTD = (torch.randn(1, heads, 3, 8, generator=random) for heads in (4, 2))
    cos_1TD, sin_1TD = torch.randn(2, 1, 3, 8, generator=random)
    try:
        found = function(query_1HTD, key_1HTD, cos_1TD, sin_1TD)
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return False
    reference, angles = ReferenceOps(), (cos_1TD[0], sin_1TD[0])
    expected = [
        reference.rotate(each[0].transpose(0, 1), *angles).transpose(0, 1) for each in (query_1HTD, key_1HTD)
    ]
    return all(torch.equal(one[0], other) for one, other in zip(found, expected, strict=True))


def _rotation(original: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        cos_1TD: torch.Tensor,
        sin_1TD: torch.Tensor,
        *arguments: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = cos_1TD[0], sin_1TD[0]
        is_partial = cos_1TD.shape[-1] != query_1HTD.shape[-1]
        if arguments or options or is_partial or cos_1TD.dtype != query_1HTD.dtype:
            found = original(query_1HTD, key_1KTD, cos_1TD, sin_1TD, *arguments, **options)
            return cast("tuple[torch.Tensor, torch.Tensor]", found)
        ops = current_step().ops
        query_1HTD, key_1KTD = (
            ops.rotate(each[0].transpose(0, 1), *angles).transpose(0, 1)[None]
            for each in (query_1HTD, key_1KTD)
        )
        return query_1HTD, key_1KTD

    return rotate


def _fuse_gate(module: nn.Module) -> None:
    """Lets a SwiGLU (arXiv 2002.05202) multiply in one op."""
    linears = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if all(isinstance(each, AdaptedLinear) for each in linears) and _is_swiglu(module):
        module.forward = types.MethodType(_swiglu, module)


def _swiglu(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    y_TI = current_step().ops.silu_multiply(gate.flatten(0, -2), up.flatten(0, -2))
    return cast("torch.Tensor", self.down_proj(y_TI.view(gate.shape)))


def _is_swiglu(module: nn.Module) -> bool:
    """Whether the module's own forward, with other linears, computes down(silu(gate(x)) · up(x))."""
    random = torch.Generator().manual_seed(0)
    x_TI, gate_II, up_II, down_II = torch.randn(4, 8, 8, generator=random)
    names = {"gate_proj": gate_II, "up_proj": up_II, "down_proj": down_II}
    stand_in = types.SimpleNamespace(act_fn=getattr(module, "act_fn", None))
    for name, weight_II in names.items():
        setattr(stand_in, name, lambda x, weight_II=weight_II: x @ weight_II)
    try:
        found = type(module).forward(stand_in, x_TI)
    except (AttributeError, TypeError, RuntimeError):  # it needs something else
        return False
    expected = ReferenceOps().silu_multiply(x_TI @ gate_II, x_TI @ up_II) @ down_II
    return isinstance(found, torch.Tensor) and torch.equal(found, expected)
