"""The attention function that every Hugging Face model calls, registered under the name "turret".

The batch is packed, (1, heads, T, head_dim): the tokens of all sequences end to end. The step's context says
which token belongs to which sequence, and where its keys and values are written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from turret_server.kernels import AttentionParams
from turret_server.model.context import current_step

NAME = "turret"


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 (part of the interface; the step implies the mask)
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Writes this layer's keys and values of the step, then attends; [1, T, heads, head_dim]."""
    step = current_step()
    layer = module.layer_idx
    assert isinstance(layer, int)
    step.attention_calls.append(layer)
    kv = step.arena.layer(layer)
    step.ops.write_kv(kv, key[0].transpose(0, 1), value[0].transpose(0, 1), step.attention)
    params = AttentionParams(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
        causal=getattr(module, "is_causal", True),
    )
    return step.ops.paged_attention(query[0].transpose(0, 1), kv, step.attention, params)[None], None


def register() -> None:
    """Registers the attention with transformers, and no function that makes a mask: with one, transformers
    first looks for packed sequences in every step, and waits for the device.
    """
    AttentionInterface.register(NAME, paged_attention)
