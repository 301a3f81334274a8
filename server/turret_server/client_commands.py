"""The commands of `turret` that speak to a running server. They need no more than the client does."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turret_client import DEFAULT_ADDRESS, AdapterRef, Client

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turret_client import Adapter, AdapterRevision, Chunk, Generation, PinnedPrompt

_INT32_MAX = 2**31 - 1
_UINT64_MAX = 2**64 - 1

server_option = click.option(
    "--server",
    metavar="HOST:PORT",
    envvar="TURRET_SERVER",
    default=DEFAULT_ADDRESS,
    show_default=True,
    show_envvar=True,
    help="Address of the server.",
)
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
cache_salt_option = click.option(
    "--cache-salt",
    default="",
    metavar="S",
    help="Share cached blocks of the prompt only with requests of the same salt, so that nobody without it "
    "learns from answering times what was asked.",
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
@click.option(
    "--max-tokens",
    type=click.IntRange(1, _INT32_MAX),
    metavar="N",
    help="Most tokens to generate. Without it: 256, or what the context leaves if that is less.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="F",
    help="0 is greedy.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="F",
    help="Sample among the likeliest tokens that together have this probability.",
)
@click.option(
    "--top-k",
    type=click.IntRange(0, _INT32_MAX),
    default=0,
    show_default=True,
    metavar="N",
    help="Sample among the N likeliest tokens; 0 is all.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, _UINT64_MAX),
    metavar="N",
    help="Same seed, prompt, adapter and options: same tokens. Without it: the server's choice.",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="S",
    help="End before this text; may be given up to 16 times.",
)
@click.option(
    "--tenant",
    metavar="NAME",
    help='For whom: tenants share the server fairly, by their weights. Without it: "default".',
)
@click.option(
    "--priority",
    type=click.IntRange(-10, 10),
    default=0,
    show_default=True,
    metavar="N",
    help="Stand in the tenant's queue as if the request had come 10 N seconds earlier; from -10 to 10.",
)
@cache_salt_option
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
    with Client(server, tenant=tenant) as client:
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


@click.group(
    epilog="""\b
Examples:
  turret adapters load pirate /srv/adapters/pirate
  turret adapters list
  turret adapters validate ./pirate --model HuggingFaceTB/SmolLM2-135M
"""
)
def adapters() -> None:
    """Load, replace, unload and look at a server's adapters; validate and convert them without one."""


@adapters.command(
    "list",
    epilog="""\b
Examples:
  turret adapters list
  turret adapters list --json | jq -r .name
""",
)
@server_option
@json_option
def list_(*, server: str, as_json: bool) -> None:
    """List all adapters in the order of their names."""
    with Client(server) as client:
        found = client.list_adapters()
    if not found and not as_json:
        click.echo("no adapters", err=True)
    else:
        print_adapters(found, as_json=as_json)


@adapters.command(
    epilog="""\b
Example:
  turret adapters load pirate /srv/adapters/pirate
"""
)
@click.argument("name")
@click.argument("path")
@server_option
@json_option
def load(name: str, path: str, *, server: str, as_json: bool) -> None:
    """Serve the peft adapter at PATH under NAME.

    PATH is a folder of the server's machine, "owner/name" or "hf://owner/name@revision" of the Hugging Face
    hub, or the URL of a folder or archive, as far as the server was started with --allow-source for it. Where
    NAME is in use it flips to the new revision at once; requests that began on the old one end on the old one.
    """
    with Client(server) as client:
        # A server on this machine has another working directory.
        here = Path(path)
        found = client.load_adapter(name, str(here.absolute()) if here.exists() else path)
        print_adapters([found], as_json=as_json)


@adapters.command(
    epilog="""\b
Example:
  turret adapters unload pirate
"""
)
@click.argument("name")
@server_option
@json_option
def unload(name: str, *, server: str, as_json: bool) -> None:
    """Take NAME away. Requests that run on it end on it; then its memory is freed."""
    with Client(server) as client:
        print_adapters([client.unload_adapter(name)], as_json=as_json)


@adapters.command(
    epilog="""\b
Example:
  turret adapters show pirate
"""
)
@click.argument("name")
@server_option
@json_option
def show(name: str, *, server: str, as_json: bool) -> None:
    """Show all that is known of one adapter."""
    with Client(server) as client:
        adapter = client.get_adapter(name)
    click.echo(to_json(adapter) if as_json else _details(adapter))


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


def print_adapters(found: Sequence[Adapter], *, as_json: bool) -> None:
    if as_json:
        for adapter in found:
            click.echo(to_json(adapter))
    else:
        click.echo(_table(found))


def to_json(result: Generation | Chunk | Adapter | PinnedPrompt) -> str:
    return json.dumps(asdict(result))


def _table(found: Sequence[Adapter]) -> str:
    words = ("NAME", "STATE", "METHOD", "REVISION")
    numbers = ("RANK", "VIRTUAL", "PARAMETERS", "FILE", "ARENA", "ACTIVE")
    return format_table(words, numbers, map(_row, found))


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


def _row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.name,
        adapter.state,
        adapter.method,
        adapter.revision[:12] or "-",
        str(adapter.max_rank or "-"),
        str(adapter.num_virtual_tokens or "-"),
        _count(adapter.num_parameters),
        format_size(adapter.file_bytes),
        format_size(adapter.arena_bytes),
        str(adapter.active_requests),
    )


def _details(adapter: Adapter) -> str:
    lines = {
        "name": adapter.name,
        "state": adapter.state,
        "method": adapter.method,
        "revision": adapter.revision or "-",
        "rank": str(adapter.max_rank or "-"),
        "virtual tokens": str(adapter.num_virtual_tokens or "-"),
        "parameters": f"{adapter.num_parameters:,}",
        "file": format_size(adapter.file_bytes),
        "arena": format_size(adapter.arena_bytes),
        "active": str(adapter.active_requests),
        "draining": ", ".join(adapter.draining_revisions) or "-",
    }
    if adapter.error:
        lines["error"] = adapter.error
    width = max(map(len, lines))
    told = [f"{key.ljust(width)}  {value}" for key, value in lines.items()]
    return "\n".join([*told, *(f"{'history'.ljust(width)}  {_history(each)}" for each in adapter.history)])


def _history(published: AdapterRevision) -> str:
    when = datetime.fromtimestamp(published.published_at, UTC).isoformat(" ", "seconds")
    return f"{when}  {published.revision}  {published.source}"


def _count(number: int) -> str:
    return _scaled(number, 1000, ("", "k", "M", "G"))


def format_size(number: int) -> str:
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB"))


def _scaled(number: int, base: int, units: Sequence[str]) -> str:
    value, power = float(number), 0
    while value >= base and power < len(units) - 1:
        value /= base
        power += 1
    return f"{value:.1f}{units[power]}" if power else f"{number}{units[0]}"
