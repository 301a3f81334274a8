"""The commands of `turret` that need no server, but what one needs: they read adapters themselves."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turret_cli.generate import format_size, json_option
from turret_server.errors import ConfigError

# Whatever needs torch or more is imported where it is used: `turret` also runs where only the client's
# dependencies are.
if TYPE_CHECKING:
    from turret_adapters.host import HostAdapter
    from turret_adapters.spec import BaseSpec

_model_option = click.option(
    "--model",
    required=True,
    metavar="PATH_OR_HUB_ID",
    help="Base model that it is for.",
)


class NotInstalledError(Exception):
    """A command needs what is not installed."""


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    # It warns that it did not find an optional download, which nobody here can do anything about.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("turret"):
            raise
        raise NotInstalledError(
            f'this needs {error.name}, which is not installed: pip install "turret[{extra}]"'
        ) from error


@click.command(
    epilog="""\b
Examples:
  turret adapters validate ./pirate --model HuggingFaceTB/SmolLM2-135M
  turret adapters validate ./pirate --model ./llama --json | jq .arena_pages
"""
)
@click.argument("path")
@_model_option
@json_option
def validate(path: str, *, model: str, as_json: bool) -> None:
    """Say what a server would say to the adapter in the folder PATH.

    It prints what the adapter is and what it takes, or why it is refused. Of the model only what describes it
    is read, and the few weights that some adapters are checked against.
    """
    with _needing("server"):
        found = _validate(Path(path), model)
    click.echo(json.dumps(found) if as_json else _describe(found))


@click.command(
    epilog="""\b
Examples:
  turret adapters convert ./loha ./loha-as-lora --model HuggingFaceTB/SmolLM2-135M
  turret adapters convert ./lokr ./lokr-as-lora --model ./llama --rank 64
"""
)
@click.argument("path")
@click.argument("out")
@_model_option
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rank of every module. Without it: of each the least that loses nothing.",
)
def convert(path: str, out: str, *, model: str, rank: int | None) -> None:
    """Make a LoRA adapter in the new folder OUT from the one in PATH, of a method that is not served.

    peft converts what changes a weight by adding to it, such as LoHa and LoKr. How near the result comes is
    measured and printed.
    """
    with _needing("train"):
        from turret_adapters.formats.convert import convert_adapter  # noqa: PLC0415
        from turret_server.model.describe import describe_model  # noqa: PLC0415

        base = describe_model(model)
        with _new_folder(Path(out)) as unfinished:
            modules = convert_adapter(Path(path), unfinished, model=model, rank=rank, progress=True)
            adapter = _read(unfinished, model, base)
    errors = {name: module.error for name, module in modules.items()}
    worst = max(errors, key=errors.__getitem__)
    click.echo(
        f"{len(modules)} modules of rank {_range(module.rank for module in modules.values())}, "
        f"{adapter.spec.num_parameters:,} parameters\n"
        f"relative error of the change of a weight: at most {errors[worst]:.2g} ({worst}), "
        f"mean {sum(errors.values()) / len(errors):.2g}\n"
        f"wrote {out}"
    )


@contextmanager
def _new_folder(place: Path) -> Iterator[Path]:
    """An empty folder that becomes `place` at the end, if all went well."""
    with _refusing(place):
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, "something there already")
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=place.parent))
    try:
        yield unfinished
        with _refusing(place):
            _publish(unfinished)
            unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _refusing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{place}: expected a place for a new folder, found {error.strerror}") from error


def _publish(folder: Path) -> None:
    """Temporary folders, and safetensors' files, are for nobody else to read."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


def _read(path: Path, model: str, base: BaseSpec) -> HostAdapter:
    from turret_adapters.formats.peft import read_adapter  # noqa: PLC0415
    from turret_server.model.describe import CheckpointWeights  # noqa: PLC0415

    return read_adapter(path, base, CheckpointWeights(model, base))


def _validate(path: Path, model: str) -> dict[str, Any]:
    from turret_adapters.spec import slab_layout  # noqa: PLC0415
    from turret_server.model.arena import Arena  # noqa: PLC0415
    from turret_server.model.describe import describe_model  # noqa: PLC0415
    from turret_server.model.load import select_device, select_dtype  # noqa: PLC0415

    base = describe_model(model)
    adapter = _read(path, model, base)
    spec = adapter.spec
    device = select_device("auto")
    arena = Arena(base, 0, dtype=select_dtype("auto", device), device=device)
    # As the engine's Residency counts them.
    pages = slab_layout(spec.rows, arena.page_elements).num_pages
    pages += -(-spec.num_virtual_tokens // arena.block_size)
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
    each = " for each task" if found["num_tasks"] else ""
    lines = {
        "method": found["method"],
        "revision": found["revision"],
        "modules": ", ".join(f"{count} {kind}" for kind, count in found["modules"].items()) or "-",
        "rank": _range([found["min_rank"], found["max_rank"]]) if found["max_rank"] else "-",
        "virtual tokens": found["num_virtual_tokens"] or "-",
        "tasks": found["num_tasks"] or "-",
        "invocation": " ".join(map(str, found["invocation_tokens"])) or "-",
        "parameters": f"{found['num_parameters']:,}",
        "file": f"{format_size(found['file_bytes'])} in {' and '.join(found['dtypes'])}",
        "arena": f"{format_size(found['arena_bytes'])}: {found['arena_pages']} pages of {page}{each}",
    }
    width = max(map(len, lines))
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines.items())


def _range(values: Any) -> str:
    numbers = sorted(values)
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
