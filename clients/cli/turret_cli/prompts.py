"""`turret prompts`: pins prompt prefixes in the cache of a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from turret_cli.common import (
    PromptCommand,
    adapter_option,
    connect,
    decode_prompt,
    format_table,
    json_option,
    read_stdin,
    server_option,
    to_json,
)
from turret_cli.generation_options import GENERATION_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turret_client import AdapterRef, PinnedPrompt


@click.group(
    epilog="""\b
Examples:
  turret prompts pin rules --file system-prompt.txt --adapter pirate
  turret prompts list
  turret prompts unpin rules
""",
    short_help="Pin prompts in the prefix cache.",
)
def prompts() -> None:
    """Pin prompts in the prefix cache: requests that begin with one compute only the rest.

    The cache keeps blocks of any prompt until their memory is needed; those of pinned prompts stay. Pinned
    prompts take at most half of the arena.
    """


@prompts.command(
    cls=PromptCommand,
    epilog="""\b
Examples:
  turret prompts pin rules "You are a pirate. Answer in one sentence." --adapter pirate
  turret prompts pin manual --file manual.txt
  turret prompts pin secret --cache-salt "$SECRET" - < notes.txt
""",
)
@click.argument("name")
@click.argument("text", required=False)
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Read the prompt from this file.",
)
@adapter_option
@GENERATION_OPTIONS["cache_salt"]
@GENERATION_OPTIONS["add_special_tokens"]
@server_option
@json_option
def pin(
    name: str,
    text: str | None,
    *,
    file: Path | None,
    adapter: Sequence[AdapterRef],
    cache_salt: str,
    add_special_tokens: bool | None,
    server: str,
    as_json: bool,
) -> None:
    """Compute the prompt TEXT and keep it under NAME.

    It is kept until it is unpinned, and serves requests that begin with the same tokens and use the same
    adapters, weights and cache salt. It is dropped when one of its adapters is replaced or unloaded: pin it
    again afterwards. If NAME is in use, the new prompt replaces the old one.

    Without TEXT and --file, or if TEXT is "-", the prompt is read from standard input. One trailing newline
    of a file or of standard input is removed. Only full blocks of tokens are kept; a prompt shorter than a
    block is refused.
    """
    if text is not None and file is not None:
        raise click.UsageError("Give TEXT or --file, not both.")
    if file:
        with file.open("rb") as opened:
            prompt = decode_prompt(opened, f"in {file}")
    else:
        prompt = read_stdin("TEXT", text) if text in (None, "-") else text
    with connect(server) as client:
        pinned = client.pin_prompt(
            name, prompt, adapter=adapter, cache_salt=cache_salt, add_special_tokens=add_special_tokens
        )
        _print([pinned], as_json=as_json)


@prompts.command(
    "list",
    epilog="""\b
Examples:
  turret prompts list
  turret prompts list --json | jq -r .name
""",
)
@server_option
@json_option
def list_(*, server: str, as_json: bool) -> None:
    """List pinned prompts, sorted by name."""
    with connect(server) as client:
        found = client.list_pinned_prompts()
    if not found and not as_json:
        click.echo("no pinned prompts", err=True)
    else:
        _print(found, as_json=as_json)


@prompts.command(
    epilog="""\b
Example:
  turret prompts unpin rules
"""
)
@click.argument("name")
@server_option
@json_option
def unpin(name: str, *, server: str, as_json: bool) -> None:
    """Unpin the prompt NAME.

    Its blocks are evicted when their memory is needed.
    """
    with connect(server) as client:
        client.unpin_prompt(name)
    click.echo(json.dumps({"name": name}) if as_json else f"unpinned {name}")


def _print(found: Sequence[PinnedPrompt], *, as_json: bool) -> None:
    if as_json:
        for prompt in found:
            click.echo(to_json(prompt))
    else:
        rows = [(prompt.name, prompt.revision or "-", str(prompt.prompt_tokens)) for prompt in found]
        click.echo(format_table(("NAME", "REVISION"), ("TOKENS",), rows))
