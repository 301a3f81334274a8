"""What the commands share: the connection to a server, errors, and output."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import click

from turret_client import DEFAULT_ADDRESS, AdapterRef, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from turret_client import Adapter, Chunk, ConnectionOptions, Generation, PinnedPrompt

_Command = TypeVar("_Command", bound="Callable[..., Any]")

_CONNECTION = "turret_cli.connection"
_MAX_PROMPT_BYTES = 4 << 20


class FailureError(click.ClickException):
    """A command failed. One line says why, and the exit status is 1."""

    def __init__(self, message: str, reason: str = "") -> None:
        line = " ".join(message.split())
        super().__init__(f"{line} ({reason})" if reason else line)

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=True)


class WrongUsageError(FailureError):
    """An argument or a setting is invalid: the exit status is 2, as where click finds that."""

    exit_code = 2


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep an option for `connection_options`, so that commands need not pass it on."""
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
        help="API key. Prefer the variable: arguments show in `ps`.",
    ),
    click.option(
        "--tls",
        is_flag=True,
        expose_value=False,
        callback=_keep,
        help="Use TLS and trust gRPC's default authorities; the other --tls options imply it.",
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
        help="PEM file of the private key of --tls-cert.",
    ),
    click.option(
        "--tenant",
        metavar="NAME",
        expose_value=False,
        callback=_keep,
        help='Tenant of the call. Default: the tenant of the API key, or "default".',
    ),
]


def server_option(command: _Command) -> _Command:
    """Add the options that name a server and how to connect to it; see `connection_options`."""
    for option in reversed(_server_options):
        command = option(command)
    return command


def connection_options() -> ConnectionOptions:
    """The connection options of the running command."""
    options = click.get_current_context().meta.get(_CONNECTION, {})
    if ("cert" in options) != ("key" in options):
        raise click.UsageError("Give --tls-cert and --tls-key together.")
    return cast("ConnectionOptions", options)


def connect(server: str) -> Client:
    """A client with the connection options. Its `with` block cancels the call, however the block is left."""
    return Client(server, **connection_options())


class PromptCommand(click.Command):
    """A command with a prompt as its last argument. Says how to write one that the shell or click takes for
    something else.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        try:
            super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(
                f"{error.format_message()} A prompt that begins with a dash goes after --, at the end.", ctx
            ) from error
        if ctx.args and not ctx.resilient_parsing:
            ctx.fail("Got words after the prompt; quote a prompt of several words.")
        return ctx.args


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")


def adapter_ref(value: str) -> AdapterRef:
    """From NAME, NAME#TASK, NAME=WEIGHT or NAME#TASK=WEIGHT, where NAME may have a revision."""
    named, has_weight, weight = value.partition("=")
    name, has_task, task = named.partition("#")
    try:
        return AdapterRef(
            name=name, weight=float(weight) if has_weight else 1.0, task=int(task) if has_task else None
        )
    except ValueError as error:
        raise click.BadParameter(f"expected NAME[@REVISION][#TASK][=WEIGHT], found {value!r}") from error


adapter_option = click.option(
    "--adapter",
    multiple=True,
    callback=lambda _ctx, _param, values: [adapter_ref(value) for value in values],
    metavar="NAME[@REVISION][#TASK][=WEIGHT]",
    help="Adapter to use; repeat it to compose several. Without it: the base model.",
)


def read_stdin(argument: str, given: str | None) -> str:
    """The prompt from standard input, for an argument that is missing or "-"."""
    if given is None and sys.stdin.isatty():
        raise click.UsageError(f"Give {argument}, or pipe it in.")
    return decode_prompt(sys.stdin.buffer, "on standard input")


def decode_prompt(file: IO[bytes], where: str) -> str:
    """The prompt in a file, which is read no further than a server would take it."""
    data = file.read(_MAX_PROMPT_BYTES + 1)
    if len(data) > _MAX_PROMPT_BYTES:
        raise click.UsageError(
            f"The prompt {where} is larger than 4 MiB, which is the most that servers accept."
        )
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"The prompt {where} is not UTF-8.") from error


def biases(_ctx: click.Context, _param: click.Parameter, values: Sequence[str]) -> dict[int, float]:
    """From several ID=F."""
    found = {}
    for value in values:
        token_id, _, bias = value.partition("=")
        try:
            found[int(token_id)] = float(bias)
        except ValueError as error:
            raise click.BadParameter(f"expected ID=F, found {value!r}") from error
    return found


def to_json(result: Generation | Chunk | Adapter | PinnedPrompt) -> str:
    """Bytes become lists of numbers."""
    return json.dumps(asdict(result), default=list)


def format_table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these titles; columns of words are aligned left, those of numbers right."""
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
