"""peft's configs with defaults, and its modules against an adapter's rows in the formula of `Part`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, TrainableTokensConfig, VeraConfig

from turret_adapters.host import BaseWeights, HostAdapter, ModuleDelta
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part

A, B, GAIN, INPUT_GAIN, BIAS, WEIGHT, TOKENS, _HEAD = Part
TASK = {"task_type": "CAUSAL_LM"}


def lora(**fields: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{**TASK, "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **fields})


def adalora(**fields: Any) -> Callable[[], AdaLoraConfig]:
    return lambda: AdaLoraConfig(
        **{**TASK, "init_r": 5, "lora_alpha": 3, "target_modules": ["q_proj"], "total_step": 9, **fields}
    )


def vera(**fields: Any) -> Callable[[], VeraConfig]:
    return lambda: VeraConfig(**{**TASK, "r": 6, "target_modules": ["q_proj", "down_proj"], **fields})


def ia3(**fields: Any) -> Callable[[], IA3Config]:
    fields = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], **fields}
    return lambda: IA3Config(**TASK, **fields)


def ln(*names: str, **fields: Any) -> Callable[[], LNTuningConfig]:
    return lambda: LNTuningConfig(**TASK, target_modules=list(names), **fields)


def tokens(*names: str, **fields: Any) -> Callable[[], TrainableTokensConfig]:
    fields = {"token_indices": [7, 60, 0, 5], "target_modules": list(names) or None, **fields}
    return lambda: TrainableTokensConfig(**TASK, **fields)


def linear(
    shape: ModuleShape,
    delta: ModuleDelta,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    x_NI: torch.Tensor,
) -> torch.Tensor:
    rows: Mapping[Part, torch.Tensor] = delta.rows
    is_head = shape.kind is ModuleKind.HEAD
    weight_OI = rows.get(WEIGHT, weight_OI).clone()
    if TOKENS in rows:
        weight_OI[list(delta.token_ids)] = rows[TOKENS]
    y_NO = (x_NI * rows.get(INPUT_GAIN, torch.ones(1))) @ weight_OI.t()
    if A in rows:
        b_RO = rows[B].t() if is_head else rows[B]
        y_NO = y_NO + delta.scaling * (x_NI @ rows[A].t()) @ b_RO
    if GAIN in rows:
        assert rows[GAIN].shape == ((shape.out_features, 1) if is_head else (1, shape.out_features))
        y_NO = y_NO * rows[GAIN].view(-1)
    if BIAS in rows:
        assert rows[BIAS].shape == ((shape.out_features, 1) if is_head else (1, shape.out_features))
        bias_O = rows[BIAS].view(-1)
    return y_NO if bias_O is None else y_NO + bias_O


def embedding(delta: ModuleDelta, weight_VE: torch.Tensor, x_N: torch.Tensor) -> torch.Tensor:
    rows = delta.rows
    weight_VE = rows.get(WEIGHT, weight_VE).clone()
    if TOKENS in rows:
        assert list(delta.token_ids) == sorted(set(delta.token_ids))
        weight_VE[list(delta.token_ids)] = rows[TOKENS]
    y_NE = weight_VE[x_N]
    if A in rows:
        y_NE = y_NE + delta.scaling * (rows[A][x_N] @ rows[B])
    return y_NE * rows.get(GAIN, torch.ones(1))


def norm(delta: ModuleDelta, module: Any, x_NE: torch.Tensor) -> torch.Tensor:
    module = copy.deepcopy(module)
    for part, name in ((WEIGHT, "weight"), (BIAS, "bias")):
        if part in delta.rows:
            getattr(module, name).data = delta.rows[part][0].clone()
    return module(x_NE)


def check(
    found: HostAdapter, base: BaseSpec, weights: BaseWeights, plain: Any, loaded: Any, unchanged: float = 1e-3
) -> None:
    """Compares every module of the base, those that are not adapted, too."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, shape in base.modules.items():
            theirs = loaded.base_model.model.get_submodule(name)
            delta = found.deltas.get(name, ModuleDelta(rows={}))
            if shape.kind is ModuleKind.EMBEDDING:
                x = torch.arange(shape.in_features)
                y = embedding(delta, weights.weight(name), x)
            elif shape.kind is ModuleKind.NORM:
                x = torch.randn(5, shape.in_features)
                y = norm(delta, plain.get_submodule(name), x)
            else:
                x = torch.randn(5, shape.in_features)
                y = linear(shape, delta, weights.weight(name), weights.bias(name), x)
            torch.testing.assert_close(
                y, theirs(x), rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
            assert (name in found.deltas) == ((y - plain.get_submodule(name)(x)).abs().max() > unchanged)
