"""`turret adapters validate`: check an adapter without a server."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turret_cli.common import format_size, json_option
from turret_cli.local import format_range, model_option, read_adapter, server_code

if TYPE_CHECKING:
    from turret_adapters.host import HostAdapter
    from turret_adapters.spec import BaseSpec


@click.command(
    epilog="""\b
Examples:
  turret adapters validate ./pirate --model HuggingFaceTB/SmolLM2-135M
  turret adapters validate ./pirate --model ./llama --json | jq .arena_pages
"""
)
@click.argument("path")
@model_option
@json_option
def validate(path: str, *, model: str, as_json: bool) -> None:
    """Check whether a server would load the adapter in the folder PATH.

    Prints the adapter's method, size and memory, or why it is refused. Of the model only its configuration is
    read, and the few weights against which some adapters are checked.
    """
    with server_code("server"):
        found = _validate(Path(path), model)
    click.echo(json.dumps(found) if as_json else _describe(found))


def _validate(path: Path, model: str) -> dict[str, Any]:
    from turret_server.model.arena import Arena  # noqa: PLC0415
    from turret_server.model.describe import describe_model  # noqa: PLC0415
    from turret_server.model.load import select_device, select_dtype  # noqa: PLC0415

    base = describe_model(model)
    adapter = read_adapter(path, model, base)
    spec = adapter.spec
    device = select_device("auto")
    arena = Arena(base, 0, dtype=select_dtype("auto", device), device=device)
    pages = spec.num_pages(arena.page_elements, arena.block_size) * max(spec.num_tasks, 1)
    ranks = _ranks(adapter, base)
    return {
        "method": spec.method.value,
        "revision": spec.revision,
        "modules": dict(Counter(base.modules[module].kind.value for module in adapter.deltas)),
        "parts": dict(Counter(part.value for delta in adapter.deltas.values() for part in delta.rows)),
        "min_rank": min(ranks, default=0),
        "max_rank": max(ranks, default=0),
        "num_virtual_tokens": spec.num_virtual_tokens,
        "num_tasks": spec.num_tasks,
        "vocab_size": spec.vocab_size or 0,
        "own_tokenizer": bool(spec.tokenizer),
        "head": spec.head and spec.head.task.value,
        "labels": list(spec.head.labels) if spec.head else [],
        "problem": spec.head and spec.head.problem.value,
        "invocation_tokens": list(spec.invocation_tokens),
        "num_parameters": spec.num_parameters,
        "file_bytes": spec.file_bytes,
        "dtypes": _dtypes(path),
        "arena_pages": pages,
        "arena_bytes": pages * arena.page_bytes,
        "page_bytes": arena.page_bytes,
        "page_dtype": str(arena.flat.dtype).removeprefix("torch."),
    }


def _ranks(adapter: HostAdapter, base: BaseSpec) -> list[int]:
    from turret_adapters.spec import ModuleKind, Part  # noqa: PLC0415

    # The rows of an embedding's A, and of the head's B, are by token.
    return [
        len(delta.rows[Part.LORA_B if base.modules[module].kind is ModuleKind.EMBEDDING else Part.LORA_A])
        for module, delta in adapter.deltas.items()
        if Part.LORA_A in delta.rows
    ]


def _dtypes(path: Path) -> list[str]:
    from turret_adapters.formats.files import (  # noqa: PLC0415
        MAX_TENSORS_BYTES,
        TENSORS_NAME,
        open_inside,
        resolve,
    )
    from turret_adapters.formats.tensors import read_header  # noqa: PLC0415

    with open_inside(resolve(str(path)), TENSORS_NAME, MAX_TENSORS_BYTES) as (file, size):
        _, entries = read_header(file, size)
    return sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})


def _describe(found: dict[str, Any]) -> str:
    page = f"{format_size(found['page_bytes'])} in {found['page_dtype']}"
    lines = {
        "result": "a server would load it",
        "method": found["method"],
        "revision": found["revision"],
        "modules": ", ".join(f"{count} {kind}" for kind, count in found["modules"].items()) or "-",
        "rank": format_range([found["min_rank"], found["max_rank"]]) if found["max_rank"] else "-",
        "virtual tokens": found["num_virtual_tokens"] or "-",
        "tasks": found["num_tasks"] or "-",
        "vocabulary": f"{found['vocab_size']:,} tokens" if found["vocab_size"] else "-",
        "tokenizer": "its own" if found["own_tokenizer"] else "the base model's",
        "head": f"{found['head']}, {found['problem']}" if found["head"] else "-",
        "labels": ", ".join(found["labels"]) or "-",
        "invocation": " ".join(map(str, found["invocation_tokens"])) or "-",
        "parameters": f"{found['num_parameters']:,}",
        "file": f"{format_size(found['file_bytes'])} in {' and '.join(found['dtypes'])}",
        "arena": f"{format_size(found['arena_bytes'])}: {found['arena_pages']} pages of {page}",
    }
    width = max(map(len, lines))
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines.items())
