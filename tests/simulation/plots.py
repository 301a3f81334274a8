"""Draw what the simulator shows, and write `SIMULATION.md` and its pictures beside this.

make simulate
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from simulation.baselines import first_come_first_served, least_recently_used
from simulation.simulator import CheapDevice, Costs, Simulator, hit_rate
from simulation.traces import NO_LIMITS, RANK_PAGES, Tenant, make_adapters, make_trace
from turret_server.engine.loop import EngineStats

_HERE = Path(__file__).parent

# Room for so many adapters of mixed ranks in the arena, beside keys and values, and in the host's memory.
_ROOM, _HOST_ROOM = 100, 1000
_ADAPTER_PAGES = sum(RANK_PAGES.values()) / len(RANK_PAGES)
_SEQUENCE_PAGES = 320
_NUM_PAGES = int(_ROOM * _ADAPTER_PAGES) + _SEQUENCE_PAGES
_COSTS = Costs(host_pages=int(_HOST_ROOM * _ADAPTER_PAGES))

_COUNTS = (1, 3, 10, 30, 60, 100, 130, 200, 300, 1000, 3000, 10_000)


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


# Adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """With so many adapters: times to the first token in seconds, and shares of requests."""

    count: int
    median: float
    p95: float
    longest_gap: float
    hits: float
    possible: float


def measure(count: int, policy: AbstractContextManager[object]) -> Point:
    """A minute of requests for some of `count` adapters, the first ten seconds left out of the times."""
    adapters = make_adapters("a", count, random.Random(0))
    tenant = Tenant(name="a", rate=25, end=60, adapters=adapters, prompt=(32, 256), answer=(16, 128))
    with policy:
        simulator = Simulator(
            make_trace([tenant], 1),
            [tenant],
            num_pages=_NUM_PAGES,
            costs=_COSTS,
            device=CheapDevice(),
            checks=False,
        )
        simulator.run_to_the_end()
    times = [served.first_token_seconds for served in simulator.served if served.arrival.at > 10]
    gaps = [gap for served in simulator.served for gap in served.gaps]
    named = {served.arrival.adapter for served in simulator.served}
    return Point(
        count=count,
        median=quantile(times, 0.5),
        p95=quantile(times, 0.95),
        longest_gap=max(gaps),
        hits=hit_rate(simulator.served, simulator.loads),
        possible=1 - len(named) / len(simulator.served),
    )


def draw_first_tokens(points: Sequence[Point]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    counts = [point.count for point in points]
    axes.plot(counts, [point.p95 * 1e3 for point in points], marker="o", label="95th percentile")
    axes.plot(counts, [point.median * 1e3 for point in points], marker="o", label="median")
    for room, name in ((_ROOM, "arena"), (_HOST_ROOM, "host")):
        axes.axvline(room, color="grey", linestyle=":")
        axes.text(room, 3, f" room in the {name}", color="grey")
    axes.set(xscale="log", ylim=(0, None), xlabel="adapters in use", ylabel="time to first token (ms)")
    axes.legend()
    save(figure, "first_token")


def draw_hits(weighted: Sequence[Point], recent: Sequence[Point]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    counts = [point.count for point in weighted]
    axes.plot(counts, [point.possible for point in weighted], color="grey", linestyle=":", label="at most")
    axes.plot(counts, [point.hits for point in weighted], marker="o", label="weighted")
    axes.plot(counts, [point.hits for point in recent], marker="o", label="least recently used")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="adapters in use", ylabel="requests that need no load")
    axes.legend()
    save(figure, "eviction")


def cold_neighbour(policy: AbstractContextManager[object]) -> tuple[float, float]:
    """Hit rates of three tenants with eight adapters each, alone and beside one with a thousand."""
    numbers = random.Random(0)
    hot = [Tenant(name=name, rate=8, end=30, adapters=make_adapters(name, 8, numbers)) for name in "xyz"]
    cold = Tenant(name="cold", rate=20, end=30, skew=0, adapters=make_adapters("cold", 1000, numbers))
    rates = []
    with policy:
        for tenants in (hot, [*hot, cold]):
            simulator = Simulator(
                make_trace(tenants, 0),
                tenants,
                num_pages=400,
                device=CheapDevice(),
                max_batch_requests=16,
                checks=False,
            )
            simulator.run_to_the_end()
            served = [one for one in simulator.served if one.arrival.tenant != "cold"]
            rates.append(hit_rate(served, simulator.loads))
    return rates[0], rates[1]


# Tenants


def serve_flood(policy: AbstractContextManager[object]) -> Simulator:
    """A light tenant asks all the time, two others for far more than there is, one of twice the weight."""
    numbers = random.Random(0)
    light = Tenant(name="light", rate=3, end=20, adapters=make_adapters("light", 3, numbers))
    flood = replace(
        light, name="flood", rate=120, start=4, end=14, adapters=make_adapters("flood", 8, numbers)
    )
    double = replace(
        flood,
        name="flood of weight 2",
        start=7,
        adapters=make_adapters("double", 8, numbers),
        limits=replace(NO_LIMITS, weight=2.0),
    )
    tenants = [light, flood, double]
    with policy:
        simulator = Simulator(
            make_trace(tenants, 0),
            tenants,
            num_pages=400,
            device=CheapDevice(),
            max_batch_requests=16,
            checks=False,
        )
        simulator.run_until(20)
    return simulator


def draw_service(fair: Simulator, unfair: Simulator) -> None:
    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, simulator, title in zip(
        both, (fair, unfair), ("fair", "first come, first served"), strict=True
    ):
        draw_services(axes, simulator)
        axes.set(title=title, xlabel="seconds")
    both[0].set_ylabel("service (prompt tokens a second)")
    both[0].legend()
    save(figure, "service")


def draw_services(axes: Axes, simulator: Simulator) -> None:
    times = list(range(20))
    for tenant in ("flood of weight 2", "flood", "light"):
        axes.plot(times, [simulator.service(tenant, at, at + 1) for at in times], label=tenant)


def light_times(simulator: Simulator) -> tuple[float, float]:
    """Median and longest time to the first token of the light tenant; who has none yet waits still."""
    times = [
        served.first_token_seconds if served.times else simulator.now - served.arrival.at
        for served in simulator.of("light")
    ]
    return quantile(times, 0.5), max(times)


# Memory


def draw_memory() -> dict[str, int]:
    """Pages by owner over a run in bursts; the most that each had."""
    numbers = random.Random(0)
    adapters = make_adapters("a", 60, numbers, prefixes=0.2)
    bursty = Tenant(
        name="bursty",
        rate=12,
        end=30,
        burst=6,
        adapters=adapters,
        prompt=(32, 512),
        answer=(16, 128),
        alike=0.5,
    )
    steady = Tenant(
        name="steady", rate=3, end=30, adapters=make_adapters("s", 5, numbers), pins=0.2, patience=8
    )
    times: list[float] = []
    pages: list[dict[str, int]] = []

    def watch(now: float, stats: EngineStats) -> None:
        if not times or now >= times[-1] + 0.05:
            times.append(now)
            pages.append(stats.pages)

    simulator = Simulator(
        make_trace([bursty, steady], 0),
        [bursty, steady],
        num_pages=600,
        device=CheapDevice(),
        max_batch_requests=32,
        on_stats=watch,
    )
    simulator.run_until(35)
    owners = ("pinned", "prefix", "lora", "sequence", "cache", "free")
    figure, axes = plt.subplots(figsize=(9, 4))
    axes.stackplot(
        times,
        [[one[owner] for one in pages] for owner in owners],
        labels=owners,
        colors=["#b2182b", "#ef8a62", "#2166ac", "#1b7837", "#a6dba0", "#eeeeee"],
    )
    axes.set(xlabel="seconds", ylabel="pages", xlim=(0, times[-1]), ylim=(0, 600))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    save(figure, "memory")
    return {owner: max(one[owner] for one in pages) for owner in owners} | {
        "preempted": simulator.num_preempted
    }


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(_HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    mpl.use("svg")
    # So that the same figures make the same files.
    mpl.rcParams["svg.hashsalt"] = "turret"
    weighted = [measure(count, nullcontext()) for count in _COUNTS]
    recent = [measure(count, least_recently_used()) for count in _COUNTS]
    draw_first_tokens(weighted)
    draw_hits(weighted, recent)
    fair, unfair = serve_flood(nullcontext()), serve_flood(first_come_first_served())
    draw_service(fair, unfair)
    memory = draw_memory()
    text = (_HERE / "SIMULATION.md.in").read_text()
    rows = [
        f"| {one.count} | {one.median * 1e3:.0f} | {one.p95 * 1e3:.0f} | {one.longest_gap * 1e3:.0f} | "
        f"{one.hits:.2f} | {other.hits:.2f} | {one.possible:.2f} |"
        for one, other in zip(weighted, recent, strict=True)
    ]
    between = [
        f"{simulator.service('flood of weight 2', 9, 14) / simulator.service('flood', 9, 14):.2f}"
        for simulator in (fair, unfair)
    ]
    (_HERE / "SIMULATION.md").write_text(
        text.format(
            rows="\n".join(rows),
            num_pages=_NUM_PAGES,
            costs=_COSTS,
            light=[
                "{:.0f} ms and {:.0f} ms".format(*(1e3 * x for x in light_times(s))) for s in (fair, unfair)
            ],
            between=between,
            cold=[
                "{:.2f} to {:.2f}".format(*cold_neighbour(p)) for p in (nullcontext(), least_recently_used())
            ],
            memory=memory,
        )
    )


if __name__ == "__main__":
    main()
