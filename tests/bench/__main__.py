"""`make bench`: Turret beside its peers on this machine; `make bench ARGS=--help` says more."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from bench.install_peers import LLAMA_SOURCE, VLLM_RELEASE
from bench.layout import BENCH
from bench.measure import Systems, measure_group, measure_start
from bench.plan import GROUP_NAMES, START
from bench.table import draw, markdown

_ROUNDS = 3
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numba")


@click.command()
@click.option("--quick", is_flag=True, help="One round, all of it on the 160 M shape: to see that it runs.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(GROUP_NAMES),
    help="Measure these rows, again if they are there; may be given several times.",
)
def main(*, quick: bool, only: tuple[str, ...]) -> None:
    """Measure Turret and the peers that are installed, and write RESULTS.md, results.json and results.svg.

    They are written after every row. A run that was broken off goes on where it stopped; one that was not
    begins anew. What --quick writes stands in .bench/quick.
    """
    # However it is ended, the servers that it started end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = BENCH / "quick" if quick else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    state = _begin(folder / "results.json", quick=quick, keep=bool(only))
    rounds = state["rounds"]
    began = time.monotonic()
    with closing(Systems()) as systems:
        for name in only or [name for name in GROUP_NAMES if name not in state["groups"]]:
            click.echo(f"{name} ({time.monotonic() - began:.0f} s so far)")
            state["groups"][name] = (
                measure_start(rounds, small=quick)
                if name == START
                else measure_group(name, systems, rounds, small=quick)
            )
            state["measured"][name] = datetime.now(UTC).isoformat(timespec="seconds")
            state["finished"] = all(each in state["groups"] for each in GROUP_NAMES)
            _write(folder, state)
    click.echo(f"\n{markdown(state)}\n{time.monotonic() - began:.0f} s; written to {folder}")


def _begin(file: Path, *, quick: bool, keep: bool) -> dict[str, Any]:
    """What an unfinished run on this machine has left, or with `keep` what any has; else a new one."""
    peers = f"llama.cpp of {LLAMA_SOURCE}, {VLLM_RELEASE}"
    about = {
        "command": "make bench" + (" ARGS=--quick" if quick else ""),
        "machine": _machine(),
        "versions": ", ".join([*(f"{name} {version(name)}" for name in _PACKAGES), peers]),
        "quick": quick,
        "rounds": 1 if quick else _ROUNDS,
    }
    if file.exists():
        state = json.loads(file.read_text())
        if about.items() <= state.items() and (keep or not state["finished"]):
            return state
    return about | {"finished": False, "measured": {}, "groups": {}}


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    flags = next((line for line in lines if line.startswith("flags")), "")
    extra = " with AVX512-BF16" if "avx512_bf16" in flags else ""
    return f"{os.cpu_count()} cores of {', '.join(names) or platform.processor()}{extra}"


def _write(folder: Path, state: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(state, indent=1) + "\n")
    (folder / "RESULTS.md").write_text(markdown(state))
    draw(state, folder / "results.svg")


if __name__ == "__main__":
    main()
