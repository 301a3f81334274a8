"""The command `turret`: serves a model, and speaks to a server that does."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from turret_adapters.errors import AdapterError
from turret_client import TurretError
from turret_server import client_commands, offline_commands
from turret_server.config import ServerConfig, default_cache
from turret_server.errors import TurretError as ServerError

if TYPE_CHECKING:
    from collections.abc import Callable

_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended: 128 + SIGINT
_DEFAULTS = {field.name: field.default for field in fields(ServerConfig)}


class _FailureError(click.ClickException):
    """A command that did not succeed, told in one line."""

    def __init__(self, message: str, reason: str = "") -> None:
        line = " ".join(message.split())
        super().__init__(f"{line} ({reason})" if reason else line)

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=True)


class _Commands(click.Group):
    """Ends every command in the same way, however it fails."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)
        except (TurretError, ServerError, AdapterError) as error:
            raise _FailureError(str(error), error.reason) from error
        except offline_commands.NotInstalledError as error:
            raise _FailureError(str(error)) from error


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  turret serve --model HuggingFaceTB/SmolLM2-135M --adapters ./adapters
  turret generate --adapter pirate "Where is the treasure?"
  turret adapters list
""",
)
@click.version_option(package_name="turret")
def main() -> None:
    """One frozen 4-bit base model, thousands of hot-swappable peft adapters.

    `turret serve` is the server; the other commands speak to one that runs, here or elsewhere.
    """


def _none_where(word: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    def callback(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
        return None if value == word else value

    return callback


@main.command(
    epilog="""\b
Examples:
  turret serve --model HuggingFaceTB/SmolLM2-135M
  turret serve --model ./llama --adapters ./adapters --device cuda --memory 0.8
  turret serve --model ./llama --listen 0.0.0.0:50051 --metrics none
"""
)
@click.option("--model", required=True, metavar="PATH_OR_HUB_ID", help="Base model.")
@click.option(
    "--adapters",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder whose subfolders are adapters to load at the start, each under its folder's name.",
)
@click.option(
    "--listen",
    default=_DEFAULTS["listen"],
    show_default=True,
    metavar="HOST:PORT",
    help="Where to answer gRPC. Whoever reaches it may use the server: there are no passwords.",
)
@click.option(
    "--metrics",
    default=_DEFAULTS["metrics"],
    show_default=True,
    callback=_none_where("none"),
    metavar="HOST:PORT",
    help='Where to answer Prometheus under /metrics; "none" switches it off.',
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default=_DEFAULTS["device"],
    show_default=True,
    help="Where to compute.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default=_DEFAULTS["dtype"],
    show_default=True,
    help="What to compute in. The base model's weights are NF4 in any case.",
)
@click.option(
    "--memory",
    default="auto",
    show_default=True,
    callback=_none_where("auto"),
    metavar="SIZE",
    help='Arena for KV blocks and adapters: a size such as "2GiB", or a fraction of the free memory of '
    'the device such as "0.5".',
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(min=1),
    default=_DEFAULTS["max_batch_tokens"],
    show_default=True,
    metavar="N",
    help="Most tokens in one step.",
)
@click.option(
    "--max-batch-requests",
    type=click.IntRange(min=1),
    default=_DEFAULTS["max_batch_requests"],
    show_default=True,
    metavar="N",
    help="Most requests that run at once.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    default=_DEFAULTS["max_queue"],
    show_default=True,
    metavar="N",
    help="Most requests that wait; more are refused.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_cache,
    show_default="$XDG_CACHE_HOME/turret or ~/.cache/turret",
    metavar="DIR",
    help="Where quantised weights are kept for the next start.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default=_DEFAULTS["log_level"],
    show_default=True,
    help="Least severe events to log.",
)
def serve(**settings: Any) -> None:
    """Serve a base model and its adapters until SIGINT or SIGTERM."""
    config = ServerConfig(**settings)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # It warns that it did not find an optional download, which nobody here can do anything about.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        # Here and not above: the other commands work where the server's dependencies are missing.
        from turret_server.serve import serve as run  # noqa: PLC0415

        run(config)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("turret"):
            raise
        raise _FailureError(
            f'the server needs {error.name}, which is not installed: pip install "turret[server]"'
        ) from error


main.add_command(client_commands.generate)
main.add_command(client_commands.adapters)
client_commands.adapters.add_command(offline_commands.validate)
client_commands.adapters.add_command(offline_commands.convert)
