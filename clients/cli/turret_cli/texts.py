"""`turret embed`, `classify`, `tag` and `score`: numbers of texts, from arguments or from lines of a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from turret_cli.common import FailureError, adapter_option, connect, json_option, server_option
from turret_cli.generation_options import GENERATION_OPTIONS
from turret_client import InvalidArgumentError, Pooling, ResourceExhaustedError

if TYPE_CHECKING:
    from turret_client import Client

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Result = TypeVar("_Result")

_FILE = click.option(
    "--file",
    type=click.File("rb"),
    metavar="FILE",
    help='Read the inputs from the lines of this file; "-" is standard input.',
)
_PAIRS = click.option("--pairs", is_flag=True, help="Each input is two texts with a tab between them.")
_BATCH = click.option(
    "--batch-size",
    type=click.IntRange(1, 1024),
    default=64,
    show_default=True,
    metavar="N",
    help="Inputs in one call.",
)
_TRUNCATE = click.option("--truncate", is_flag=True, help="Cut inputs that are longer than the context.")
_SHARED = (
    _FILE,
    adapter_option,
    _TRUNCATE,
    *(GENERATION_OPTIONS[name] for name in ("priority", "cache_salt", "routing_key", "add_special_tokens")),
    _BATCH,
    server_option,
    json_option,
)
# Of the texts in a call; servers accept 4 MiB with all that is around them.
_MAX_BYTES = 3 << 20
_NO_PAIR = "expected two texts with one tab between them"


def _shared(command: _Command) -> _Command:
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.command(
    epilog="""\b
Examples:
  turret embed "the grey fox" "a red house"
  turret embed --file texts.txt > vectors.jsonl
  turret embed --adapter search --dimensions 256 "the grey fox"
""",
    short_help="Print vectors of texts.",
)
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option(
    "--pooling",
    type=click.Choice([each.value for each in Pooling]),
    help="How tokens become a vector. Default: the model's.",
)
@click.option(
    "--normalize/--no-normalize", default=None, help="Scale to length 1. Default: the model's, else yes."
)
@click.option(
    "--dimensions", type=click.IntRange(1), metavar="N", help="Numbers of each vector. Default: all."
)
@_PAIRS
@_shared
def embed(
    texts: Sequence[str],
    *,
    pooling: str | None,
    normalize: bool | None,
    dimensions: int | None,
    pairs: bool,
    **shared: Any,
) -> None:
    """Print a vector of each TEXT, or of each line of --file, as a JSON list."""

    def results(client: Client, inputs: list[Any], **options: Any) -> Sequence[tuple[float, ...]]:
        found = client.embed(inputs, pooling=pooling, normalize=normalize, dimensions=dimensions, **options)
        return found.vectors

    _run(_inputs(texts, shared.pop("file"), pairs=pairs), results, json.dumps, json.dumps, **shared)


@click.command(
    epilog="""\b
Examples:
  turret classify --adapter sentiment "I like it" "I do not"
  turret classify --adapter topics --json --file texts.txt > classes.jsonl
  printf 'He sleeps.\\tHe is awake.\\n' | turret classify --adapter nli --pairs --file -
""",
    short_help="Print labels of texts.",
)
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@_PAIRS
@_shared
def classify(texts: Sequence[str], *, pairs: bool, **shared: Any) -> None:
    """Print the label of each TEXT, or of each line of --file, and the label's score."""

    def results(client: Client, inputs: list[Any], **options: Any) -> Sequence[Any]:
        return client.classify(inputs, **options).results

    def line(found: Any) -> str:
        return f"{_in_line(found.label)}\t{found.score:.4f}"

    _run(_inputs(texts, shared.pop("file"), pairs=pairs), results, line, _to_json, **shared)


@click.command(
    epilog="""\b
Examples:
  turret tag --adapter names "Ada Lovelace was born in London."
  turret tag --adapter names --json --file texts.txt > tags.jsonl
""",
    short_help="Print labelled spans of texts.",
)
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@_shared
def tag(texts: Sequence[str], **shared: Any) -> None:
    """Print the labelled spans of each TEXT, or of each line of --file; with --json also every token."""

    def results(client: Client, inputs: list[Any], **options: Any) -> Sequence[Any]:
        return client.tag(inputs, **options).texts

    def line(found: Any) -> str:
        return "\t".join(_in_line(f"{span.label}: {span.text}") for span in found.spans)

    _run(_inputs(texts, shared.pop("file"), pairs=False), results, line, _to_json, **shared)


@click.command(
    epilog="""\b
Examples:
  turret score --adapter reranker "Who wrote it?" "Ada wrote it." "It rained."
  turret score --adapter reranker --file pairs.tsv > scores.txt
""",
    short_help="Print scores of pairs of texts.",
)
@click.argument("texts", nargs=-1, metavar="[TEXT OTHER...]")
@_shared
def score(texts: Sequence[str], **shared: Any) -> None:
    """Print the score of TEXT with each OTHER, or of the two texts of each line of --file."""
    if len(texts) == 1:
        raise click.UsageError("Give a text and others to score it with, or --file.")
    file = shared.pop("file")
    if texts and not file:
        first, *others = _inputs(texts, None, pairs=False)
        inputs = [(first, other) for other in others]
    else:
        inputs = _inputs(texts, file, pairs=True)

    def results(client: Client, pairs: list[Any], **options: Any) -> Sequence[float]:
        return client.score(pairs, **options).scores

    _run(inputs, results, lambda found: f"{found:.4f}", json.dumps, **shared)


def _inputs(texts: Sequence[str], file: IO[bytes] | None, *, pairs: bool) -> list[Any]:
    """The texts that a command was given, or the lines of a file, or of what is piped in."""
    if texts and file:
        raise click.UsageError("Give TEXT or --file, not both.")
    if texts:
        found = [*texts]
        if any(each != each.encode(errors="ignore").decode() for each in texts):
            raise click.UsageError("The inputs are not UTF-8.")
    else:
        if file is None and sys.stdin.isatty():
            raise click.UsageError("Give TEXT or --file, or pipe lines in.")
        try:
            # Only these: a text may have other characters that Unicode takes for line breaks.
            found = (file or sys.stdin.buffer).read().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"The inputs are not UTF-8: {error.reason}.") from error
        if not found[-1]:
            found.pop()
    return [_pair(number, each) for number, each in enumerate(found, 1)] if pairs else found


def _pair(number: int, line: str) -> tuple[str, ...]:
    parts = tuple(line.split("\t"))
    if len(parts) != 2:
        raise click.UsageError(f"Input {number}: {_NO_PAIR}, found {len(parts) - 1} tabs.")
    return parts


def _run(
    inputs: list[Any],
    results: Callable[..., Sequence[_Result]],
    line: Callable[[_Result], str],
    as_object: Callable[[_Result], str],
    *,
    server: str,
    batch_size: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Print a line for each input, in their order, as the answers come."""
    show = as_object if as_json else line
    if not inputs:
        return
    with (
        connect(server) as client,
        click.progressbar(length=len(inputs), file=sys.stderr, hidden=len(inputs) <= batch_size) as bar,
    ):
        for start, batch in _batches(inputs, batch_size):
            found = _patiently(results, client, batch, start, **options)
            click.echo("\n".join(map(show, found)))
            bar.update(len(batch))


def _batches(inputs: list[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """Parts of the inputs with their positions: at most `size` inputs, and no more text than a call takes."""
    start = num_bytes = 0
    for index, each in enumerate(inputs):
        own = sum(len(text.encode()) for text in (each if isinstance(each, tuple) else (each,)))
        if index > start and (index - start == size or num_bytes + own > _MAX_BYTES):
            yield start, inputs[start:index]
            start, num_bytes = index, 0
        num_bytes += own
    yield start, inputs[start:]


def _patiently(
    results: Callable[..., Sequence[_Result]], client: Client, batch: list[Any], start: int, **options: Any
) -> Sequence[_Result]:
    """The results of a call, which waits while the server has no room for it. An error has the number of the
    input in the file, not in the call.
    """
    while True:
        try:
            return results(client, batch, **options)
        except ResourceExhaustedError as error:
            if error.retry_after is None:
                raise
            time.sleep(error.retry_after)
        except InvalidArgumentError as error:
            message = str(error)
            if number := error.metadata.get("input"):
                message = message.replace(f"inputs[{number}]", f"input {start + int(number) + 1}", 1)
            elif error.metadata.get("field") == "inputs":
                message += ", with a lower --batch-size"
            else:
                raise
            raise FailureError(message, error.reason) from error


def _in_line(text: str) -> str:
    """Without the line breaks and tabs that separate results."""
    return " ".join(text.split())


def _to_json(result: Any) -> str:
    return json.dumps(asdict(result))
