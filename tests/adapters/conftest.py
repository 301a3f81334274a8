"""A tiny random Llama, adapters that peft itself saves for it, and files written by hand to be broken."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from turret_adapters.spec import BaseSpec, LinearShape


@dataclass(frozen=True)
class Saved:
    folder: Path
    model: Any


@dataclass(frozen=True)
class Files:
    """What stands in an adapter's two files; a test changes one thing and writes them."""

    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.fields))
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder


@contextmanager
def _warnings_of_peft() -> Iterator[None]:
    """peft 0.21 calls what transformers 5 deprecates, and warns of configs that we want to see saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def make_llama() -> Callable[[], Any]:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 -- not for tests without it

    # No two widths are alike, so that a mistaken one is seen: hidden 32, query 48, key-value 24, MLP 40.
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )

    def make() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def base(make_llama: Callable[[], Any]) -> BaseSpec:
    """As the server describes it: every linear but the output embedding."""
    model = make_llama()
    return BaseSpec(
        name_or_path="tiny-llama",
        hidden_size=model.config.hidden_size,
        num_layers=model.config.num_hidden_layers,
        num_kv_heads=model.config.num_key_value_heads,
        head_dim=model.config.head_dim,
        linears={
            name: LinearShape(in_features=module.in_features, out_features=module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        },
    )


@pytest.fixture(scope="session")
def save(make_llama: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    from peft import get_peft_model  # noqa: PLC0415 -- not for tests without it

    def save(config: Any, *, dtype: torch.dtype = torch.float32) -> Saved:
        torch.manual_seed(1)
        with _warnings_of_peft():
            model = get_peft_model(make_llama().to(dtype), config, autocast_adapter_dtype=False)
            model = model.to(dtype).eval()
            folder = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(str(folder))
        return Saved(folder, model)

    return save


@pytest.fixture(scope="session")
def load(make_llama: Callable[[], Any]) -> Callable[[Path], Any]:
    """Loads an adapter as peft's users do."""
    from peft import PeftModel  # noqa: PLC0415 -- not for tests without it

    def load(folder: Path) -> Any:
        with _warnings_of_peft():
            return PeftModel.from_pretrained(make_llama(), str(folder))

    return load


def _files(saved: Saved) -> Files:
    return Files(
        json.loads((saved.folder / "adapter_config.json").read_text()),
        load_file(saved.folder / "adapter_model.safetensors"),
    )


@pytest.fixture(scope="session")
def _sound_files(save: Callable[..., Saved]) -> dict[str, Files]:
    from peft import (  # noqa: PLC0415 -- not for tests without it
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
    )

    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    return {
        "LORA": _files(save(lora)),
        "PREFIX_TUNING": _files(save(PrefixTuningConfig(**virtual))),
        "PROMPT_TUNING": _files(save(PromptTuningConfig(**virtual))),
        "P_TUNING": _files(save(PromptEncoderConfig(**virtual))),
    }


@pytest.fixture
def sound(_sound_files: dict[str, Files]) -> dict[str, Files]:
    """For each method a sound adapter, the test's own copy."""
    return copy.deepcopy(_sound_files)
