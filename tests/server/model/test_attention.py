"""What Hugging Face's models pass to the attention function reaches the kernels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from support.kernel_inputs import paged
from turret_server.kernels import AttentionParams, ReferenceOps
from turret_server.model.attention import paged_attention
from turret_server.model.context import StepContext, step_context

HEADS, KV_HEADS, DIM = 4, 2, 16
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, AttentionParams(DIM**-0.5, None, None, None)),
        ({"scaling": 0.3}, AttentionParams(0.3, None, None, None)),
        ({"scaling": 0.0}, AttentionParams(0.0, None, None, None)),
        ({"sliding_window": 5}, AttentionParams(DIM**-0.5, 5, None, None)),
        ({"softcap": 1.5}, AttentionParams(DIM**-0.5, None, 1.5, None)),
        ({"s_aux": torch.arange(4.0)}, AttentionParams(DIM**-0.5, None, None, torch.arange(4.0))),
        ({"dropout": 0.0, "position_ids": None}, AttentionParams(DIM**-0.5, None, None, None)),
    ],
    ids=["none", "scaling", "scaling of 0", "window", "softcap", "sinks", "others"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_options_reach_the_kernel_and_the_step_is_written_to_the_layer(options, expected, causal):
    kv, batch = paged(torch.float32, [(3, 20), (1, 9)], num_kv_heads=KV_HEADS, head_dim=DIM, device=CPU)
    expected = replace(expected, causal=causal)
    module = SimpleNamespace(layer_idx=7, is_causal=causal)
    written, seen = kv.clone(), []
    query = torch.randn(1, HEADS, 4, DIM)
    key, value = torch.randn(2, 1, KV_HEADS, 4, DIM)
    ops, layers = ReferenceOps(), {7: kv}
    context = StepContext(
        ops=ops,
        arena=SimpleNamespace(layer=layers.__getitem__),
        attention=batch,
        deltas=None,
        head_deltas=None,
        attention_calls=seen,
    )
    with step_context(context):
        found, weights = paged_attention(module, query, key, value, None, **options)
    assert seen == [7]
    assert weights is None
    ops.write_kv(written, key[0].transpose(0, 1), value[0].transpose(0, 1), batch)
    assert torch.equal(kv, written)
    assert torch.equal(found[0], ops.paged_attention(query[0].transpose(0, 1), written, batch, expected))
