"""`turret adapters`: administers the adapters of a running server."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from turret_cli.common import (
    connect,
    format_count,
    format_size,
    format_table,
    json_option,
    server_option,
    to_json,
)
from turret_client import TurretError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turret_client import Adapter, AdapterRevision, Client

# Between requests for the progress of a load.
_POLL_SECONDS = 0.2


@click.group(
    epilog="""\b
Examples:
  turret adapters load pirate /srv/adapters/pirate
  turret adapters list
  turret adapters validate ./pirate --model HuggingFaceTB/SmolLM2-135M
""",
    short_help="Manage adapters.",
)
def adapters() -> None:
    """Load, replace, unload and inspect adapters of a server; validate and convert adapters without one."""


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
    """List all adapters, sorted by name."""
    with connect(server) as client:
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

    PATH is a folder on the server's machine, "owner/name" or "hf://owner/name@revision" on the Hugging Face
    Hub, or the URL of a folder or an archive, if the server's --allow-source permits it. If NAME is in use,
    new requests use the new revision at once; in-flight requests finish on theirs.
    """
    with connect(server) as client:
        # A server on this machine has another working directory.
        here = Path(path)
        with _downloading(client, name):
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
    """Unload NAME. In-flight requests finish on it; then its memory is freed."""
    with connect(server) as client:
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
    """Show the details of an adapter and its history of revisions."""
    with connect(server) as client:
        adapter = client.get_adapter(name)
    click.echo(to_json(adapter) if as_json else _details(adapter))


@adapters.command(
    epilog="""\b
Examples:
  turret adapters rollback pirate
  turret adapters rollback pirate 3f9a1c07
"""
)
@click.argument("name")
@click.argument("revision", required=False)
@server_option
@json_option
def rollback(name: str, revision: str | None, *, server: str, as_json: bool) -> None:
    """Serve an earlier REVISION under NAME again.

    Later ones are removed from its history. The first 8 digits of the revision are enough. Default: the one
    before the current one. `turret adapters show NAME` lists them.
    """
    with connect(server) as client:
        print_adapters([client.rollback_adapter(name, revision)], as_json=as_json)


@adapters.command(
    epilog="""\b
Examples:
  turret adapters split pirate 3f9a1c07 --percent 10
  turret adapters split pirate --percent 0
"""
)
@click.argument("name")
@click.argument("revision", required=False, default="")
@click.option(
    "--percent",
    type=click.IntRange(0, 100),
    required=True,
    metavar="N",
    help="Percentage of requests that go to REVISION; 0 ends the split.",
)
@server_option
@json_option
def split(name: str, revision: str, percent: int, *, server: str, as_json: bool) -> None:
    """Send a percentage of NAME's requests to another REVISION.

    The revision is one of NAME's history; its first 8 digits are enough. Requests with the same --routing-key
    use the same revision.
    """
    if percent and not revision:
        raise click.UsageError(
            f"Give the REVISION for {percent} % of the requests; `turret adapters show {name}` lists them."
        )
    with connect(server) as client:
        print_adapters([client.set_traffic_split(name, revision, percent)], as_json=as_json)


@adapters.command(
    epilog="""\b
Examples:
  turret adapters upload pirate ./pirate
"""
)
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@server_option
@json_option
def upload(name: str, folder: Path, *, server: str, as_json: bool) -> None:
    """Upload the peft adapter in a local FOLDER; serve it under NAME.

    An interrupted upload of the same files is resumed.
    """
    with connect(server) as client, _Bar("Uploading") as bar:
        try:
            adapter = client.upload_adapter(name, folder, progress=bar.show)
        except OSError as error:
            raise click.BadParameter(f"{error.filename}: {str(error.strerror).lower()}") from error
    print_adapters([adapter], as_json=as_json)


class _Bar:
    """A progress bar on standard error, if that is a terminal."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._stack = ExitStack()
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, done: int, total: int) -> None:
        if self._bar is None:
            bar = click.progressbar(length=total, label=self._label, file=sys.stderr)
            self._bar = self._stack.enter_context(bar)
        # The total may grow after the bar was full.
        self._bar.length, self._bar.finished = total, False
        self._bar.update(done - self._bar.pos)


@contextmanager
def _downloading(client: Client, name: str) -> Iterator[None]:
    """Shows the progress of the server's download for `name` on a terminal, until the block ends."""
    done = threading.Event()

    def poll() -> None:
        with _Bar("Loading") as bar, suppress(TurretError):
            while not done.wait(_POLL_SECONDS):
                for each in client.list_downloads():
                    if each.name == name and each.total_bytes is not None:
                        bar.show(each.done_bytes, each.total_bytes)

    thread = threading.Thread(target=poll)
    if sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join()


@adapters.command(
    epilog="""\b
Examples:
  turret adapters watch
  turret adapters watch --json | jq -r 'select(.state == "failed").error'
"""
)
@server_option
@json_option
def watch(*, server: str, as_json: bool) -> None:
    """Print every adapter, and each again when it changes.

    Ctrl-C ends it.
    """
    with connect(server) as client:
        for adapter in client.watch_adapters():
            click.echo(to_json(adapter) if as_json else _line(adapter))


def _line(adapter: Adapter) -> str:
    draining = f"draining {', '.join(each[:12] for each in adapter.draining_revisions)}"
    parts = [adapter.name, adapter.state, adapter.revision[:12]]
    return "  ".join(filter(None, [*parts, draining if adapter.draining_revisions else "", adapter.error]))


def print_adapters(found: Sequence[Adapter], *, as_json: bool) -> None:
    if as_json:
        for adapter in found:
            click.echo(to_json(adapter))
    else:
        notes = (f"{adapter.name}: {note}" for adapter in found for note in _notes(adapter))
        click.echo("\n".join([_table(found), *notes]))


def _notes(adapter: Adapter) -> Iterator[str]:
    """What the columns of the table do not show."""
    if adapter.error:
        yield adapter.error
    if split := adapter.traffic_split:
        yield f"{split.percent} % of the requests go to {split.revision[:12]}"


def _table(found: Sequence[Adapter]) -> str:
    words = ("NAME", "STATE", "METHOD", "REVISION")
    numbers = ("RANK", "VIRTUAL", "PARAMETERS", "FILE", "ARENA", "ACTIVE")
    return format_table(words, numbers, map(_row, found))


def _row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.name,
        adapter.state,
        adapter.method,
        adapter.revision[:12] or "-",
        str(adapter.max_rank or "-"),
        str(adapter.num_virtual_tokens or "-"),
        format_count(adapter.num_parameters),
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
        "tasks": str(adapter.num_tasks or "-"),
        "vocabulary": f"{adapter.vocab_size:,} tokens" if adapter.vocab_size else "-",
        "tokenizer": "its own" if adapter.own_tokenizer else "the base model's",
        "parameters": f"{adapter.num_parameters:,}",
        "file": format_size(adapter.file_bytes),
        "arena": format_size(adapter.arena_bytes),
        "active": str(adapter.active_requests),
        "draining": ", ".join(adapter.draining_revisions) or "-",
    }
    if adapter.error:
        lines["error"] = adapter.error
    width = max(map(len, lines))
    if split := adapter.traffic_split:
        lines["split"] = f"{split.percent} % go to {split.revision}"
    rows = [f"{key.ljust(width)}  {value}" for key, value in lines.items()]
    return "\n".join([*rows, *(f"{'history'.ljust(width)}  {_history(each)}" for each in adapter.history)])


def _history(published: AdapterRevision) -> str:
    when = datetime.fromtimestamp(published.published_at, UTC).isoformat(" ", "seconds")
    return f"{when}  {published.revision}  {published.source}"
