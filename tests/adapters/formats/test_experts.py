"""Adapters whose experts have names of their own, as in transformers 4."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support.adapters import APART, save_apart
from support.refusals import refused
from turret_adapters.errors import AdapterBaseError, AdapterError, AdapterFormatError
from turret_adapters.formats.experts import join_halves
from turret_adapters.formats.files import CONFIG_NAME, TENSORS_NAME
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import ModuleDelta
from turret_adapters.spec import BaseSpec, Part
from turret_server.model.describe import CheckpointWeights, describe_model

FAMILIES = sorted(APART)


def weight_of(delta: ModuleDelta) -> torch.Tensor:
    return delta.scaling * delta.rows[Part.LORA_B].mT @ delta.rows[Part.LORA_A]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str, base_of: Callable[[str], Path]) -> BaseSpec:
    return describe_model(str(base_of(family)))


@pytest.fixture
def make(family: str, base_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def make(without: tuple[int, ...] = (), **fields: Any) -> Path:
        torch.manual_seed(0)
        names = [APART[family][index] for index in without]
        return save_apart(family, base_of(family), tmp_path / "adapter", names, **fields)

    return make


@pytest.mark.parametrize("without", [(), (0,), (1,), (2,), (1, 2), (0, 1)])
def test_an_experts_linears_have_their_own_pairs(
    family: str, without: tuple[int, ...], make: Callable[..., Path], base: BaseSpec, base_of: Callable
) -> None:
    """Of any of its linears; peft itself loads only all of them, or the last."""
    folder = make(without, use_rslora=True, alpha_pattern={APART[family][1]: 12})
    found = read_adapter(folder, base, CheckpointWeights(str(base_of(family)), base))
    tensors = load_file(folder / TENSORS_NAME)
    scalings = (4.0, 6.0, 4.0)  # alpha by the root of the rank
    *linears, block = APART[family]

    def expected(layer: int, expert: int, index: int) -> torch.Tensor:
        key = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{linears[index]}"
        if f"{key}.lora_A.weight" not in tensors:
            return torch.zeros(64, 64)
        return scalings[index] * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]

    for layer in range(3):
        for expert in range(4):
            experts = f"model.layers.{layer}.mlp.experts"
            first = torch.cat([expected(layer, expert, 0), expected(layer, expert, 1)])
            for module, own in (
                (f"{experts}.gate_up_proj.{expert}", first),
                (f"{experts}.down_proj.{expert}", expected(layer, expert, 2)),
            ):
                assert (module in found.deltas) == bool(own.any())
                if own.any():
                    torch.testing.assert_close(weight_of(found.deltas[module]), own)
    assert found.spec.max_rank == (4 if {0, 1} & {*without} else 8)


@pytest.mark.parametrize("scalings", [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0), (1e-320, 2.0), (-4.0, 2.0)])
def test_halves_keep_their_scalings_whatever_they_are(scalings: tuple[float, float]) -> None:
    torch.manual_seed(0)
    halves = [
        ModuleDelta(rows={Part.LORA_A: torch.randn(2, 5), Part.LORA_B: torch.randn(2, 3)}, scaling=scaling)
        for scaling in scalings
    ]
    joined = join_halves([*enumerate(halves)])
    torch.testing.assert_close(weight_of(joined), torch.cat([*map(weight_of, halves)]))


@pytest.mark.parametrize("targets", ["all-linear", r".*\.experts\..*|.*\.gate"])
def test_a_pattern_names_them_as_they_were(
    family: str, targets: str, make: Callable[..., Path], base: BaseSpec, base_of: Callable
) -> None:
    listed = read_adapter(make(), base, CheckpointWeights(str(base_of(family)), base))
    folder = make(target_modules=targets)
    if targets == "all-linear":
        refused(folder, base, AdapterFormatError, "self_attn", "lora_A.weight")  # it has no attention
        return
    found = read_adapter(folder, base, CheckpointWeights(str(base_of(family)), base))
    assert found.spec.rows == listed.spec.rows


def test_more_than_a_pair_is_refused(make: Callable[..., Path], base: BaseSpec) -> None:
    folder = make()
    tensors = load_file(folder / TENSORS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text())
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[key]))
    save_file(tensors, folder / TENSORS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"use_dora": True}))

    class Ones:
        def weight(self, module: str) -> torch.Tensor:
            shape = base.modules[module]
            return torch.ones(shape.out_features, shape.in_features)

        def bias(self, module: str) -> None:
            raise AssertionError(module)

    refused(folder, base, AdapterFormatError, "only a low-rank pair", "gain", weights=Ones())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_names_of_experts_are_read_or_refused(
    data: st.DataObject, make: Callable[..., Path], base: BaseSpec, base_of: Callable, family: str
) -> None:
    folder = make()
    tensors = load_file(folder / TENSORS_NAME)
    key = data.draw(st.sampled_from(sorted(tensors)))
    names = key.split(".")
    others = st.sampled_from(["experts", "w1", "up_proj", "down_proj", "gate", "4", "00", "-1", "mlp", ""])
    names[data.draw(st.integers(0, len(names) - 1))] = data.draw(others)
    tensors[".".join(names)] = tensors.pop(key)
    save_file(tensors, folder / TENSORS_NAME)
    with suppress(AdapterError):
        read_adapter(folder, base, CheckpointWeights(str(base_of(family)), base))


def test_an_activated_lora_of_experts_is_refused(make: Callable[..., Path], base: BaseSpec) -> None:
    refused(make(alora_invocation_tokens=[5]), base, AdapterFormatError, "alora_invocation_tokens", "experts")


def test_an_expert_that_the_base_lacks_is_refused(make: Callable[..., Path], base: BaseSpec) -> None:
    folder = make()
    tensors = load_file(folder / TENSORS_NAME)
    key = next(key for key in tensors if ".experts.0." in key and key.endswith("lora_A.weight"))
    tensors[key.replace(".experts.0.", ".experts.4.")] = tensors[key]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / TENSORS_NAME)
    refused(folder, base, AdapterBaseError, "experts.4.")
