"""`turret adapters convert`: convert an adapter of an unsupported method to LoRA."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from turret_cli.common import FailureError
from turret_cli.local import format_range, model_option, read_adapter, server_code


@click.command(
    epilog="""\b
Examples:
  turret adapters convert ./loha ./loha-as-lora --model HuggingFaceTB/SmolLM2-135M
  turret adapters convert ./lokr ./lokr-as-lora --model ./llama --rank 64
"""
)
@click.argument("path")
@click.argument("out")
@model_option
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rank of every module. Default: for each module, the lowest rank without loss.",
)
def convert(path: str, out: str, *, model: str, rank: int | None) -> None:
    """Convert the adapter in PATH to LoRA, in the new folder OUT.

    For methods that a server does not load but whose update is added to a weight, such as LoHa and LoKr. The
    conversion error is measured and printed.
    """
    with server_code("train"):
        from turret_adapters.formats.convert import convert_adapter  # noqa: PLC0415
        from turret_server.model.describe import describe_model  # noqa: PLC0415

        base = describe_model(model)
        with _new_folder(Path(out)) as unfinished:
            modules = convert_adapter(Path(path), unfinished, model=model, rank=rank, progress=True)
            adapter = read_adapter(unfinished, model, base)
    errors = {name: module.error for name, module in modules.items()}
    worst = max(errors, key=errors.__getitem__)
    click.echo(
        f"{len(modules)} modules of rank {format_range(module.rank for module in modules.values())}, "
        f"{adapter.spec.num_parameters:,} parameters\n"
        f"relative error of the weight updates: at most {errors[worst]:.2g} ({worst}), "
        f"mean {sum(errors.values()) / len(errors):.2g}\n"
        f"wrote {out}"
    )


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is renamed to `path` when the block ends without an error."""
    with _creating(path):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it exists already")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=path.parent))
    try:
        yield unfinished
        with _creating(path):
            _publish(unfinished)
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _creating(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailureError(
            f"cannot create the folder {path}: {error.strerror}; choose another OUT"
        ) from error


def _publish(folder: Path) -> None:
    """Apply the umask: temporary folders and safetensors' files are created private."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
