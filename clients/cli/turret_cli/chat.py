"""`turret chat`: talk to a model on a running server."""

from __future__ import annotations

import json
import random
import sys
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from turret_cli.common import adapter_option, adapter_ref, connect, server_option
from turret_cli.generation_options import generation_options
from turret_client import TurretError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turret_client import AdapterRef, Client

_HELP = """\
/adapter NAME...   answer with these adapters from now on; without NAME: with the base model
/system TEXT       set the system message; without TEXT: remove it
/retry             answer the last message again
/clear             begin a new chat
/help              show this
Ctrl-C stops an answer, Ctrl-D ends the program. A message that begins with a slash is written with two."""


def _arguments(_ctx: click.Context, _param: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    with suppress(ValueError):
        found = json.loads(value)
        if isinstance(found, dict):
            return found
    raise click.BadParameter(f"expected a JSON object, found {value!r}")


@click.command(
    epilog="""\b
Examples:
  turret chat
  turret chat --adapter pirate --system "Answer in one sentence." --temperature 0.8
  echo "What is the capital of France?" | turret chat
"""
)
@click.option("--system", metavar="TEXT", help="System message at the beginning of the chat.")
@click.option(
    "--template-arguments",
    metavar="JSON",
    callback=_arguments,
    help="""Further variables of the chat template, such as '{"enable_thinking": false}'.""",
)
@adapter_option
@server_option
@generation_options
def chat(*, server: str, system: str | None, adapter: list[AdapterRef], **options: Any) -> None:
    """Chat with the model, or with adapters of it.

    Each line of standard input is a message, and each answer is printed as it arrives; the chat so far is
    part of the prompt, which the chat template makes: the model's, or that of the first adapter whose folder
    has another one. /help lists the commands. If standard input is not a terminal, only answers are printed,
    and the first error ends the program.
    """
    if (options["n"] or 1) > 1:
        raise click.UsageError("A chat goes on with one answer; leave --n out.")
    is_terminal = sys.stdin.isatty()
    with connect(server) as client:
        session = _Session(client, options, adapter, system, shows_reasoning=is_terminal)
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401, PLC0415 -- lines are edited and recalled; not on every system
            click.echo("/help lists the commands.", err=True)
        for line in _lines(is_terminal=is_terminal):
            try:
                session.take(line)
            except TurretError as error:
                if not is_terminal:
                    raise
                click.echo(f"error: {error}", err=True)


def _lines(*, is_terminal: bool) -> Iterator[str]:
    """The lines of standard input that are not empty."""
    was_interrupted = False
    while True:
        try:
            if was_interrupted:
                click.echo("\n(Ctrl-D ends the program)", err=True)
            was_interrupted = False
            line = input("> ") if is_terminal else _next_line()
        except EOFError:
            if is_terminal:
                click.echo()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            was_interrupted = True
            continue
        if line.strip():
            yield line.strip()


def _next_line() -> str:
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError("A line of standard input is not UTF-8.") from error


@dataclass
class _Session:
    """A chat so far: `messages` without the system message."""

    client: Client
    options: dict[str, Any]
    adapter: list[AdapterRef]
    system: str | None
    shows_reasoning: bool
    messages: list[dict[str, Any]] = field(default_factory=list)

    def take(self, line: str) -> None:
        """A message, or a command."""
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
            return
        command, _, text = line[1:].partition(" ")
        text = text.strip()
        match command:
            case "adapter":
                self._use(text)
            case "system":
                self.system = text or None
            case "retry":
                self._retry()
            case "clear":
                self.messages.clear()
            case "help":
                click.echo(_HELP, err=True)
            case _:
                click.echo(f"no command /{command}; /help lists the commands", err=True)

    def _use(self, names: str) -> None:
        try:
            self.adapter = [adapter_ref(name) for name in names.split()]
        except click.BadParameter as error:
            click.echo(f"error: {error.message}", err=True)

    def _ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer(self.options)
        except TurretError:
            del self.messages[-1]
            raise

    def _retry(self) -> None:
        if not self.messages:
            click.echo("there is no message yet", err=True)
            return
        answer = self.messages.pop() if self.messages[-1]["role"] == "assistant" else None
        options = self.options
        if options["seed"] is not None:
            # The same seed would give the same answer.
            options = {**options, "seed": random.getrandbits(63)}
        try:
            self._answer(options)
        except TurretError:
            self.messages += [answer] if answer else []
            raise

    def _answer(self, options: dict[str, Any]) -> None:
        """Print the answer as it arrives. One that Ctrl-C stops is kept as far as it came."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        chunks = self.client.stream_chat([*system, *self.messages], adapter=self.adapter, **options)
        text, printed = "", ""
        try:
            with closing(chunks):
                for chunk in chunks:
                    if chunk.reasoning and self.shows_reasoning:
                        printed = chunk.reasoning
                        click.secho(chunk.reasoning, nl=False, dim=True)
                    if chunk.text:
                        if self.shows_reasoning and not text and printed:
                            click.echo()
                        text += chunk.text
                        printed = chunk.text
                        click.echo(chunk.text, nl=False)
        except KeyboardInterrupt:
            if not self.shows_reasoning:
                raise
        finally:
            if printed:
                click.echo()
        self.messages.append({"role": "assistant", "content": text})
