"""Reads `adapter_model.safetensors`: its header, the check of it, and its tensors.

The format: https://github.com/huggingface/safetensors#format. Everything else is checked before a tensor is
read, and each byte is read once, so the digest is that of the bytes that are served.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader

import torch

from turret_adapters.errors import AdapterBaseError, AdapterError, AdapterFormatError
from turret_adapters.formats.fields import parse_object, show
from turret_adapters.formats.files import CONFIG_NAME, MAX_TENSORS_BYTES, TENSORS_NAME
from turret_adapters.spec import BaseSpec

MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 8
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MODULE_PREFIX = "base_model.model."
PROMPT_PREFIX = "base_model."
PROMPT_KEY = "prompt_embeddings"
LENGTH_BYTES = 8
# Under which peft loads an adapter unless told otherwise.
_ADAPTER_NAME = "default"

# The dimension of the base model that a dimension of a tensor must equal; None if the config gives its size.
WIDTH = "a width"
VOCABULARY = "the vocabulary (save an adapter with a resized one with save_embedding_layers=True)"


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that must be (or, if `optional`, may be) in the file."""

    shape: tuple[int, ...]
    of_base: tuple[str | None, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in the header of a safetensors file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


def read_header(file: BufferedReader, file_bytes: int) -> tuple[bytes, list[Entry]]:
    """Returns the header's bytes, with the length before it, and its tensors in the order of their bytes.

    Raises:
        AdapterFormatError: it is broken, or its tensors have gaps or overlaps.
    """
    length_bytes = file.read(LENGTH_BYTES)
    length = int.from_bytes(length_bytes, "little")
    most = min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES)
    if length > most:
        raise AdapterFormatError(
            f"{TENSORS_NAME}: expected a safetensors header of at most {max(most, 0)} bytes, found {length} "
            "bytes; the file may be incomplete, copy it again"
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
    if end != file_bytes - LENGTH_BYTES - length:
        raise AdapterFormatError(
            f"{TENSORS_NAME}: expected {end} bytes of tensors, "
            f"found {file_bytes - LENGTH_BYTES - length} bytes; the file may be incomplete, copy it again"
        )
    return length_bytes + header, entries


def match_entries(entries: list[Entry], expected: Mapping[str, Expected], base: BaseSpec) -> list[str]:
    """Compares the tensors of a header with those to expect from the config and the base model.

    Returns:
        For each tensor the key by which it is expected. peft accepts a few other keys, see `saved_key`.

    Raises:
        AdapterFormatError: a tensor is missing or unexpected, or its shape contradicts the config.
        AdapterBaseError: a shape or a path contradicts the base model.
    """
    keys = [entry.key if entry.key in expected else saved_key(entry.key) for entry in entries]
    unexpected = [entry.key for entry, key in zip(entries, keys, strict=True) if key not in expected]
    if unexpected:
        raise _unexpected(unexpected, base)
    for entry, key in zip(entries, keys, strict=True):
        _check_shape(entry, expected[key], base)
    missing = [key for key, tensor in expected.items() if key not in keys and not tensor.optional]
    if missing:
        number = sum(not tensor.optional for tensor in expected.values())
        raise AdapterFormatError(
            f"tensor {show(min(missing))}: expected {number} tensors by {CONFIG_NAME}, "
            f"found all but this and {len(missing) - 1} others"
        )
    return keys


def saved_key(key: str) -> str:
    """The key that peft saves for one that it also loads: that of a model's state dict, in which an adapter
    named "default" stands in the key, and DoRA's vector is a module's weight.
    """
    names = key.split(".")
    if names[-1] == _ADAPTER_NAME:
        names.pop()
    elif names[-2:-1] == [_ADAPTER_NAME]:
        del names[-2]
    if names[-2:] == ["lora_magnitude_vector", "weight"]:
        names.pop()
    return ".".join(names)


def read_tensor(file: BufferedReader, entry: Entry, digest: hashlib._Hash) -> torch.Tensor:
    """Reads the next bytes of the file, those of `entry`, into a tensor that owns them.

    Raises:
        AdapterFormatError: the file is too short, or a number is not finite.
    """
    data = bytearray(entry.num_bytes)
    found = file.readinto(data)
    if found != entry.num_bytes:
        raise AdapterFormatError(
            f"tensor {show(entry.key)}: expected {entry.num_bytes} bytes, found the end of the file after "
            f"{found}"
        )
    digest.update(data)
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype)
    tensor_XX = torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)
    if not tensor_XX.isfinite().all():
        raise AdapterFormatError(
            f"tensor {show(entry.key)}: expected finite numbers, found NaN or an infinity"
        )
    return tensor_XX


def _entry(key: str, value: object) -> Entry:
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
    return Entry(key, DTYPES[dtype], tuple(shape), begin, num_bytes)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_TENSORS_BYTES


def _check_shape(entry: Entry, expected: Expected, base: BaseSpec) -> None:
    if entry.shape == expected.shape:
        return
    message = f"tensor {show(entry.key)}: expected shape {list(expected.shape)}, found {list(entry.shape)}"
    if len(entry.shape) != len(expected.shape):
        raise AdapterFormatError(message)
    wrong = [dim for dim, size in enumerate(expected.shape) if size != entry.shape[dim]]
    for dim in wrong:
        what = expected.of_base[dim]
        if what:
            raise AdapterBaseError(
                f"{message}, where {expected.shape[dim]} is {what} of the base model {base.name_or_path!r}"
            )
    raise AdapterFormatError(f"{message}, where {expected.shape[wrong[0]]} is what {CONFIG_NAME} says")


def _unexpected(keys: Sequence[str], base: BaseSpec) -> AdapterError:
    """The error for unexpected tensors; another one if the base has no module at the first one's key."""
    key = keys[0]
    names = key.removeprefix(MODULE_PREFIX).split(".")
    module = next((".".join(names[:end]) for end, name in enumerate(names) if name in _OF_MODULES), None)
    if key.startswith(MODULE_PREFIX) and module is not None and module not in base.modules:
        return AdapterBaseError(
            f"module {show(module)}: expected a module of the base model {base.name_or_path!r}, "
            "found none of this path (load it on the base that it was trained on)"
        )
    [(form, number)] = Counter(re.sub(r"\.\d+(?=\.)", ".*", key) for key in keys).most_common(1)
    others = f"{len(keys)} others, {number} of them like {show(form)}" if len(keys) > 1 else "another"
    return AdapterFormatError(
        f"tensor {show(key)}: expected only tensors of the modules that {CONFIG_NAME} targets, found {others}"
    )


# The names that follow a module's path in the keys of any kind.
_OF_MODULES = frozenset(
    {
        "base_layer",
        "ia3_l",
        "ln_tuning_layers",
        "lora_A",
        "lora_B",
        "lora_E",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "token_adapter",
        "vera_lambda_b",
        "vera_lambda_d",
    }
)
