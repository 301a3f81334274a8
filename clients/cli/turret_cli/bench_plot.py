"""The picture of `turret bench`. matplotlib is no dependency of a client: only drawing imports it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import click

from turret_client.bench import Record

_SUFFIXES = (".svg", ".png", ".pdf")


def check_plot(file: Path) -> None:
    """See before a run that its picture can be drawn after it.

    Raises:
        click.UsageError: matplotlib is missing, or cannot write such a file.
    """
    if file.suffix not in _SUFFIXES:
        raise click.UsageError(f"--plot {file}: the name must end in one of {', '.join(_SUFFIXES)}.")
    if find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def save_plot(file: Path, records: Sequence[Record]) -> None:
    """Draw how many requests waited no longer than so long, and throughput and running requests over time."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (see above)

    figure = Figure(figsize=(13, 4), layout="constrained")
    first, inter, over_time = figure.subplots(1, 3)
    waits = [record.token_seconds[0] - record.due for record in records if record.token_seconds]
    gaps = [after - before for record in records for before, after in pairwise(record.token_seconds)]
    for axes, title, seconds in ((first, "first token", waits), (inter, "inter token", gaps)):
        axes.ecdf([1000 * value for value in seconds] or [0.0])
        axes.set(title=title, xlabel="ms", ylabel="share that waited no longer", xlim=(0, None))
    arrivals = [second for record in records for second in record.token_seconds]
    last = max(arrivals, default=0.0)
    bins = [float(second) for second in range(int(last) + 2)]
    over_time.hist(arrivals, bins=bins, histtype="step", color="tab:blue")
    over_time.set(title="over time", xlabel="s", ylabel="generated tokens/s", ylim=(0, None))
    running = over_time.twinx()
    running.plot(bins, [_running_at(records, second) for second in bins], color="tab:orange")
    running.set(ylabel="requests that run or wait", ylim=(0, None))
    over_time.yaxis.label.set_color("tab:blue")
    running.yaxis.label.set_color("tab:orange")
    figure.savefig(file)


def _running_at(records: Sequence[Record], second: float) -> int:
    return sum(record.due <= second and (record.ended is None or record.ended > second) for record in records)
