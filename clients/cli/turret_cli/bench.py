"""`turret bench`: generates load on a running server and reports throughput and latencies."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import click

from turret_cli.common import FailureError, connection_options, server_option
from turret_client import Adapter, AdapterState, AsyncClient
from turret_client.bench import Latencies, LoadGenerator, Popularity, Record, Summary, Workload, summarise

_SUFFIXES = (".svg", ".png", ".pdf")
_DEFAULT_CONCURRENCY = 8
_DEFAULT_REQUESTS = 64


def _tokens_range(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, int]:
    """From N or MIN-MAX."""
    fewest, _, most = value.partition("-")
    with suppress(ValueError):
        found = int(fewest), int(most or fewest)
        if 1 <= found[0] <= found[1]:
            return found
    raise click.BadParameter(f"expected N or MIN-MAX, from 1, found {value!r}")


def _popularity(_ctx: click.Context, _param: click.Parameter, value: str) -> Popularity:
    try:
        return Popularity.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(
    epilog="""\b
Examples:
  turret bench
  turret bench --adapters "*" --concurrency 32 --requests 320
  turret bench --adapters 100 --popularity zipf:1.1 --rate 4 --duration 60 --output run.json
  turret bench --adapters pirate --adapters "tenant-*" --prompt-tokens 64-512 --plot run.svg
"""
)
@server_option
@click.option(
    "--adapters",
    "wanted",
    multiple=True,
    metavar="NAME|GLOB|COUNT",
    help="Adapters to use: a name, a pattern, or the first COUNT in the order of their names; repeatable. "
    "Without it: the base model only.",
)
@click.option(
    "--popularity",
    callback=_popularity,
    default="uniform",
    show_default=True,
    metavar="uniform|zipf:S|round-robin",
    help="Distribution of requests over the adapters. zipf:1.1 picks the adapter of rank k with weight "
    "1/k^1.1; with round-robin, concurrent requests use different adapters.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Closed loop: N concurrent requests. Default without --rate: {_DEFAULT_CONCURRENCY}.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="F",
    help="Open loop: F requests per second arrive on average, by a Poisson process, however many are in "
    "flight. Latencies count from the scheduled arrival.",
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Number of requests. Default without --duration: {_DEFAULT_REQUESTS}.",
)
@click.option(
    "--duration",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Send requests for this long; those in flight may finish.",
)
@click.option(
    "--prompt-tokens",
    callback=_tokens_range,
    default="128",
    show_default=True,
    metavar="N|MIN-MAX",
    help="Length of the prompts, which are random tokens; uniform within a range.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Maximum number of tokens to generate per request.",
)
@click.option(
    "--warm-up",
    type=click.IntRange(min=0),
    default=_DEFAULT_CONCURRENCY,
    show_default=True,
    metavar="N",
    help="Requests to send first, which are not measured.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the workload. The same seed gives the same requests.",
)
@click.option(
    "--output",
    "output_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write the settings, the results and the time of every token to a JSON file.",
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Plot latencies, throughput and running requests to an .svg, .png or .pdf file. Needs matplotlib.",
)
def bench(
    *,
    server: str,
    wanted: tuple[str, ...],
    popularity: Popularity,
    concurrency: int | None,
    rate: float | None,
    requests: int | None,
    duration: float | None,
    prompt_tokens: tuple[int, int],
    max_tokens: int,
    warm_up: int,
    seed: int,
    output_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure a running server under load.

    Sends requests with random prompts and streams the answers. Reports throughput, time to first token, time
    between tokens, and total time of a request; failed requests are counted by reason. Ctrl-C ends the run
    and reports what was measured.
    """
    if concurrency and rate:
        raise click.UsageError("Give either --concurrency (a closed loop) or --rate (an open loop).")
    if plot_file:
        _check_plot(plot_file)
    for file in (output_file, plot_file):
        if file:
            _check_writable(file)
    workload = Workload(
        concurrency=None if rate else concurrency or _DEFAULT_CONCURRENCY,
        rate=rate,
        num_requests=requests if requests or duration else _DEFAULT_REQUESTS,
        duration=duration,
        adapters=asyncio.run(_adapters(server, wanted)),
        popularity=popularity,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    generator, interrupted = asyncio.run(_measure(server, workload, warm_up))
    summary = summarise(generator.records, generator.seconds)
    click.echo(_table(summary))
    if output_file:
        settings = {"server": server, "workload": asdict(workload), "interrupted": interrupted}
        with _write_errors(output_file):
            output_file.write_text(json.dumps(settings | summary.as_json(generator.records)) + "\n")
    if plot_file:
        with _write_errors(plot_file):
            _save_plot(plot_file, generator.records)
    if interrupted:
        raise KeyboardInterrupt
    if not summary.succeeded:
        raise FailureError("no request succeeded; the table counts the errors by reason")


async def _adapters(server: str, wanted: Sequence[str]) -> tuple[str, ...]:
    if not wanted:
        return ()
    async with AsyncClient(server, **connection_options()) as client:
        listed = await client.list_adapters()
    names = {name: None for each in wanted for name in _matching(each, listed)}
    return tuple(names)


def _matching(wanted: str, listed: Sequence[Adapter]) -> list[str]:
    served = [adapter.name for adapter in listed if adapter.state is not AdapterState.FAILED]
    if wanted in served:
        return [wanted]
    if wanted.isdecimal():
        if not 1 <= int(wanted) <= len(served):
            raise click.UsageError(f"--adapters {wanted}: the server has {len(served)} adapters.")
        return served[: int(wanted)]
    found = [name for name in served if fnmatchcase(name, wanted)]
    if not found:
        raise click.UsageError(
            f"--adapters {wanted}: no adapter of the server matches; see turret adapters list."
        )
    return found


async def _measure(server: str, workload: Workload, warm_up: int) -> tuple[LoadGenerator, bool]:
    """The generator after its run, and whether Ctrl-C ended the run."""
    async with AsyncClient(server, **connection_options()) as client:
        generator = LoadGenerator(client, workload)
        progress = asyncio.create_task(_show_progress(generator))
        try:
            await generator.warm_up(warm_up)
            await generator.run()
        except asyncio.CancelledError:
            # asyncio.run cancels its task at Ctrl-C. Before the run there is nothing to show.
            if not generator.records:
                raise
            return generator, True
        finally:
            progress.cancel()
            click.echo(err=True)
    return generator, False


async def _show_progress(generator: LoadGenerator) -> None:
    """One line that is overwritten on a terminal, and a line every ten seconds elsewhere."""
    watched = sys.stderr.isatty()
    while True:
        records = generator.records
        ended = sum(record.ended is not None for record in records)
        tokens = sum(len(record.token_seconds) for record in records)
        line = (
            f"{generator.seconds:5.0f} s  {ended} ended, {generator.running} running, {tokens} tokens"
            if records
            else "warming up"
        )
        click.echo(f"\r\033[K{line}" if watched else line, nl=not watched, err=True)
        await asyncio.sleep(0.5 if watched else 10)


def _table(summary: Summary) -> str:
    errors = ", ".join(f"{reason} {count}" for reason, count in summary.errors.items())
    failed = f"{summary.failed} failed ({errors})" if errors else "0 failed"
    unfinished = f", {summary.unfinished} unfinished" if summary.unfinished else ""
    cached = f" ({summary.cached_tokens:,} cached)" if summary.cached_tokens else ""
    tokens_rate, requests_rate = summary.output_tokens_per_second, summary.requests_per_second
    lines = [
        f"requests   {summary.succeeded} succeeded, {failed}{unfinished} in {summary.seconds:.1f} s",
        f"rates      {tokens_rate:,.1f} generated tokens/s, {requests_rate:.2f} requests/s",
        f"tokens     {summary.generated_tokens:,} generated, {summary.prompt_tokens:,} of prompts{cached}",
        f"adapters   {len(summary.adapters.keys() - {''}) or 'none'}",
        "",
        f"{'':12}" + "".join(f"{word:>12}" for word in ("mean", "p50", "p90", "p99", "max")),
        _latency_line("first token", summary.first_token_seconds),
        _latency_line("inter token", summary.inter_token_seconds),
        _latency_line("request", summary.request_seconds),
    ]
    return "\n".join(lines)


def _latency_line(title: str, latencies: Latencies | None) -> str:
    values = asdict(latencies).values() if latencies else []
    return f"{title:12}" + "".join(f"{value * 1000:9,.1f} ms" for value in values)


def _check_writable(file: Path) -> None:
    """Check before the run that the file can be written after it, and leave the file as it was.

    Raises:
        click.UsageError: The file cannot be created. For an existing file click has checked the permissions.
    """
    if not file.exists():
        target = file.resolve()
        try:
            target.touch()
            target.unlink()
        except OSError as error:
            raise click.UsageError(
                f"{file} cannot be written: {error.strerror}; choose another file"
            ) from error


@contextmanager
def _write_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailureError(f"{file} was not written: {error.strerror}") from error


def _check_plot(file: Path) -> None:
    """Check before the run that the plot can be drawn after it.

    Raises:
        click.UsageError: matplotlib is not installed, or does not write files of this suffix.
    """
    if file.suffix not in _SUFFIXES:
        raise click.UsageError(f"--plot {file}: the name must end in one of {', '.join(_SUFFIXES)}.")
    if find_spec("matplotlib") is None:
        raise click.UsageError("--plot: matplotlib is not installed; install it with: pip install matplotlib")


def _save_plot(file: Path, records: Sequence[Record]) -> None:
    """Plot the distributions of latencies, and throughput and running requests over time."""
    from matplotlib.figure import Figure  # noqa: PLC0415 -- only drawing needs it

    figure = Figure(figsize=(13, 4), layout="constrained")
    first, inter, over_time = figure.subplots(1, 3)
    waits = [record.token_seconds[0] - record.due for record in records if record.token_seconds]
    gaps = [after - before for record in records for before, after in pairwise(record.token_seconds)]
    for axes, title, seconds, unit in (
        (first, "first token", waits, "requests"),
        (inter, "inter token", gaps, "tokens"),
    ):
        axes.ecdf([1000 * value for value in seconds] or [0.0])
        axes.set(title=title, xlabel="ms", ylabel=f"share of {unit}", xlim=(0, None))
    arrivals = [second for record in records for second in record.token_seconds]
    last = max(arrivals, default=0.0)
    bins = [float(second) for second in range(int(last) + 2)]
    over_time.hist(arrivals, bins=bins, histtype="step", color="tab:blue")
    over_time.set(title="over time", xlabel="s", ylabel="generated tokens/s", ylim=(0, None))
    running = over_time.twinx()
    running.plot(bins, [_running_at(records, second) for second in bins], color="tab:orange")
    running.set(ylabel="requests in flight", ylim=(0, None))
    over_time.yaxis.label.set_color("tab:blue")
    running.yaxis.label.set_color("tab:orange")
    figure.savefig(file)


def _running_at(records: Sequence[Record], second: float) -> int:
    return sum(record.due <= second and (record.ended is None or record.ended > second) for record in records)
