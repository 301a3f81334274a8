"""Loads a Hugging Face checkpoint: quantised while it is read, adapted, and cached in its quantised form."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import inspect
import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from turret_adapters.formats.files import TOKENIZER_FILES
from turret_adapters.formats.tokenizer import BaseTokenizer
from turret_adapters.spec import BaseSpec, HeadTask
from turret_adapters.store.disk import make_private
from turret_server.errors import ConfigError, UnsupportedModelError
from turret_server.kernels import Ops, has_avx512bf16, select_ops
from turret_server.model import attention, gate, rope
from turret_server.model.adapted import AdaptedLinear, adapt_modules, base_modules
from turret_server.model.checkpoint import check_type, reading
from turret_server.model.classes import is_encoder, left_out, model_class
from turret_server.model.context import current_step
from turret_server.model.encoder import Encoder, first_position, prepare_encoder, takes_prefix
from turret_server.model.experts import ExpertsConfig, adapt_experts, has_experts, is_stacked
from turret_server.model.fused import fuse
from turret_server.model.heads import Shapes, head_shapes, own_head, read_head_weights, task_prefixes
from turret_server.model.rope import ContextLength
from turret_server.model.sentence_transformers import VectorDefaults, read_vector_defaults
from turret_server.model.streams import on_device
from turret_server.model.tensor_files import files_of_tensors

log = logging.getLogger(__name__)

# Of NVIDIA's Ampere, the first GPUs that multiply bfloat16.
_MIN_CAPABILITY = (8, 0)
_POOLER_OPTION = "add_pooling_layer"
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A base model, ready to run inside `step_context`."""

    model: PreTrainedModel
    tokenizer: BaseTokenizer
    base: BaseSpec
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    context: ContextLength
    encoder: Encoder | None
    vectors: VectorDefaults
    head_weights: Mapping[str, torch.Tensor]
    vocab_size: int
    stop_token_ids: frozenset[int]


def select_device(name: str) -> torch.device:
    """`auto` selects the first GPU if there is one, `cuda` the first.

    Raises:
        ConfigError: torch finds no such CUDA device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    index = 0 if name == "auto" else torch.device(name).index or 0
    if not count:
        raise ConfigError(
            f"--device {name}: torch finds no CUDA device; use --device cpu or install a CUDA build of torch"
        )
    if index >= count:
        found = ", ".join(f"cuda:{each}" for each in range(count))
        raise ConfigError(f"--device {name}: expected a GPU that torch finds: {found}")
    return torch.device("cuda", index)


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 if the device multiplies in it, otherwise float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    # A GPU that `check_gpu` accepts does.
    return torch.bfloat16 if device.type == "cuda" or has_avx512bf16() else torch.float32


def check_gpu(device: torch.device) -> None:
    """Checks that a GPU runs the kernels.

    Raises:
        ConfigError: it is too old.
    """
    found = torch.cuda.get_device_capability(device)
    if found < _MIN_CAPABILITY:
        expected, actual = (".".join(map(str, each)) for each in (_MIN_CAPABILITY, found))
        raise ConfigError(
            f"--device {device}: {torch.cuda.get_device_name(device)} has compute capability {actual}, and "
            f"{expected} or newer is expected; use --device cpu or a newer GPU"
        )


def check_fits(name_or_path: str, num_bytes: int, device: torch.device) -> None:
    """Checks that a GPU has room for the weights.

    Raises:
        ConfigError: less memory is free.
    """
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes > free:
        wanted, missing = (f"{each / 2**20:.0f} MiB" for each in (num_bytes, num_bytes - free))
        raise ConfigError(
            f"--model {name_or_path}: its weights take {wanted}, {missing} more than is free on {device}; "
            "use a smaller model or a GPU with more memory"
        )


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """About as many bytes as a model on the meta device takes when it is loaded."""
    head = model.get_output_embeddings()
    kept = set() if head is None else {head.weight}
    linears = {module.weight for module in model.modules() if isinstance(module, nn.Linear)} - kept
    total = 0.0
    for name, parameter in model.named_parameters():
        is_quantised = parameter in linears or is_stacked(name)
        # Half a byte for a code, and a scale in float32 for each 64.
        total += parameter.numel() * (0.5 + 4 / 64 if is_quantised else dtype.itemsize)
    return int(total)


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
    name_or_path: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache: Path,
    ops: Ops | None = None,
    max_context: int | None = None,
) -> LoadedModel:
    """Loads a decoder or an encoder with its linears in NF4 and with the server's attention.

    Raises:
        UnsupportedModelError: the gate refuses its architecture or its quantisation.
        ConfigError: the model does not exist or is unreadable, `max_context` is longer than its context, or
            the GPU is too old or has too little memory.
    """
    if device.type == "cuda":
        check_gpu(device)
    attention.register()
    config = read_config(name_or_path)
    tokenizer = read_tokenizer(name_or_path)
    vectors = read_vector_defaults(name_or_path, is_encoder=is_encoder(config))
    meta = meta_model(name_or_path, config)
    gate.check_model(meta)
    context = rope.context_length(config, max_context, first_position=first_position(meta))
    if device.type == "cuda":
        check_fits(name_or_path, weight_bytes(meta, dtype), device)
    # After the gate: kernels are compiled at their first use on a machine, which takes a minute.
    ops = ops or select_ops(device, dtype)
    with on_device(device):
        model = _load_quantised(name_or_path, config, device, dtype, cache)
        adapt_experts(model, ops)
        adapt_modules(model, ops)
        fuse(model, ops)
    rope.fix(model)
    encoder = prepare_encoder(model) if is_encoder(config) else None
    if encoder is None:
        model.generation_config = _generation_config(name_or_path, model)
        model.base_model.register_forward_hook(_keep_states)
    with reading(name_or_path, "its head"):
        head_weights = read_head_weights(name_or_path, config, heads_of(model))
    if device.type == "cpu":
        _copy_from_file(model)
    _return_freed_memory()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        base=base_spec(name_or_path, model, config, head_weights),
        ops=ops,
        device=device,
        dtype=dtype,
        context=context,
        encoder=encoder,
        vectors=vectors,
        head_weights={name: weight.to(device, dtype) for name, weight in head_weights.items()},
        vocab_size=model.get_input_embeddings().weight.shape[0],
        stop_token_ids=_stop_token_ids(model, tokenizer.live),
    )


def read_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a model that the gate accepts.

    Raises:
        UnsupportedModelError: the gate refuses its architecture or its quantisation.
        ConfigError: the model does not exist or is unreadable.
    """
    with reading(name_or_path, CONFIG_NAME):
        values, _ = PreTrainedConfig.get_config_dict(name_or_path)
        check_type(name_or_path, values, CONFIG_MAPPING, transformers.__version__)
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    gate.check_config(config, model_class(config))
    return config


def read_tokenizer(name_or_path: str) -> BaseTokenizer:
    """The tokenizer of a model.

    Raises:
        ConfigError: the model has none, or it is unreadable.
    """
    with reading(name_or_path, "its tokenizer"):
        live = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        found = cached_file(name_or_path, TOKENIZER_FILES[0], _raise_exceptions_for_missing_entries=False)
    return BaseTokenizer(live, None if found is None else Path(found))


def meta_model(name_or_path: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on torch's meta device, which has shapes and no numbers.

    Raises:
        ConfigError: transformers does not build it, for example because a library of it is missing.
    """
    with reading(name_or_path, "its architecture"), torch.device("meta"):
        return model_class(config)._from_config(config, attn_implementation=attention.NAME)  # noqa: SLF001


def _load_quantised(
    name_or_path: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, cache: Path
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device},
        "attn_implementation": attention.NAME,
    }
    if getattr(config, "quantization_config", None):
        log.info("loading %s, which is quantised", name_or_path)
        with reading(name_or_path, "its weights"):
            model = _from_pretrained(name_or_path, config, options)
        _set_dtype(model, dtype)
        return model
    with suppress(OSError):  # `_save_copy` reports a cache that is not writable
        make_private(cache / "nf4")
    copy = cache / "nf4" / _cache_key(name_or_path, config, dtype)
    if copy.is_dir():
        log.info("loading %s from its quantised copy in %s", name_or_path, copy)
        with reading(name_or_path, f"its quantised copy {copy}, which can be deleted,"):
            return _from_pretrained(str(copy), config, options)
    log.info("loading %s and quantising it to NF4", name_or_path)
    kind = ExpertsConfig if has_experts(config) else BitsAndBytesConfig
    options["quantization_config"] = quantization(dtype, kind)
    with reading(name_or_path, "its weights"):
        model = _from_pretrained(name_or_path, config, options)
    _save_copy(model, copy)
    return model


def _from_pretrained(name_or_path: str, config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    kind = model_class(config)
    if _POOLER_OPTION in inspect.signature(kind).parameters and not _has_pooler(name_or_path):
        options = {**options, _POOLER_OPTION: False}
    model, found = kind.from_pretrained(
        name_or_path, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    _check_weights(model, found)
    check_attention(model)
    return model.requires_grad_(requires_grad=False)


def _has_pooler(name_or_path: str) -> bool:
    """Whether a checkpoint has an encoder's pooler; those that were trained to fill masks have none."""
    return any("pooler" in name.split(".") for name in files_of_tensors(name_or_path))


def _keep_states(module: nn.Module, inputs: object, output: Any) -> None:  # noqa: ARG001 (part of the hook)
    current_step().hidden_states.append(output[0][0])


def _check_weights(model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Transformers only warns of weights that are missing or of another shape; they have random numbers.

    Raises:
        ValueError: a weight is missing or has another shape than the configuration says.
    """
    if found["missing_keys"]:
        number, first = len(found["missing_keys"]), min(found["missing_keys"])
        raise ValueError(f"{number} weights that config.json implies are missing, such as {first}")
    wrong = {name: shape for name, shape, _ in found["mismatched_keys"]}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):  # which transformers does not compare
            shape = tuple(module.weight.quant_state.shape)
            if shape != (module.out_features, module.in_features):
                wrong[f"{name}.weight"] = shape
    for name, shape in wrong.items():
        raise ValueError(f"{name} has the shape {list(shape)}, which is not what config.json says")


def _set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Transformers leaves a checkpoint that is quantised in the dtype in which it was saved: its other
    weights, and the dtype that its linears are dequantised to.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.dtype = dtype
    for parameter in model.parameters():
        # Codes may lie in the bytes of a floating-point dtype (bnb_4bit_quant_storage).
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)


def check_attention(model: PreTrainedModel) -> None:
    """Checks that transformers accepted the server's attention.

    Raises:
        UnsupportedModelError: the model has its own.
    """
    found = model.config._attn_implementation  # noqa: SLF001
    if found != attention.NAME:
        raise UnsupportedModelError(
            f"{model.config.model_type} models are not supported: they keep the attention {found}; use a "
            "model that takes attn_implementation",
            model=model.config.model_type,
        )


def _save_copy(model: PreTrainedModel, copy: Path) -> None:
    """Saves the quantised weights; the folder gets its name when it is complete."""
    try:
        make_private(copy.parent)
        unfinished = tempfile.mkdtemp(prefix=".unfinished-", dir=copy.parent)
        try:
            # The checkpoint's own format would stack the quantised experts again.
            model.save_pretrained(unfinished, save_original_format=not has_experts(model.config))
            Path(unfinished).rename(copy)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        log.warning("the quantised copy was not saved, so the next start quantises again: %s", error)
    else:
        log.info("saved the quantised copy in %s", copy)


def _copy_from_file(model: PreTrainedModel) -> None:
    """Copies unpacked weights out of the mapped checkpoint.

    The mapping keeps all pages resident that were ever read, and truncating the file would kill the process.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _return_freed_memory() -> None:
    """Quantising and packing leave free memory that glibc keeps: a gigabyte for a model of 1.1 B."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cache_key(name_or_path: str, config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """The folder name of a quantised copy, from everything that its weights depend on: the configuration, the
    checkpoint's files or commit, the dtype and bitsandbytes' version.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern))
        source: object = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    else:
        with reading(name_or_path, CONFIG_NAME):  # from a folder that has the name of the commit
            source = [name_or_path, Path(cached_file(name_or_path, CONFIG_NAME)).parent.name]
    parts = [config.to_json_string(), source, str(dtype), bitsandbytes.__version__]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return f"{folder.name}-{digest}"


def _generation_config(name_or_path: str, model: PreTrainedModel) -> GenerationConfig:
    """That of the model's folder: the one of a quantised copy is as old as the copy."""
    with reading(name_or_path, GENERATION_CONFIG_NAME):
        found = cached_file(name_or_path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
        if found is None:
            return GenerationConfig.from_model_config(model.config)
        return GenerationConfig.from_pretrained(Path(found).parent)


def base_spec(
    name_or_path: str, model: PreTrainedModel, of_checkpoint: PreTrainedConfig, head_weights: Collection[str]
) -> BaseSpec:
    """What adapters must know of a model whose modules are adapted. Its checkpoint has these parameters of
    heads, and a configuration that names the class with which it was saved.
    """
    config = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads
    output = model.get_output_embeddings()
    heads, own = heads_of(model), own_head(of_checkpoint)
    has_own = own is not None and own.task in heads and heads[own.task].keys() <= set(head_weights)
    return BaseSpec(
        name_or_path=name_or_path,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        modules=base_modules(model),
        tied=output is not None and output.weight is model.get_input_embeddings().weight,
        left_out=left_out(model),
        is_encoder=is_encoder(model.config),
        heads=heads,
        head_weights=tuple(sorted(head_weights)),
        head=own if has_own else None,
        prefix="" if is_encoder(model.config) else model.base_model_prefix,
        task_prefixes=task_prefixes(model.config),
        takes_prefix=takes_prefix(model),
    )


def heads_of(model: PreTrainedModel) -> dict[HeadTask, Shapes]:
    """The parameters of the heads that a base model can have."""
    return head_shapes(model.config, has_pooler=getattr(model, "pooler", None) is not None)


def _stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end-of-sequence tokens of the generation config and the tokenizer's."""
    config = getattr(model, "generation_config", None)  # an encoder has none
    found = config.eos_token_id if config else None
    listed = found if isinstance(found, list) else [found]
    return frozenset(each for each in (*listed, tokenizer.eos_token_id) if each is not None)


class ModelWeights:
    """See `turret_adapters.host.BaseWeights`: the weights of a loaded model."""

    def __init__(self, model: nn.Module, ops: Ops) -> None:
        self._model = model
        self._ops = ops

    @torch.inference_mode()
    def weight(self, module: str) -> torch.Tensor:
        found = self._model.get_submodule(module)
        if not isinstance(found, AdaptedLinear):
            return found.get_parameter("weight").float().cpu()
        if isinstance(found.weight, torch.Tensor):
            return found.weight.float().cpu()
        # In any layout, the product with the identity is the weight that a step multiplies with.
        dtype = next(self._model.parameters()).dtype
        device = found.weight.data.device
        identity_II = torch.eye(found.shape.in_features, dtype=dtype, device=device)
        with on_device(device):
            return self._ops.nf4_linear(identity_II, found.weight).T.float().cpu().contiguous()

    @torch.inference_mode()
    def bias(self, module: str) -> torch.Tensor | None:
        found = self._model.get_submodule(module)
        bias = found.bias if isinstance(found, AdaptedLinear) else getattr(found, "bias", None)
        return None if bias is None else bias.float().cpu()
