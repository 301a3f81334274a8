"""`turret generate`: generate text on a running server."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from turret_cli.common import (
    PromptCommand,
    adapter_option,
    connect,
    json_option,
    read_stdin,
    server_option,
    to_json,
)
from turret_cli.generation_options import generation_options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turret_client import Chunk


@click.command(
    cls=PromptCommand,
    epilog="""\b
Examples:
  turret generate "Once upon a time"
  turret generate --adapter pirate --temperature 0.8 --seed 7 --stop "." "Where is the treasure?"
  turret generate --adapter pirate=0.7 --adapter formal=0.3 "Where is the treasure?"
  turret generate --adapter summary --no-stream --json < report.txt
  turret generate --tenant acme --priority -5 --cache-salt "$SECRET" "Once upon a time"
""",
)
@click.argument("prompt", required=False)
@adapter_option
@server_option
@generation_options
@click.option(
    "--no-stream",
    is_flag=True,
    help="Print nothing until the generation has finished; so it is with --n above 1, unless with --json.",
)
@json_option
def generate(prompt: str | None, *, server: str, no_stream: bool, as_json: bool, **options: Any) -> None:
    """Generate text from PROMPT and print it as it arrives.

    Without PROMPT, or if it is "-", the prompt is read from standard input; one trailing newline is removed.
    Ctrl-C cancels the request.
    """
    text = read_stdin("PROMPT", prompt) if prompt in (None, "-") else prompt
    _explain_escapes(options["stop"])
    with connect(server) as client:
        several = (options["n"] or 1) > 1
        if no_stream or (several and not as_json):
            generation = client.generate(text, **options)
            texts = [choice.text for choice in generation.choices] or [generation.text]
            click.echo(to_json(generation) if as_json else "\n---\n".join(texts))
            return
        chunks = client.stream(text, **options)
        if as_json:
            for chunk in chunks:
                click.echo(to_json(chunk))
        else:
            _print_stream(chunks)


def _explain_escapes(stop: Iterable[str]) -> None:
    """A stop string of escapes is sent as it is, and is hardly meant so."""
    for each in stop:
        if re.fullmatch(r"(\\[nrt])+", each):
            click.echo(
                f"note: --stop {each} is a backslash and a letter; for a line break write --stop $'{each}'",
                err=True,
            )


def _print_stream(chunks: Iterable[Chunk]) -> None:
    began = False
    try:
        for chunk in chunks:
            click.echo(chunk.text, nl=False)
            began = True
    finally:
        if began:
            click.echo()
