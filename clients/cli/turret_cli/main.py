"""The command `turret`: serves a model, and speaks to a server that does."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from turret_adapters.errors import AdapterError
from turret_cli import adapters as adapter_commands
from turret_cli import bench as bench_command
from turret_cli import generate as client_commands
from turret_cli import offline as offline_commands
from turret_cli import prompts as prompt_commands
from turret_cli import tenants as tenant_commands
from turret_client import TurretError
from turret_server import logs
from turret_server.app.signals import StopSignals
from turret_server.config import ServerConfig, default_cache, default_store
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
    "--watch",
    is_flag=True,
    help="Load, swap and unload adapters when their folders in --adapters appear, change or vanish.",
)
@click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_store,
    show_default="$XDG_DATA_HOME/turret or ~/.local/share/turret",
    metavar="DIR",
    help="Where adapters and their names are kept: after a restart the same names serve the same revisions. "
    "Several servers may share it.",
)
@click.option(
    "--store-size",
    metavar="SIZE",
    help='Most that adapters may take in the store, such as "50GiB"; those that no name needs go first. '
    "Without it as much as the disk has.",
)
@click.option(
    "--allow-source",
    "allow_sources",
    multiple=True,
    metavar="DIR_OR_URL",
    help='Folder, or beginning of a URL such as "hf://owner" or "https://models.example.com/", that adapters '
    "may be loaded from besides --adapters; may be repeated. A server that listens on loopback alone takes "
    "any folder of the machine without it.",
)
@click.option(
    "--lazy-source",
    metavar="DIR_OR_URL",
    help="Where to look for an adapter that a request names and nobody has loaded: an absolute path or a URL "
    'with {name} in it, such as "hf://owner/{name}".',
)
@click.option(
    "--listen",
    default=_DEFAULTS["listen"],
    show_default=True,
    metavar="HOST:PORT",
    help="Where to answer gRPC. Beyond this machine only for tenants with keys, see --tenants.",
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
    "--host-memory",
    default="auto",
    show_default=True,
    callback=_none_where("auto"),
    metavar="SIZE",
    help="What adapters that are not in the arena may take of the host's memory, as for --memory. Those that "
    "find no place are read from the disk when a request names them.",
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
    "--max-step-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=_DEFAULTS["max_step_seconds"],
    show_default=True,
    metavar="SECONDS",
    help="How long a step should last at most: prompts are computed in pieces of that length, and tokens of "
    "others come between them.",
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
    help="Most requests of a tenant that wait; more are refused.",
)
@click.option(
    "--max-queue-tokens",
    type=click.IntRange(min=1),
    default=_DEFAULTS["max_queue_tokens"],
    show_default=True,
    metavar="N",
    help="Most tokens, of prompts and to generate, of a tenant's requests that wait.",
)
@click.option(
    "--tenants",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="TOML file with a table [tenants.NAME] for each tenant: keys or identities by which it is known, "
    "adapters that it may use, load and unload, its weight and its limits. It is read again when it changes. "
    "`turret tenants --help` has an example.",
)
@click.option(
    "--auth-hook",
    metavar="MODULE:FUNCTION",
    help="Python function, of a module that is installed or on PYTHONPATH, that is asked whose a call is "
    "before keys and certificates are looked at. It takes the call's metadata and the names in the client's "
    "certificate, and returns a tenant's name or None.",
)
@click.option(
    "--allow-unauthenticated",
    is_flag=True,
    help="Listen where others reach it although no tenant has a key and anybody may do everything: for a "
    "network, or a proxy, that lets nobody in.",
)
@click.option(
    "--tls-cert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="PEM file of the server's certificate and its chain. Renewed files are taken for new connections.",
)
@click.option(
    "--tls-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="PEM file of the certificate's key, without a password.",
)
@click.option(
    "--tls-client-ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="PEM file of the authority that signed the clients' certificates. With it clients must have one, "
    "and its names may be a tenant's identities.",
)
@click.option(
    "--pin",
    multiple=True,
    metavar="NAME",
    help="Adapter that is brought into the arena at once, whichever revision its name serves, and stays; may "
    "be repeated. The server reports that it serves once all of them are there.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=_DEFAULTS["grace"],
    show_default=True,
    metavar="SECONDS",
    help="How long requests that run or wait may take to finish once the server is told to stop; new ones "
    "are refused meanwhile, and a second signal ends it. Give Kubernetes 10 more as "
    "terminationGracePeriodSeconds.",
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
    help="Least severe events to log. Every request that has ended is one of level info.",
)
@click.option(
    "--log-format",
    type=click.Choice(["human", "json"]),
    default=_DEFAULTS["log_format"],
    show_default=True,
    help="Log lines for people, or one JSON object a line.",
)
@click.option(
    "--usage-log",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Append one JSON object for every request that has ended, for billing: it is on the disk before the "
    "client is told. While it cannot be written, no request is begun.",
)
@click.option(
    "--otel",
    is_flag=True,
    help="Send a trace of every request over OTLP (gRPC) to where the environment's OTEL_* variables say. "
    'Needs "turret[otel]".',
)
def serve(**settings: Any) -> None:
    """Serve a base model and its adapters until SIGINT or SIGTERM."""
    config = ServerConfig(**settings)
    logs.set_up(config.log_level, config.log_format)
    # It warns that it did not find an optional download, which nobody here can do anything about.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        # Here and not above: the other commands work where the server's dependencies are missing.
        signals = StopSignals()
        with signals.handled():
            from turret_server.app.run import serve as run  # noqa: PLC0415

            logs.take_over("transformers", "huggingface_hub")
            run(config, signals)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("turret"):
            raise
        raise _FailureError(
            f'the server needs {error.name}, which is not installed: pip install "turret[server]"'
        ) from error


main.add_command(client_commands.generate)
main.add_command(adapter_commands.adapters)
main.add_command(prompt_commands.prompts)
main.add_command(bench_command.bench)
main.add_command(tenant_commands.tenants)
adapter_commands.adapters.add_command(offline_commands.validate)
adapter_commands.adapters.add_command(offline_commands.convert)
