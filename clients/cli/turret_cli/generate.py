"""The commands of `turret` that speak to a running server. They need no more than the client does."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from turret_cli.generation_options import generation_options
from turret_client import DEFAULT_ADDRESS, AdapterRef, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from turret_client import (
        Adapter,
        Chunk,
        ConnectionOptions,
        Generation,
        PinnedPrompt,
    )

_Command = TypeVar("_Command", bound="Callable[..., Any]")

_CONNECTION = "turret_server.connection"


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Every command that speaks to a server has these, and only the connection needs them."""
    if value and param.name:
        ctx.meta.setdefault(_CONNECTION, {})[param.name] = value


_file = click.Path(exists=True, dir_okay=False, path_type=Path)
_server_options = [
    click.option(
        "--server",
        metavar="HOST:PORT",
        envvar="TURRET_SERVER",
        default=DEFAULT_ADDRESS,
        show_default=True,
        show_envvar=True,
        help="Address of the server.",
    ),
    click.option(
        "--api-key",
        metavar="KEY",
        envvar="TURRET_API_KEY",
        show_envvar=True,
        expose_value=False,
        callback=_keep,
        help="By which the server knows the tenant. The variable keeps it out of the list of processes.",
    ),
    click.option(
        "--tls",
        is_flag=True,
        expose_value=False,
        callback=_keep,
        help="Encrypt, and trust the authorities that gRPC trusts; the others of these imply it.",
    ),
    click.option(
        "--tls-ca",
        "ca",
        type=_file,
        metavar="FILE",
        expose_value=False,
        callback=_keep,
        help="PEM file of the authority that signed the server's certificate.",
    ),
    click.option(
        "--tls-cert",
        "cert",
        type=_file,
        metavar="FILE",
        expose_value=False,
        callback=_keep,
        help="PEM file of this client's certificate.",
    ),
    click.option(
        "--tls-key",
        "key",
        type=_file,
        metavar="FILE",
        expose_value=False,
        callback=_keep,
        help="PEM file of its key.",
    ),
]


def server_option(command: _Command) -> _Command:
    """Which server, and how to come to it: see `connection_options`."""
    for option in reversed(_server_options):
        command = option(command)
    return command


def connection_options() -> ConnectionOptions:
    """What the command that runs was told about the way to the server."""
    return cast("ConnectionOptions", click.get_current_context().meta.get(_CONNECTION, {}))


def connect(server: str, *, tenant: str | None = None) -> Client:
    return Client(server, **connection_options() | {"tenant": tenant})


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")


def _adapter_ref(value: str) -> AdapterRef:
    """From NAME, NAME#TASK, NAME=WEIGHT or NAME#TASK=WEIGHT."""
    named, _, weight = value.partition("=")
    name, _, task = named.partition("#")
    try:
        return AdapterRef(
            name=name, weight=float(weight) if weight else 1.0, task=int(task) if task else None
        )
    except ValueError as error:
        raise click.BadParameter(f"expected NAME[#TASK][=WEIGHT], found {value!r}") from error


adapter_option = click.option(
    "--adapter",
    multiple=True,
    callback=lambda _ctx, _param, values: [_adapter_ref(value) for value in values],
    metavar="NAME[#TASK][=WEIGHT]",
    help="Adapter to use; several are composed. Without it: the base model.",
)


@click.command(
    epilog="""\b
Examples:
  turret generate "Once upon a time"
  turret generate --adapter pirate --temperature 0.8 --seed 7 --stop "." "Where is the treasure?"
  turret generate --adapter pirate=0.7 --adapter formal=0.3 "Where is the treasure?"
  turret generate --adapter summary --no-stream --json < report.txt
  turret generate --tenant acme --priority -5 --cache-salt "$SECRET" "Once upon a time"
"""
)
@click.argument("prompt", required=False)
@adapter_option
@server_option
@generation_options
@click.option(
    "--tenant",
    metavar="NAME",
    help='Tenant of the request. Default: the tenant of the API key, or "default".',
)
@click.option("--no-stream", is_flag=True, help="Print nothing until the generation has finished.")
@json_option
def generate(
    prompt: str | None, *, server: str, tenant: str | None, no_stream: bool, as_json: bool, **options: Any
) -> None:
    """Generate text after PROMPT and print it as it comes.

    Without PROMPT, or where it is "-", the prompt is read from standard input, less one newline at its end.
    Ctrl-C cancels the request.
    """
    text = read_stdin(prompt) if prompt in (None, "-") else prompt
    with connect(server, tenant=tenant) as client:
        if no_stream:
            generation = client.generate(text, **options)
            click.echo(to_json(generation) if as_json else generation.text)
            return
        with closing(client.stream(text, **options)) as chunks:
            if as_json:
                for chunk in chunks:
                    click.echo(to_json(chunk))
            else:
                _print_stream(chunks)


def read_stdin(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("Give a PROMPT, or pipe one in.")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError("The prompt on standard input is not UTF-8.") from error


def _print_stream(chunks: Iterable[Chunk]) -> None:
    began = False
    try:
        for chunk in chunks:
            click.echo(chunk.text, nl=False)
            began = True
    finally:
        if began:
            click.echo()


def to_json(result: Generation | Chunk | Adapter | PinnedPrompt) -> str:
    return json.dumps(asdict(result))


def format_table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns with these titles, those of words to the left and those of numbers to the right."""
    rows = [(*words, *numbers), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < len(words) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def format_count(number: int) -> str:
    return _scaled(number, 1000, ("", "k", "M", "G"))


def format_size(number: int) -> str:
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB"))


def _scaled(number: int, base: int, units: Sequence[str]) -> str:
    value, power = float(number), 0
    while value >= base and power < len(units) - 1:
        value /= base
        power += 1
    return f"{value:.1f}{units[power]}" if power else f"{number}{units[0]}"
