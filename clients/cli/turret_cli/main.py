"""The command `turret`: serves a model, and talks to a server that does."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from turret_cli import INTERRUPTED
from turret_cli.adapters import adapters
from turret_cli.bench import bench
from turret_cli.chat import chat
from turret_cli.common import FailureError, WrongUsageError
from turret_cli.convert import convert
from turret_cli.generate import generate
from turret_cli.prompts import prompts
from turret_cli.serve import serve
from turret_cli.tenants import tenants
from turret_cli.texts import classify, embed, score, tag
from turret_cli.validate import validate
from turret_client import InternalError, TurretError

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


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
            kind = WrongUsageError if error.reason == "INVALID_REQUEST" else FailureError
            raise kind(message, error.reason) from error

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.filename is None and error.errno not in _UNWRITABLE:
                raise
            FailureError(f"{error.filename or 'standard output'}: {error.strerror}").show()
            sys.exit(1)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  turret serve --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters ./adapters
  turret chat --adapter pirate
  turret generate --adapter pirate "Where is the treasure?"
  turret adapters list
\b
Exit status: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C.
""",
)
@click.version_option(package_name="turret")
def main() -> None:
    """One frozen 4-bit base model, thousands of hot-swappable peft adapters.

    `turret serve` runs a server; `chat`, `generate`, `embed`, `classify`, `tag`, `score`, `adapters`,
    `prompts` and `bench` talk to a running one.
    """


for command in (serve, chat, generate, embed, classify, tag, score, adapters, prompts, bench, tenants):
    main.add_command(command)
for command in (validate, convert):
    adapters.add_command(command)
