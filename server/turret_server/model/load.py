"""From a Hugging Face checkpoint to a model of ours: quantised while it loads, and kept quantised."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import logging
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from turret_adapters.spec import BaseSpec
from turret_adapters.store.disk import make_private
from turret_server.errors import ConfigError, UnsupportedModelError
from turret_server.kernels import Ops, has_avx512bf16, select_ops
from turret_server.model import attention, gate
from turret_server.model.adapted import adapt_modules, base_modules
from turret_server.model.experts import ExpertsConfig, adapt_experts, has_experts

log = logging.getLogger(__name__)

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A base model ready to run inside `step_context`, and what the rest of the server must know of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: BaseSpec
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    max_context: int
    vocab_size: int
    stop_token_ids: frozenset[int]


def select_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one.

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies in it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_avx512bf16()
    return torch.bfloat16 if fast else torch.float32


def quantization(
    dtype: torch.dtype, kind: type[BitsAndBytesConfig] = BitsAndBytesConfig
) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""
    return kind(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_model(
    name_or_path: str, *, device: torch.device, dtype: torch.dtype, cache: Path, ops: Ops | None = None
) -> LoadedModel:
    """Load a causal language model with its linears in NF4 and under our attention.

    Raises:
        UnsupportedModelError: the gate refuses its architecture or its quantisation.
        ConfigError: there is no such model.
    """
    attention.register()
    ops = ops or select_ops(device, dtype)
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        if not Path(name_or_path).exists():
            hint = "no such folder here, and no such model on the hub or no way to reach it"
            raise ConfigError(f"--model {name_or_path}: {hint}") from error
        raise ConfigError(f"--model {name_or_path}: {error}") from error
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)  # noqa: SLF001
    if model_class is None:
        raise UnsupportedModelError(f"{config.model_type} is no causal language model of transformers")
    gate.check_config(config, model_class)
    with torch.device("meta"):
        gate.check_model(AutoModelForCausalLM.from_config(config))
    model = _load_quantised(name_or_path, config, device, dtype, cache)
    adapt_experts(model, ops)
    adapt_modules(model, ops)
    if device.type == "cpu":
        _leave_file(model)
    _return_freed_memory()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        base=_base_spec(name_or_path, model),
        ops=ops,
        device=device,
        dtype=dtype,
        max_context=model.config.get_text_config(decoder=True).max_position_embeddings,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        stop_token_ids=_stop_token_ids(model, tokenizer),
    )


def _load_quantised(
    name_or_path: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, cache: Path
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device},
        "attn_implementation": attention.NAME,
    }
    if getattr(config, "quantization_config", None):
        log.info("loading %s, quantised already", name_or_path)
        return _from_pretrained(name_or_path, options)
    with suppress(OSError):  # `_keep` reports a cache that is not writable
        make_private(cache / "nf4")
    kept = cache / "nf4" / _cache_key(name_or_path, config, dtype)
    if kept.is_dir():
        log.info("loading %s from its quantised copy in %s", name_or_path, kept)
        return _from_pretrained(str(kept), options)
    log.info("loading %s and quantising it to NF4", name_or_path)
    kind = ExpertsConfig if has_experts(config) else BitsAndBytesConfig
    model = _from_pretrained(name_or_path, options | {"quantization_config": quantization(dtype, kind)})
    _keep(model, kept)
    return model


def _from_pretrained(name_or_path: str, options: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    if model.config._attn_implementation != attention.NAME:  # noqa: SLF001
        raise UnsupportedModelError(f"{model.config.model_type} models keep their own attention")
    return model.eval().requires_grad_(requires_grad=False)


def _keep(model: PreTrainedModel, kept: Path) -> None:
    """Save the quantised weights under their final name only when they are whole."""
    try:
        make_private(kept.parent)
        unfinished = tempfile.mkdtemp(prefix=".unfinished-", dir=kept.parent)
        try:
            # In the checkpoint's own format, experts would not be what was quantised.
            model.save_pretrained(unfinished, save_original_format=not has_experts(model.config))
            Path(unfinished).rename(kept)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        log.warning("the quantised weights are not kept for the next start: %s", error)
    else:
        log.info("kept the quantised weights in %s", kept)


def _leave_file(model: PreTrainedModel) -> None:
    """Weights that are not packed still lie in the mapped file: all that was read of it stays resident with
    them, and a file that is cut would take the process with it.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _return_freed_memory() -> None:
    """Quantising and packing leave holes that glibc would keep: a gigabyte for a model of 1.1 B."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cache_key(name_or_path: str, config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """A name for the quantised copy that changes with the checkpoint's files, the dtype and bitsandbytes."""
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern))
        source: object = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    else:
        source = [name_or_path, config._commit_hash]  # noqa: SLF001
    parts = [config.to_json_string(), source, str(dtype), bitsandbytes.__version__]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return f"{folder.name}-{digest}"


def _base_spec(name_or_path: str, model: PreTrainedModel) -> BaseSpec:
    config = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads
    return BaseSpec(
        name_or_path=name_or_path,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        modules=base_modules(model),
        tied=bool(config.tie_word_embeddings),
    )


def _stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a text: the model's generation config says, or else its tokenizer."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])
