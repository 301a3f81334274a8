"""What a base model is to its adapters, told without its weights.

The model is built on torch's meta device, which holds shapes and no numbers, and goes through the steps of
`load_model`: the gate, the replacement of linears by 4-bit ones, the replacement of those by ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.hub import cached_file

from turret_adapters.spec import BaseSpec, ModuleKind
from turret_server.errors import ConfigError, UnsupportedModelError
from turret_server.kernels import NF4Weight, Ops
from turret_server.model import attention, gate, load
from turret_server.model.adapted import adapt_modules
from turret_server.model.experts import ExpertsConfig, adapt_experts, has_experts

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def describe_model(name_or_path: str) -> BaseSpec:
    """What `load_model` would say of the model to its adapters.

    Raises:
        UnsupportedModelError: the gate refuses its architecture or its quantisation.
        ConfigError: there is no such model.
    """
    attention.register()
    config, model_class = _read_config(name_or_path)
    gate.check_config(config, model_class)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    if model.config._attn_implementation != attention.NAME:  # noqa: SLF001 (as load_model)
        raise UnsupportedModelError(f"{config.model_type} models keep their own attention")
    _quantise_shapes(model, config)
    gate.check_model(model)
    ops = cast("Ops", SimpleNamespace(pack_nf4=_packed_already))
    adapt_experts(model, ops)
    adapt_modules(model, ops)
    return load._base_spec(name_or_path, model)  # noqa: SLF001


def _read_config(name_or_path: str) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        if not Path(name_or_path).exists():
            hint = "no such folder here, and no such model on the hub or no way to reach it"
            raise ConfigError(f"--model {name_or_path}: {hint}") from error
        raise ConfigError(f"--model {name_or_path}: {error}") from error
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)  # noqa: SLF001
    if model_class is None:
        raise UnsupportedModelError(f"{config.model_type} is no causal language model of transformers")
    return config, model_class


def _quantise_shapes(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Let every linear that would be quantised look as if it had been."""
    kind = ExpertsConfig if has_experts(config) else BitsAndBytesConfig
    given = getattr(config, "quantization_config", None)
    quantizer = AutoHfQuantizer.from_config(given or load.quantization(torch.float32, kind))
    quantizer.preprocess_model(model=model, device_map=None)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state = SimpleNamespace(shape=(module.out_features, module.in_features))


def _packed_already(weight: NF4Weight) -> NF4Weight:
    return weight


class CheckpointWeights:
    """See `turret_adapters.host.BaseWeights`: those of a checkpoint, read one at a time and not quantised.

    So what is computed with them is not quite what a server would serve, which rounds them to NF4 first.
    """

    def __init__(self, name_or_path: str, base: BaseSpec) -> None:
        self._name_or_path = name_or_path
        self._base = base

    def weight(self, module: str) -> torch.Tensor:
        shape = self._base.modules[module]
        found = self._read(f"{module}.weight")
        # GPT-2 stores [in, out]. A square weight does not tell, nor does it matter to what is validated.
        if shape.kind is ModuleKind.LINEAR and found.shape != (shape.out_features, shape.in_features):
            return found.mT
        return found

    def bias(self, module: str) -> torch.Tensor | None:
        return self._read(f"{module}.bias") if self._base.modules[module].has_bias else None

    def _read(self, name: str) -> torch.Tensor:
        # Of some models the checkpoint leaves the first name out.
        for key in (name, name.partition(".")[2]):
            if key in self._file_of:
                place = cached_file(self._name_or_path, self._file_of[key])
                with safe_open(place, "pt") as tensors:
                    found: torch.Tensor = tensors.get_tensor(key)
                if found.is_floating_point():
                    return found.float()
        return self._read_from_model(name)

    def _read_from_model(self, name: str) -> torch.Tensor:
        """What has another name in the checkpoint, is tied, quantised, or in no safetensors."""
        try:
            parameter = self._model.get_parameter(name)
        except AttributeError as error:
            raise ConfigError(
                f"--model {self._name_or_path}: the adapter can be validated only with {name}, which "
                "transformers loads under another name; load the adapter into a server instead"
            ) from error
        if isinstance(parameter, Params4bit):
            parameter = dequantize_4bit(parameter.data, parameter.quant_state)
        found: torch.Tensor = parameter.detach().float()
        return found

    @cached_property
    def _model(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._name_or_path, dtype="auto")
        return model

    @cached_property
    def _file_of(self) -> Mapping[str, str]:
        index = self._find(_INDEX)
        if index:
            files: Mapping[str, str] = json.loads(Path(index).read_text())["weight_map"]
            return files
        whole = self._find(_WHOLE)
        if not whole:
            return {}
        with safe_open(whole, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), _WHOLE)

    def _find(self, file: str) -> str | None:
        found: str | None = cached_file(self._name_or_path, file, _raise_exceptions_for_missing_entries=False)
        return found
