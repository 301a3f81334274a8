from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turret_adapters.errors import AdapterFormatError
from turret_adapters.formats.fields import Fields
from turret_adapters.formats.kind import Rows
from turret_adapters.formats.kinds import lora
from turret_adapters.formats.parameters import find_parameters, stacked_pairs
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape, Part

HIDDEN, WIDTH = 4, 6
SHAPES = {
    "gate_up_proj": ModuleShape(kind=ModuleKind.EXPERT, in_features=HIDDEN, out_features=2 * WIDTH),
    "down_proj": ModuleShape(kind=ModuleKind.EXPERT, in_features=WIDTH, out_features=HIDDEN),
}
ROUTER = ModuleShape(kind=ModuleKind.ROUTER, in_features=HIDDEN, out_features=3)
BASE = BaseSpec(
    name_or_path="mixture",
    hidden_size=HIDDEN,
    num_layers=2,
    num_kv_heads=1,
    head_dim=4,
    modules={
        **{f"layers.{layer}.gate": ROUTER for layer in range(2)},
        **{
            f"layers.{layer}.experts.{name}.{expert}": shape
            for layer in range(2)
            for name, shape in SHAPES.items()
            for expert in range(3)
        },
    },
)


def find(*names: str) -> dict[str, list[str]]:
    return find_parameters(Fields({"target_parameters": list(names)}), BASE)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], []),
        (["experts.down_proj"], ["layers.0.experts.down_proj", "layers.1.experts.down_proj"]),
        (["layers.1.experts.gate_up_proj"], ["layers.1.experts.gate_up_proj"]),
        (["gate.weight"], ["layers.0.gate.weight", "layers.1.gate.weight"]),
    ],
)
def test_parameters_are_found_by_path_or_suffix(names, found):
    assert list(find(*names)) == found


@pytest.mark.parametrize("name", ["up_proj", "q_proj.weight", "weight.gate", "experts", "gate_up_proj.0", ""])
def test_others_are_refused_by_name(name):
    with pytest.raises(AdapterFormatError, match=rf"target_parameters.*without {name!r}"):
        find("down_proj", name)


def test_the_last_parameter_of_a_module_has_the_outermost_wrapper():
    parameters = find("down_proj", "layers.0.experts.gate_up_proj", "layers.0.gate.weight")
    pairs = stacked_pairs(parameters, BASE, [(1, 1.0)] * 4)
    assert {pair.experts[0]: pair.key for pair in pairs} == {
        "layers.0.gate": "base_model.model.layers.0.gate",
        "layers.0.experts.gate_up_proj.0": "base_model.model.layers.0.experts.base_layer",
        "layers.0.experts.down_proj.0": "base_model.model.layers.0.experts",
        "layers.1.experts.down_proj.0": "base_model.model.layers.1.experts",
    }


def test_rows_of_a_are_by_expert_and_columns_of_b_by_rank():
    [pair] = stacked_pairs(find("layers.0.experts.down_proj"), BASE, [(2, 0.5)])
    a_RI, b_OR = torch.randn(3 * 2, WIDTH), torch.randn(HIDDEN, 2 * 3)
    assert [expected.shape for expected in pair.expected.values()] == [a_RI.shape, b_OR.shape]
    rows = Rows(BASE, weights=None)
    pair.add_to(rows, dict(zip(pair.expected, (a_RI, b_OR), strict=True)))
    for expert in range(3):
        delta = rows.deltas()[f"layers.0.experts.down_proj.{expert}"]
        assert delta.scaling == 0.5
        assert torch.equal(delta.rows[Part.LORA_A], a_RI[2 * expert : 2 * expert + 2])
        assert torch.equal(delta.rows[Part.LORA_B], b_OR[:, expert::3].T)


def plan(**fields: object):
    return lora.KIND.plan(Fields({"target_parameters": ["down_proj"], **fields}), BASE)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "alora_invocation_tokens"])
def test_what_peft_has_for_modules_alone_is_refused_beside_parameters(field):
    value = [5] if field == "alora_invocation_tokens" else True
    with pytest.raises(AdapterFormatError, match=f"'{field}' to be empty beside target_parameters"):
        plan(**{field: value})


def test_a_config_may_target_parameters_alone_but_not_nothing():
    assert {pair.experts[0] for pair in plan().stacked} == {
        f"layers.{layer}.experts.down_proj.0" for layer in range(2)
    }
    assert plan().modules == ()
    with pytest.raises(AdapterFormatError, match="'target_modules' to be a list of names or a pattern"):
        plan(target_parameters=[])


@pytest.mark.parametrize(("of_modules", "of_parameters"), [(2, 5), (5, 2)])
def test_the_largest_rank_is_that_of_modules_and_parameters(of_modules, of_parameters):
    linear = ModuleShape(kind=ModuleKind.LINEAR, in_features=HIDDEN, out_features=HIDDEN)
    base = replace(BASE, modules={**BASE.modules, "layers.0.q_proj": linear})
    fields = {
        "target_modules": ["q_proj"],
        "target_parameters": ["down_proj"],
        "r": of_modules,
        "rank_pattern": {"experts.down_proj": of_parameters},
    }
    made = lora.KIND.plan(Fields(fields), base)
    tensors = {key: torch.zeros(each.shape) for key, each in made.expected.items()}
    assert made.build(tensors, None).max_rank == 5
