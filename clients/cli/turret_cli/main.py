"""The command `turret`: serves a model, and talks to a server that does."""

from __future__ import annotations

from typing import Any

import click

from turret_cli import INTERRUPTED
from turret_cli.adapters import adapters
from turret_cli.bench import bench
from turret_cli.common import FailureError
from turret_cli.convert import convert
from turret_cli.generate import generate
from turret_cli.prompts import prompts
from turret_cli.serve import serve
from turret_cli.tenants import tenants
from turret_cli.validate import validate
from turret_client import InternalError, TurretError


class _Commands(click.Group):
    """Ends every command in the same way, however it fails."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except TurretError as error:
            message = str(error)
            if isinstance(error, InternalError) and error.request_id:
                message += f"; request id {error.request_id}"
            raise FailureError(message, error.reason) from error


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  turret serve --model HuggingFaceTB/SmolLM2-135M --adapters ./adapters
  turret generate --adapter pirate "Where is the treasure?"
  turret adapters list
\b
Exit status: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C.
""",
)
@click.version_option(package_name="turret")
def main() -> None:
    """One frozen 4-bit base model, thousands of hot-swappable peft adapters.

    `turret serve` runs a server; `generate`, `adapters`, `prompts` and `bench` talk to a running one.
    """


for command in (serve, generate, adapters, prompts, bench, tenants):
    main.add_command(command)
for command in (validate, convert):
    adapters.add_command(command)
