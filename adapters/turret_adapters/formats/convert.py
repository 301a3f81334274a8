"""Converts adapters of unsupported methods to LORA, with peft's own conversion."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from turret_adapters.errors import AdapterFormatError, AdapterSourceError
from turret_adapters.formats.fields import parse_object, refusal, show
from turret_adapters.formats.files import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    TENSORS_NAME,
    TOKENIZER_FILES,
    open_inside,
    resolve,
)
from turret_adapters.formats.kinds import KINDS
from turret_adapters.formats.kinds.lora import MAX_RANK
from turret_adapters.formats.tensors import MODULE_PREFIX

# The part of ΔW's energy that the smallest lossless rank keeps: all but the rounding of peft's sum of it.
_LOSSLESS = 1 - 2.0**-22


@dataclass(frozen=True, slots=True)
class ModuleConversion:
    """The rank of a module, and ‖ΔW − BA‖ / ‖ΔW‖ (Frobenius) of the numbers that were written."""

    rank: int
    error: float


def convert_adapter(
    adapter: Path, out: Path, *, model: str, progress: bool, rank: int | None = None
) -> Mapping[str, ModuleConversion]:
    """Writes the LORA adapter that is nearest to another adapter, and copies its tokenizer.

    Args:
        adapter: a folder with an adapter that peft saved.
        out: an empty folder for the result.
        model: the base model, a folder or an id on the hub, loaded without quantisation.
        progress: show a progress bar on standard error.
        rank: the rank of every module; by default the smallest one of each that loses only roundings (an
            error below 5e-4).

    Returns:
        The rank and the error of each module.

    Raises:
        AdapterSourceError: there is no adapter at `adapter`.
        AdapterFormatError: peft does not read or convert it, or it needs a rank that is not supported.
    """
    folder = resolve(str(adapter))
    _check_type(folder)
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise AdapterFormatError(f"rank: expected 1 to {MAX_RANK}, found {rank}")
    with warnings.catch_warnings(), torch.inference_mode():
        # peft 0.21 calls what transformers 5 deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        # peft converts the random numbers that its modules begin with.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted, config, tensors = _converted(folder, model, rank, progress=progress)
        modules = _measure(adapted, tensors)
    _check_ranks(modules)
    config.task_type = "CAUSAL_LM"
    # peft drops `exclude_modules`, and names some modules twice.
    config.target_modules = set(modules)
    config.layers_pattern = config.layers_to_transform = None
    save_file(tensors, out / TENSORS_NAME, metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(out))
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    return modules


def _check_type(folder: Path) -> None:
    with open_inside(folder, CONFIG_NAME, MAX_CONFIG_BYTES) as (file, size):
        peft_type = parse_object(file.read(size), CONFIG_NAME).get("peft_type")
    if not isinstance(peft_type, str) or peft_type in KINDS:
        raise refusal("peft_type", peft_type, "LOHA or LOKR; what is served needs no conversion")
    if not (folder / TENSORS_NAME).exists():  # peft would load a pickle instead
        raise AdapterSourceError(f"{str(folder)!r}: expected a folder with {TENSORS_NAME}, found none")


def _converted(
    folder: Path, model: str, rank: int | None, *, progress: bool
) -> tuple[peft.PeftModel, peft.LoraConfig, Mapping[str, torch.Tensor]]:
    """The adapter on its base model, and what peft makes of it."""
    try:
        is_multimodal = "text_config" in AutoConfig.from_pretrained(model).sub_configs
        auto = AutoModelForMultimodalLM if is_multimodal else AutoModelForCausalLM
        base = auto.from_pretrained(model, dtype="auto")
        adapted = peft.PeftModel.from_pretrained(base, str(folder))
        config, tensors = peft.convert_to_lora(
            adapted, _LOSSLESS if rank is None else rank, progressbar=progress
        )
    except UserWarning as error:
        raise AdapterFormatError(
            f"{str(folder)!r}: expected tensors for every module of the base model that {CONFIG_NAME} "
            "targets, found some missing (give the base model that the adapter was trained on)"
        ) from error
    # peft raises any of these for a broken adapter.
    except (
        AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise AdapterFormatError(f"peft does not convert {str(folder)!r}: {error}") from error
    return adapted, config, tensors


def _measure(adapted: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, ModuleConversion]:
    modules = {}
    for name, module in adapted.named_modules():
        a_RI = tensors.get(f"{name}.lora_A.weight")
        if not isinstance(module, BaseTunerLayer) or a_RI is None:
            continue
        delta_OI = module.get_delta_weight("default").float()
        if type(module.get_base_layer()).__name__ == "Conv1D":
            delta_OI = delta_OI.mT
        left_OI = delta_OI - tensors[f"{name}.lora_B.weight"].float() @ a_RI.float()
        error = float(left_OI.norm() / delta_OI.norm().clamp_min(torch.finfo(torch.float32).tiny))
        modules[name.removeprefix(MODULE_PREFIX)] = ModuleConversion(len(a_RI), error)
    return modules


def _check_ranks(modules: Mapping[str, ModuleConversion]) -> None:
    name, largest = max(modules.items(), key=lambda item: item[1].rank)
    if largest.rank > MAX_RANK:
        raise AdapterFormatError(
            f"module {show(name)}: expected a rank of at most {MAX_RANK} for a lossless conversion, "
            f"found {largest.rank} (choose a lower rank with --rank)"
        )
