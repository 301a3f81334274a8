"""From the two files that peft writes to validated tensors in host memory.

The format is peft 0.21's `save_pretrained` with safetensors (https://github.com/huggingface/safetensors#format).
Everything is checked against the config and the base model before a tensor's bytes are read, and each byte is
read once, so what is digested is what is served. peft itself is not needed.

Shape suffixes: R rank, I in_features, O out_features, N virtual tokens, E hidden size, L layers, T keys then
values, H key-value heads, D a head's width, X any matrix.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch

from turret_adapters.errors import AdapterBaseError, AdapterError, AdapterFormatError, AdapterSourceError
from turret_adapters.peft_config import LoraConfig, VirtualTokensConfig, parse_config, parse_object, show
from turret_adapters.source import CONFIG_NAME, TENSORS_NAME, describe, open_inside, resolve
from turret_adapters.spec import AdapterSpec, BaseSpec, LoraModule, Method, PrefixKind, PrefixSpec

MAX_CONFIG_BYTES = 1 << 20
MAX_TENSORS_BYTES = 8 << 30
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 8
REVISION_LENGTH = 32
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_PICKLE_NAME = "adapter_model.bin"
_MODULE_PREFIX = "base_model.model."
_A_SUFFIX = ".lora_A.weight"
_B_SUFFIX = ".lora_B.weight"
_PROMPT_KEY = "prompt_embeddings"
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One linear's LoRA: `a_RI` is peft's lora_A, `b_RO` its lora_B transposed and contiguous."""

    a_RI: torch.Tensor
    b_RO: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAdapter:
    """An adapter in host memory, its tensors contiguous, owning their memory, in the file's dtype.

    `lora` is keyed by module path in the order of `spec.lora`. `prefix_kv` is
    [num_virtual_tokens, num_layers, 2, num_kv_heads, head_dim], keys then values, the keys without rotary
    embedding. `prompt_embeddings` is [num_virtual_tokens, hidden_size].
    """

    spec: AdapterSpec
    lora: Mapping[str, LoraWeights]
    prefix_kv: torch.Tensor | None
    prompt_embeddings: torch.Tensor | None


def read_adapter(path: Path, base: BaseSpec) -> HostAdapter:
    """Reads an adapter that peft saved.

    Args:
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: the model that it must fit.

    Raises:
        AdapterSourceError: there is no adapter at `path`, or it cannot be read.
        AdapterFormatError: the files are broken, or hold something that is not served.
        AdapterBaseError: the files were made for another base model.
    """
    try:
        return _read_folder(resolve(str(path)), base)
    except OSError as error:
        raise AdapterSourceError(
            f"{str(error.filename or path)!r}: expected a file that can be read, found {describe(error)}"
        ) from error


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in the header of a safetensors file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Expected:
    """A tensor's shape: the base model answers for dimension `base_dim`, the config for the other."""

    shape: tuple[int, int]
    base_dim: int


def _read_folder(folder: Path, base: BaseSpec) -> HostAdapter:
    with open_inside(folder, CONFIG_NAME, MAX_CONFIG_BYTES) as (file, size):
        config_bytes = file.read(size)
    config = parse_config(config_bytes)
    if isinstance(config, LoraConfig):
        modules = config.modules(base)
        expected = _expected_lora(modules)
    else:
        config.check(base)
        modules = ()
        expected = _expected_prompt(config, base)
    _refuse_pickle(folder)
    digest = hashlib.sha256(len(config_bytes).to_bytes(_LENGTH_BYTES, "little") + config_bytes)
    with open_inside(folder, TENSORS_NAME, MAX_TENSORS_BYTES) as (file, size):
        header, entries = _read_header(file, size)
        _check_entries(entries, expected, base)
        digest.update(header)
        tensors = {entry.key: _read_tensor(file, entry, digest) for entry in entries}
    file_bytes = len(config_bytes) + size
    revision = digest.hexdigest()[:REVISION_LENGTH]
    if isinstance(config, LoraConfig):
        return _lora_adapter(modules, tensors, revision, file_bytes)
    return _prompt_adapter(config, base, tensors[_PROMPT_KEY], revision, file_bytes)


def _expected_lora(modules: tuple[LoraModule, ...]) -> dict[str, _Expected]:
    expected = {}
    for module in modules:
        path = _MODULE_PREFIX + module.name
        expected[path + _A_SUFFIX] = _Expected((module.rank, module.in_features), base_dim=1)
        expected[path + _B_SUFFIX] = _Expected((module.out_features, module.rank), base_dim=0)
    return expected


def _expected_prompt(config: VirtualTokensConfig, base: BaseSpec) -> dict[str, _Expected]:
    width = base.kv_width if config.method is Method.PREFIX_TUNING else base.hidden_size
    return {_PROMPT_KEY: _Expected((config.num_virtual_tokens, width), base_dim=1)}


def _refuse_pickle(folder: Path) -> None:
    names = {place.name for place in folder.iterdir()}
    if TENSORS_NAME not in names and _PICKLE_NAME in names:
        raise AdapterFormatError(
            f"expected {TENSORS_NAME}, found {_PICKLE_NAME}, a pickle, which may run code when read (load it "
            "with peft where that is safe, then save_pretrained(path, safe_serialization=True))"
        )


def _read_header(file: BufferedReader, file_bytes: int) -> tuple[bytes, list[_Entry]]:
    """The header's bytes with its length before it, and its tensors in the order of their bytes."""
    length_bytes = file.read(_LENGTH_BYTES)
    length = int.from_bytes(length_bytes, "little")
    most = min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES)
    if length > most:
        raise AdapterFormatError(
            f"{TENSORS_NAME}: expected a safetensors header of at most {most} bytes, found {length} bytes"
        )
    header = file.read(length)
    table = parse_object(header, TENSORS_NAME)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFormatError(
            f"{TENSORS_NAME}: expected '__metadata__' to hold strings, found {show(metadata)}"
        )
    entries = sorted((_entry(*item) for item in table.items()), key=lambda entry: entry.begin)
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise AdapterFormatError(
                f"tensor {show(entry.key)}: expected its bytes to begin at {end}, found {entry.begin}"
            )
        end += entry.num_bytes
    if end != file_bytes - _LENGTH_BYTES - length:
        raise AdapterFormatError(
            f"{TENSORS_NAME}: expected {end} bytes of tensors, "
            f"found {file_bytes - _LENGTH_BYTES - length} bytes"
        )
    return length_bytes + header, entries


def _entry(key: str, value: object) -> _Entry:
    match value:
        case {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end], **others} if (
            not others and len(shape) <= MAX_DIMENSIONS and all(map(_is_size, [*shape, begin, end]))
        ):
            pass
        case _:
            raise AdapterFormatError(
                f"tensor {show(key)}: expected its dtype, shape and data_offsets, found {show(value)}"
            )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterFormatError(
            f"tensor {show(key)}: expected its dtype to be one of {', '.join(DTYPES)}, found {show(dtype)}"
        )
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != num_bytes:
        raise AdapterFormatError(
            f"tensor {show(key)}: expected {num_bytes} bytes for {dtype} {shape}, found {end - begin}"
        )
    return _Entry(key, DTYPES[dtype], tuple(shape), begin, num_bytes)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_TENSORS_BYTES


def _check_entries(entries: list[_Entry], expected: Mapping[str, _Expected], base: BaseSpec) -> None:
    for entry in entries:
        if entry.key not in expected:
            raise _unexpected(entry.key, base)
        shape, base_dim = expected[entry.key].shape, expected[entry.key].base_dim
        if entry.shape == shape:
            continue
        message = f"tensor {show(entry.key)}: expected shape {list(shape)}, found {list(entry.shape)}"
        if len(entry.shape) == len(shape) and entry.shape[base_dim] != shape[base_dim]:
            raise AdapterBaseError(
                f"{message}, where {shape[base_dim]} is a width of the base model {base.name_or_path!r}"
            )
        raise AdapterFormatError(f"{message}, where {shape[1 - base_dim]} is what {CONFIG_NAME} says")
    missing = expected.keys() - {entry.key for entry in entries}
    if missing:
        raise AdapterFormatError(
            f"tensor {show(min(missing))}: expected {len(expected)} tensors by {CONFIG_NAME}, "
            f"found all but this and {len(missing) - 1} others"
        )


def _unexpected(key: str, base: BaseSpec) -> AdapterError:
    for suffix in (_A_SUFFIX, _B_SUFFIX):
        if key.startswith(_MODULE_PREFIX) and key.endswith(suffix):
            path = key[len(_MODULE_PREFIX) : -len(suffix)]
            if path not in base.linears:
                return AdapterBaseError(
                    f"module {show(path)}: expected a linear of the base model {base.name_or_path!r}, "
                    "found none of that path"
                )
    return AdapterFormatError(
        f"tensor {show(key)}: expected only tensors of what {CONFIG_NAME} targets, found one more"
    )


def _read_tensor(file: BufferedReader, entry: _Entry, digest: hashlib._Hash) -> torch.Tensor:
    data = bytearray(entry.num_bytes)
    found = file.readinto(data)
    if found != entry.num_bytes:
        raise AdapterFormatError(
            f"tensor {show(entry.key)}: expected {entry.num_bytes} bytes, found {found} when reading"
        )
    digest.update(data)
    tensor_XX = torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)
    if not tensor_XX.isfinite().all():
        raise AdapterFormatError(
            f"tensor {show(entry.key)}: expected finite numbers, found NaN or an infinity"
        )
    return tensor_XX


def _lora_adapter(
    modules: tuple[LoraModule, ...], tensors: dict[str, torch.Tensor], revision: str, file_bytes: int
) -> HostAdapter:
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    lora = {}
    for module in modules:
        path = _MODULE_PREFIX + module.name
        a_RI, b_OR = tensors.pop(path + _A_SUFFIX), tensors.pop(path + _B_SUFFIX)
        lora[module.name] = LoraWeights(a_RI=a_RI, b_RO=b_OR.t().contiguous())
    spec = AdapterSpec(
        revision=revision,
        method=Method.LORA,
        lora=modules,
        prefix=None,
        num_parameters=num_parameters,
        file_bytes=file_bytes,
    )
    return HostAdapter(spec=spec, lora=lora, prefix_kv=None, prompt_embeddings=None)


def _prompt_adapter(
    config: VirtualTokensConfig, base: BaseSpec, rows_NX: torch.Tensor, revision: str, file_bytes: int
) -> HostAdapter:
    is_kv = config.method is Method.PREFIX_TUNING
    kind = PrefixKind.KEY_VALUE if is_kv else PrefixKind.EMBEDDING
    spec = AdapterSpec(
        revision=revision,
        method=config.method,
        lora=(),
        prefix=PrefixSpec(num_virtual_tokens=config.num_virtual_tokens, kind=kind),
        num_parameters=rows_NX.numel(),
        file_bytes=file_bytes,
    )
    if not is_kv:
        return HostAdapter(spec=spec, lora={}, prefix_kv=None, prompt_embeddings=rows_NX)
    kv_NLTHD = rows_NX.view(config.num_virtual_tokens, base.num_layers, 2, base.num_kv_heads, base.head_dim)
    return HostAdapter(spec=spec, lora={}, prefix_kv=kv_NLTHD, prompt_embeddings=None)
