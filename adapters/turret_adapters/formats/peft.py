"""Reads the two files that peft writes into host memory.

The format is that of peft 0.21's `save_pretrained` with safetensors; peft itself is not needed. `kinds`
defines each kind of adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from turret_adapters.errors import AdapterFormatError, AdapterSourceError
from turret_adapters.formats.fields import Fields, parse_file, refusal, show
from turret_adapters.formats.files import (
    CONFIG_NAME,
    LABELS_NAME,
    MAX_CONFIG_BYTES,
    MAX_FILE_BYTES,
    MAX_TENSORS_BYTES,
    REVISION_LENGTH,
    TENSORS_NAME,
    TOKENIZER_NAME,
    Progress,
    config_digest,
    describe,
    head_of,
    no_progress,
    open_inside,
    refuse_other_tensors,
    resolve,
)
from turret_adapters.formats.heads import plan_head
from turret_adapters.formats.kind import Content, Kind
from turret_adapters.formats.kinds import CONVERTIBLE, KINDS
from turret_adapters.formats.layouts import layout_of_file
from turret_adapters.formats.replaced import own_vocabulary
from turret_adapters.formats.tensors import Entry, match_entries, read_header, read_tensor
from turret_adapters.formats.tokenizer import check_rows, digest_of_template, digest_of_tokens
from turret_adapters.host import BaseWeights, HostAdapter, row_groups
from turret_adapters.spec import AdapterSpec, BaseSpec, PrefixKind, PrefixSpec


def read_adapter(
    path: Path,
    base: BaseSpec,
    weights: BaseWeights,
    progress: Progress = no_progress,
    tokenizer: bytes | None = None,
    labels: bytes | None = None,
) -> HostAdapter:
    """Reads an adapter that peft saved.

    Args:
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: the base model that it must match.
        weights: the model's weights; used only after everything else is checked.
        progress: called before each tensor with the bytes read and in total.
        tokenizer: what the adapter's tokenizer changes, see `BaseTokenizer.changes`; None for what the folder
            of a revision says.
        labels: what its head's outputs are called, see `read_labels`; None as above.

    Raises:
        AdapterSourceError: there is no readable adapter at `path`.
        AdapterFormatError: the files are broken, or contain something that is not supported.
        AdapterBaseError: the files were made for another base model.
    """
    try:
        return _read_folder(resolve(str(path)), base, weights, progress, tokenizer, labels)
    except OSError as error:
        raise AdapterSourceError(
            f"{str(error.filename or path)!r}: expected a readable file, found {describe(error)}"
        ) from error


def read_kept(folder: Path, name: str) -> bytes:
    """One of `KEPT_FILES` in the folder of a revision; empty if it has none.

    Raises:
        AdapterSourceError: the file is too large, or not a regular file.
        OSError: it is unreadable.
    """
    try:
        with open_inside(folder, name, MAX_FILE_BYTES[name]) as (file, size):
            return file.read(size)
    except FileNotFoundError:
        return b""


def _read_folder(
    folder: Path,
    base: BaseSpec,
    weights: BaseWeights,
    progress: Progress,
    tokenizer: bytes | None,
    labels: bytes | None,
) -> HostAdapter:
    with open_inside(folder, CONFIG_NAME, MAX_CONFIG_BYTES) as (file, size):
        config_bytes = file.read(size)
    kind, fields = _parse_config(config_bytes)
    refuse_other_tensors(folder)
    if tokenizer is None:
        tokenizer = read_kept(folder, TOKENIZER_NAME)
    if labels is None:
        labels = read_kept(folder, LABELS_NAME)
    digest = config_digest(config_bytes)
    with open_inside(folder, TENSORS_NAME, MAX_TENSORS_BYTES) as (file, size):
        header, entries = read_header(file, size)
        layout = layout_of_file([entry.key for entry in entries], base)
        named = replace(base, modules=layout.modules)
        vocab_size = own_vocabulary({entry.key: entry.shape for entry in entries}, named)
        if vocab_size:
            named = named.resized(vocab_size)
        if tokenizer:
            check_rows(tokenizer, named.vocab_size)
        head = plan_head(fields, named, entries, labels)
        plan = kind.plan(fields, named)
        expected = {**plan.expected, **(head.expected if head else {})}
        keys = match_entries(entries, expected, named)
        digest.update(header)
        tensors: dict[str, torch.Tensor] = {}
        for entry, key in zip(entries, keys, strict=True):
            progress(entry.begin, size)
            _add_tensor(tensors, key, entry, read_tensor(file, entry, digest))
    for name, kept in ((LABELS_NAME, labels), (TOKENIZER_NAME, tokenizer)):
        if kept:
            digest.update(head_of(name, len(kept)) + kept)
    parameters = head.build(tensors) if head else {}
    content = layout.content(plan.build(tensors, layout.weights(weights)))
    spec = AdapterSpec(
        revision=digest.hexdigest()[:REVISION_LENGTH],
        method=kind.method,
        rows=row_groups(content.deltas, parameters),
        prefix=_prefix_spec(content, base),
        max_rank=content.max_rank,
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        file_bytes=len(config_bytes) + size + len(tokenizer) + len(labels),
        invocation_tokens=content.invocation_tokens,
        num_tasks=len(content.tasks),
        vocab_size=vocab_size,
        tokenizer=digest_of_tokens(tokenizer),
        chat_template=digest_of_template(tokenizer),
        head=head.spec if head else None,
    )
    return _host_adapter(spec, content, parameters)


def _add_tensor(tensors: dict[str, torch.Tensor], key: str, entry: Entry, tensor: torch.Tensor) -> None:
    if key in tensors and not torch.equal(tensors[key], tensor):
        raise AdapterFormatError(
            f"tensor {show(key)}: expected the same numbers under each of its keys, found others under "
            f"{show(entry.key)} (remove the wrong one)"
        )
    tensors[key] = tensor


def _host_adapter(spec: AdapterSpec, content: Content, head: Mapping[str, torch.Tensor]) -> HostAdapter:
    return HostAdapter(
        spec=spec,
        deltas=content.deltas,
        head=head,
        prefix_kv=content.prefix_kv,
        prompt_embeddings=content.prompt_embeddings,
        tasks=tuple(
            HostAdapter(spec=spec.of_task(task), deltas=content.deltas, head=head, prompt_embeddings=rows_NE)
            for task, rows_NE in enumerate(content.tasks)
        ),
    )


def _parse_config(data: bytes) -> tuple[Kind, Fields]:
    values = parse_file(data, CONFIG_NAME)
    peft_type = values.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in KINDS:
        hint = (
            " (`turret adapters convert` converts it to LORA)"
            if isinstance(peft_type, str) and peft_type in CONVERTIBLE
            else ""
        )
        raise refusal("peft_type", peft_type, f"one of {', '.join(KINDS)}{hint}")
    fields = Fields(values)
    fields.check(KINDS[peft_type].fields)
    return KINDS[peft_type], fields


def _prefix_spec(content: Content, base: BaseSpec) -> PrefixSpec | None:
    if content.prefix_kind is None:
        return None
    return PrefixSpec(
        num_virtual_tokens=content.num_virtual_tokens,
        kind=content.prefix_kind,
        per_request=base.is_encoder and content.prefix_kind is PrefixKind.EMBEDDING,
    )
