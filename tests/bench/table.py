"""From figures to the table and the picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.layout import MIXED, RANKS, SMALL_LLAMA, TINY_LLAMA
from bench.plan import LLAMA_CPP, PEFT, START, SYSTEMS, TURRET, VLLM
from bench.work import middle

_PEER_TITLES = {PEFT: "peft", LLAMA_CPP: "llama.cpp", VLLM: "vLLM"}
_RANK_16_ROWS = 8 * 16
_MIXED_ROWS = sum(RANKS[name] for name in MIXED)
_PADDED_ROWS = 8 * max(RANKS[name] for name in MIXED)
_BITS = 4.3
_ALLOWANCE_BYTES = 600e6
_HEADS = ("Turret", "HF + peft NF4", "llama.cpp Q4_0", "vLLM CPU bf16")
_ABOUT = """\
# Turret beside its peers

Made by `{command}` on {machine}; {versions}.

A Llama of TinyLlama-1.1B's shape{small} with random weights, prompts of 128 random tokens, 64 generated,
greedy; medians over {rounds} round(s), in each of which the systems take turns. Turret streams over gRPC
and llama.cpp over HTTP; the others run in a process of their own. LoRAs are of all linears.

Decode is tokens a second while every request of the batch generates; where a system does not run requests of
different adapters together (llama.cpp), tokens a second of one after another.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: `cells` are the systems' figures in the order of SYSTEMS."""

    work: str
    cells: tuple[str, ...]
    target: str = ""
    result: str = ""
    met: bool | None = None

    def markdown(self) -> str:
        verdict = {True: "yes", False: "no", None: ""}[self.met]
        return f"| {self.work} | {' | '.join(self.cells)} | {self.result} | {self.target} | {verdict} |"


def rows(groups: dict[str, Any]) -> Iterator[Row]:
    """The rows of what has been measured. A target that was met became what was reached."""
    decode = (
        ("batch-8", "batch 8, 8 LoRAs of rank 16", {PEFT: 3.7, VLLM: 5.0, LLAMA_CPP: 2.3}),
        ("batch-32", "batch 32, 32 LoRAs of rank 16", {PEFT: 3.9, LLAMA_CPP: 2.8}),
        ("batch-1", "batch 1, a LoRA of rank 16", {PEFT: 2.5, LLAMA_CPP: 0.75}),
    )
    for name, title, targets in decode:
        if name in groups:
            yield _rate_row(f"{title}, decode tokens/s", groups[name]["lora"], "decode", targets)
    if "prefill" in groups:
        targets = {PEFT: 2.0, LLAMA_CPP: 1.4}
        yield _rate_row("prefill 8 × 512, 8 LoRAs, tokens/s", groups["prefill"]["lora"], "prefill", targets)
    if "batch-8" in groups:
        yield from _cost_rows({name: figures[TURRET] for name, figures in groups["batch-8"].items()})
    if "batch-32" in groups:
        yield from _outside_rows(groups["batch-32"]["lora"][TURRET])
    if START in groups:
        yield from _start_rows(groups[START])
    if "small" in groups:
        title = f"the {SMALL_LLAMA.title} shape, batch 8, 8 LoRAs of rank 16, decode tokens/s"
        yield _rate_row(title, groups["small"]["lora"], "decode", {})


def _rate_row(title: str, figures: dict[str, Any], kind: str, targets: dict[str, float]) -> Row:
    rates = {system: middle(figures.get(system), kind) for system in SYSTEMS}
    ours = rates[TURRET]
    ratios = {peer: ours / theirs for peer in _PEER_TITLES if ours and (theirs := rates[peer])}
    judged = [ratios[peer] >= target for peer, target in targets.items() if peer in ratios]
    return Row(
        title,
        tuple(_cell(figures.get(system), kind) for system in SYSTEMS),
        ", ".join(f"{target:g} × {_PEER_TITLES[peer]}" for peer, target in targets.items()),
        ", ".join(f"{ratio:.2f} × {_PEER_TITLES[peer]}" for peer, ratio in ratios.items()),
        all(judged) if judged else None,
    )


def _cell(figures: Any, kind: str) -> str:
    if figures is None:
        return "–"
    value = middle(figures, kind)
    return figures if value is None else f"{value:.1f}"


def _ours(title: str, figures: str, target: str, result: str, *, met: bool) -> Row:
    return Row(title, (figures, *["–"] * (len(SYSTEMS) - 1)), target, result, met)


def _cost_rows(figures: dict[str, Any]) -> Iterator[Row]:
    """Against the base alone on the same server: what a token costs is the inverse of the rate."""
    rates = {name: rate for name, found in figures.items() if (rate := middle(found, "decode"))}
    if len(rates) < len(figures):
        return
    base = rates["base"]
    lora_cost = base / rates["lora"] - 1
    mixed_cost = base / rates["mixed"] - 1
    yield _ours(
        "batch 8, 8 LoRAs against the base alone",
        f"{rates['lora']:.1f} against {base:.1f}",
        "at most 10 % slower",
        f"{1 - rates['lora'] / base:.1%} slower",
        met=rates["lora"] >= 0.9 * base,
    )
    rows_ratio, padded_ratio = _MIXED_ROWS / _RANK_16_ROWS, _PADDED_ROWS / _RANK_16_ROWS
    cost_ratio = mixed_cost / lora_cost if lora_cost > 0 else 0.0
    yield _ours(
        "batch 8, ranks 8/16/64 mixed, against all 16",
        f"{rates['mixed']:.1f} against {rates['lora']:.1f}",
        f"cost × {rows_ratio:.2f} as the rows (padded: × {padded_ratio:.0f})",
        f"cost × {cost_ratio:.2f}",
        # Two small differences are compared: half way to half of what padding costs is no padding.
        met=cost_ratio <= 1.25 * rows_ratio,
    )
    yield _ours(
        "batch 8, a prefix of 64 virtual tokens",
        f"{rates['prefix']:.1f} against {base:.1f}",
        "at most 3 % slower",
        f"{1 - rates['prefix'] / base:.1%} slower",
        met=rates["prefix"] >= 0.97 * base,
    )


def _outside_rows(figures: Any) -> Iterator[Row]:
    share = middle(figures, "outside_steps")
    if share is not None:
        yield _ours(
            "batch 32: time outside the engine's steps (gRPC, scheduling, detokenising)",
            f"{share:.1%}",
            "at most 1 %",
            f"{share:.1%}",
            met=share <= 0.01,
        )


def _start_rows(figures: dict[str, Any]) -> Iterator[Row]:
    shape = next(each for each in (TINY_LLAMA, SMALL_LLAMA) if each.name == figures["shape"])
    weights = shape.num_quantised * _BITS / 8 + shape.num_unquantised * 2
    resident, arena = figures["resident_bytes"], figures["arena_bytes"]
    allowed = weights + arena + _ALLOWANCE_BYTES
    yield _ours(
        "resident memory after a batch of 8 adapters",
        f"{resident / 1e6:.0f} MB",
        f"{weights / 1e6:.0f} MB weights + {arena / 1e6:.0f} MB arena in use + 600 MB",
        f"{(resident - weights - arena) / 1e6:.0f} MB besides weights and arena",
        met=resident <= allowed,
    )
    seconds = middle(figures, "start_seconds")
    assert seconds is not None
    yield _ours(
        "second start to the first token, imports included",
        f"{seconds:.1f} s",
        "at most 9 s",
        f"{seconds:.1f} s",
        met=seconds <= 9,
    )


def markdown(state: dict[str, Any]) -> str:
    """The table with what is to be known about the machine."""
    heads = ("work", *_HEADS, "reached", "target", "met")
    small = f" (with --quick the {SMALL_LLAMA.title} shape)" if state["quick"] else ""
    lines = [
        *_ABOUT.format(small=small, **state).splitlines(),
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(row.markdown() for row in rows(state["groups"])),
    ]
    return "\n".join(lines) + "\n"


def draw(state: dict[str, Any], file: Path) -> None:
    """Bars: the systems side by side, for each of the works that several of them do."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow)

    wanted = (
        ("batch-1", "decode", "batch 1, LoRA"),
        ("batch-8", "decode", "batch 8, 8 LoRAs"),
        ("batch-32", "decode", "batch 32, 32 LoRAs"),
        ("prefill", "prefill", "prefill 8 × 512, 8 LoRAs"),
    )
    measured = [
        (state["groups"][name]["lora"], kind, title)
        for name, kind, title in wanted
        if name in state["groups"]
    ]
    if not measured:
        return
    figure = Figure(figsize=(3 * len(measured), 3.2), layout="constrained")
    for axes, (figures, kind, title) in zip(
        figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True
    ):
        rates = {system: rate for system in SYSTEMS if (rate := middle(figures.get(system), kind))}
        bars = axes.bar(
            list(rates), list(rates.values()), color=[f"C{SYSTEMS.index(name)}" for name in rates]
        )
        axes.bar_label(bars, fmt="%.0f")
        axes.set(title=title, ylabel="tokens/s")
        axes.tick_params(axis="x", rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
