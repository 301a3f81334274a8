"""Describes a base model to its adapters without reading its weights.

The model is built on torch's meta device, which has shapes and no numbers, and takes the steps of
`load_model`: the gate, quantisation of the linears, replacement of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.hub import cached_file

from turret_adapters.spec import BaseSpec, ModuleKind
from turret_server.errors import ConfigError
from turret_server.kernels import NF4Weight, Ops
from turret_server.model import attention, gate, load
from turret_server.model.adapted import adapt_modules
from turret_server.model.classes import model_class
from turret_server.model.experts import ExpertsConfig, adapt_experts, has_experts
from turret_server.model.heads import read_head_weights
from turret_server.model.tensor_files import files_of_tensors


def describe_model(name_or_path: str) -> BaseSpec:
    """`LoadedModel.base` of the model that `load_model` would load.

    Raises:
        UnsupportedModelError: the gate refuses its architecture or its quantisation.
        ConfigError: the model does not exist or is unreadable.
    """
    attention.register()
    config = load.read_config(name_or_path)
    model = load.meta_model(name_or_path, config)
    load.check_attention(model)
    _quantise_shapes(model, config)
    gate.check_model(model)
    ops = cast("Ops", SimpleNamespace(pack_nf4=_not_packed))
    adapt_experts(model, ops)
    adapt_modules(model, ops)
    head_weights = read_head_weights(name_or_path, config, load.heads_of(model))
    return load.base_spec(name_or_path, model, config, head_weights)


def _quantise_shapes(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Replaces every linear that `load_model` would quantise, with the shape of its quantised weight."""
    kind = ExpertsConfig if has_experts(config) else BitsAndBytesConfig
    given = getattr(config, "quantization_config", None)
    quantizer = AutoHfQuantizer.from_config(given or load.quantization(torch.float32, kind))
    quantizer.preprocess_model(model=model, device_map=None)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state = SimpleNamespace(shape=(module.out_features, module.in_features))


def _not_packed(weight: NF4Weight) -> NF4Weight:
    return weight


class CheckpointWeights:
    """See `turret_adapters.host.BaseWeights`: the weights of a checkpoint, read one at a time.

    They are not rounded to NF4, so results differ slightly from those of a server.
    """

    def __init__(self, name_or_path: str, base: BaseSpec) -> None:
        self._name_or_path = name_or_path
        self._base = base

    def weight(self, module: str) -> torch.Tensor:
        shape = self._base.modules[module]
        found = self._read(f"{module}.weight")
        # GPT-2 stores [in, out]. A square weight may be transposed, which does not affect validation.
        if shape.kind is ModuleKind.LINEAR and found.shape != (shape.out_features, shape.in_features):
            return found.mT
        return found

    def bias(self, module: str) -> torch.Tensor | None:
        return self._read(f"{module}.bias") if self._base.modules[module].has_bias else None

    def _read(self, name: str) -> torch.Tensor:
        # Some checkpoints leave out the first component of a name.
        for key in (name, name.partition(".")[2]):
            if key in self._file_of:
                path = cached_file(self._name_or_path, self._file_of[key])
                with safe_open(path, "pt") as tensors:
                    found: torch.Tensor = tensors.get_tensor(key)
                if found.is_floating_point():
                    return found.float()
        return self._read_from_model(name)

    def _read_from_model(self, name: str) -> torch.Tensor:
        """For weights that are renamed, tied, quantised or not in safetensors files."""
        try:
            parameter = self._model.get_parameter(name)
        except AttributeError as error:
            raise ConfigError(
                f"--model {self._name_or_path}: validating the adapter needs {name}, which is not in "
                "the checkpoint under this name; load the adapter into a server instead"
            ) from error
        if isinstance(parameter, Params4bit):
            parameter = dequantize_4bit(parameter.data, parameter.quant_state)
        found: torch.Tensor = parameter.detach().float()
        return found

    @cached_property
    def _model(self) -> PreTrainedModel:
        config = load.read_config(self._name_or_path)
        return model_class(config).from_pretrained(self._name_or_path, dtype="auto")

    @cached_property
    def _file_of(self) -> Mapping[str, str]:
        return files_of_tensors(self._name_or_path)
