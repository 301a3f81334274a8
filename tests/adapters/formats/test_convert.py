"""What peft converts is served as what it was, within the rounding of float32 at a rank that holds it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from support.models import auto_class
from turret_adapters.errors import AdapterFormatError, AdapterSourceError
from turret_adapters.formats.convert import convert_adapter
from turret_adapters.formats.files import CONFIG_NAME, TENSORS_NAME
from turret_adapters.formats.kinds.lora import MAX_RANK
from turret_adapters.formats.peft import read_adapter
from turret_adapters.spec import Method
from turret_server.model.describe import CheckpointWeights, describe_model

TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_weights": False}
CONFIGS: dict[str, tuple[Any, int]] = {
    # A product of two matrices of rank 3, number by number.
    "loha": (LoHaConfig(r=3, **TARGETS), 9),
    # A Kronecker product of an 8 × 8 matrix and one of rank 3.
    "lokr": (LoKrConfig(r=3, **TARGETS), 24),
    "loha-excluded": (LoHaConfig(r=2, exclude_modules=["layers.1.mlp.down_proj"], **TARGETS), 4),
    "lokr-layers": (LoKrConfig(r=3, layers_to_transform=[0, 2], **TARGETS), 24),
    "lokr-head": (LoKrConfig(r=3, modules_to_save=["lm_head"], **TARGETS), 24),
    "loha-multimodal": (
        LoHaConfig(r=3, **TARGETS | {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}),
        9,
    ),
}
TOKENS = torch.arange(3, 60)[None]
# Of logits of size 1 to 100: ΔW is a sum of products in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-3}


def family_of(name: str) -> str:
    return "qwen2.5-vl" if "multimodal" in name else "llama"


def load(model: Path) -> Any:
    return auto_class(AutoConfig.from_pretrained(model)).from_pretrained(model)


@pytest.fixture(scope="session")
def original(
    base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A folder with an adapter that peft saved with random numbers."""

    def make(name: str) -> Path:
        base = load(base_of(family_of(name)))
        torch.manual_seed(1)  # here, since making the base model seeds as well
        folder = tmp_path_factory.mktemp(name)
        model = get_peft_model(base, CONFIGS[name][0])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def convert(base_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    def convert(adapter: Path, family: str = "llama", **options: Any) -> Any:
        return convert_adapter(
            adapter, tmp_path, model=str(base_of(family)), **{"progress": False, **options}
        )

    return convert


@torch.inference_mode()
def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    model = load(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(TOKENS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_result_is_served_and_computes_what_the_original_does(name, original, convert, base_of, tmp_path):
    adapter = original(name)
    family = family_of(name)
    modules = convert(adapter, family)
    _, rank = CONFIGS[name]
    assert {module.rank for module in modules.values()} == {rank}
    assert all(module.error < 1e-5 for module in modules.values())
    base = base_of(family)
    expected = logits(base, adapter)
    assert (expected - logits(base, None)).abs().max() > 0.3
    torch.testing.assert_close(logits(base, tmp_path), expected, **TOLERANCE)
    described = describe_model(str(base))
    served = read_adapter(tmp_path, described, CheckpointWeights(str(base), described))
    assert (served.spec.method, served.spec.max_rank) == (Method.LORA, rank)
    assert served.deltas.keys() - {"lm_head"} == modules.keys()
    assert ("lm_head" in served.deltas) == (name == "lokr-head")


def test_a_tokenizer_goes_along(original, convert, tmp_path):
    adapter = original("loha")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    convert(adapter, rank=1)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    ]


def test_the_error_of_a_smaller_rank_is_measured(original, convert, base_of):
    adapter = original("loha")
    modules = convert(adapter, rank=4)
    model = PeftModel.from_pretrained(load(base_of("llama")), adapter)
    for name, module in modules.items():
        delta_OI = model.base_model.get_submodule(f"model.{name}").get_delta_weight("default")
        singular = torch.linalg.svdvals(delta_OI)
        assert module.rank == 4
        assert module.error == pytest.approx(float(singular[4:].norm() / singular.norm()), rel=1e-3)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix"])
def test_what_is_served_as_it_is_is_refused(kind, adapter_of, convert, tmp_path):
    with pytest.raises(
        AdapterFormatError, match="'peft_type' to be LOHA or LOKR; what is served needs no conversion"
    ):
        convert(adapter_of("llama", kind))
    assert not list(tmp_path.iterdir())


def test_what_peft_does_not_convert_is_refused(original, convert, tmp_path):
    adapter = original("loha")
    fields = json.loads((adapter / CONFIG_NAME).read_text())
    (adapter / CONFIG_NAME).write_text(json.dumps(fields | {"peft_type": "BONSAI"}))
    with pytest.raises(AdapterFormatError, match="peft does not convert"):
        convert(adapter)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_model_is_refused(original, convert, tmp_path):
    """Whose tensors peft does not find: it only warns, and would convert random numbers."""
    adapter = original("loha")
    tensors = load_file(adapter / TENSORS_NAME)
    save_file(
        {key.replace("model.layers.", "model.blocks."): each for key, each in tensors.items()},
        adapter / TENSORS_NAME,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFormatError, match=r"found some missing \(give the base model"):
            convert(adapter)
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_refused(original, convert):
    adapter = original("loha")
    (adapter / TENSORS_NAME).write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterFormatError, match="peft does not convert"):
        convert(adapter)


def test_a_pickle_is_not_read(original, convert):
    adapter = original("loha")
    (adapter / TENSORS_NAME).rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterSourceError, match=r"expected a folder with adapter_model\.safetensors"):
        convert(adapter)


@pytest.mark.parametrize("rank", [0, MAX_RANK + 1])
def test_a_rank_that_is_not_served_is_refused(rank, original, convert):
    with pytest.raises(AdapterFormatError, match=f"rank: expected 1 to {MAX_RANK}, found {rank}"):
        convert(original("loha"), rank=rank)


def test_a_rank_larger_than_the_weight_is_refused(original, convert):
    with pytest.raises(AdapterFormatError, match="larger than the weight shape"):
        convert(original("loha"), rank=65)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_where_it_is_wanted(progress, original, convert, capfd):
    adapter = original("loha")
    capfd.readouterr()
    convert(adapter, rank=1, progress=progress)
    assert ("Converting to LoRA" in capfd.readouterr().err) == progress
