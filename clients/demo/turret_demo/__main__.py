"""`make demo`: train, serve, mix, swap, and show what came of it."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from turret_cli.common import format_size, format_table
from turret_client import Client
from turret_demo.chat import show_chat
from turret_demo.load import Ask, Streamed, ask_all, exact_match, seconds_per_token, stream_during
from turret_demo.server import Server
from turret_demo.tasks import TASKS
from turret_demo.training import DEFAULT_FOLDER, EARLY_ADAPTER, Trained, ensure_trained

_HELD_OUT = 40
_SIDE_BY_SIDE = 2
_TIMED_PROMPTS = 6
_STREAMS = 12
_PASSING_SCORE = 0.9
_SEED = 1


def main() -> int:
    started = time.monotonic()
    print("1. Training (kept for the next time)", flush=True)
    trained = ensure_trained()
    names = list(trained.adapters)
    asks = {
        name: [Ask(name, *example) for example in TASKS[name].make(_HELD_OUT, "test", _SEED)]
        for name in names
    }

    print("\n2. The server, as a process of its own", flush=True)
    with _serving(trained, DEFAULT_FOLDER) as (server, client):
        print(f"   process {server.pid} serves on {server.address} after {server.start_seconds:.1f} s")
        for name in names:
            folder = trained.early.get(name, trained.adapters[name])
            adapter = client.load_adapter(name, str(folder))
            print(f"   loaded {name}: {adapter.method}, revision {adapter.revision[:12]}")

        print(
            f"\n3. A better revision of {EARLY_ADAPTER}, swapped in while {_STREAMS} streams run", flush=True
        )
        swapped = _swap(client, trained, asks)

        print("\n4. One sentence, every adapter, one concurrent batch", flush=True)
        _side_by_side(client, asks)

        print(f"\n5. {_HELD_OUT} held-out prompts for each adapter", flush=True)
        scores = _scores(server, client, asks)
        _comparison(client, trained, asks, scores)
    print("\n6. A chat with a real model", flush=True)
    chatted = show_chat(DEFAULT_FOLDER.absolute())
    print(f"\n{time.monotonic() - started:.0f} s in all; the server's log is {DEFAULT_FOLDER / 'server.log'}")
    passed = (
        swapped
        and chatted
        and all(min(alone, mixed) >= _PASSING_SCORE for _, alone, mixed in scores.values())
    )
    print("All checks passed." if passed else "Some checks failed; see above.")
    return 0 if passed else 1


@contextmanager
def _serving(trained: Trained, folder: Path) -> Iterator[tuple[Server, Client]]:
    with (
        Server(trained.base, folder.absolute() / "cache", folder.absolute() / "server.log") as server,
        Client(server.address) as client,
    ):
        yield server, client


def _swap(client: Client, trained: Trained, asks: Mapping[str, Sequence[Ask]]) -> bool:
    """Load the final revision under load; True if nothing failed and nobody's revision changed under way."""
    own = asks[EARLY_ADAPTER]
    old = client.get_adapter(EARLY_ADAPTER).revision
    old_answers = ask_all(client, own)
    expected = {(old, ask.prompt): answer.text for ask, answer in zip(own, old_answers, strict=True)}
    moment: list[float] = []

    def swap() -> None:
        client.load_adapter(EARLY_ADAPTER, str(trained.adapters[EARLY_ADAPTER]))
        moment.append(time.monotonic())

    others = [asks[name][index] for name in asks if name != EARLY_ADAPTER for index in range(4)]
    mixed = [ask for pair in zip(own, (others * len(own))[: len(own)], strict=True) for ask in pair]
    streamed = stream_during(client, mixed, swap, _STREAMS)
    new = client.get_adapter(EARLY_ADAPTER).revision
    new_answers = ask_all(client, own)
    expected |= {(new, ask.prompt): answer.text for ask, answer in zip(own, new_answers, strict=True)}
    print(f"   exact match of the old revision {_percent(exact_match(own, old_answers))}, "
          f"of the new one {_percent(exact_match(own, new_answers))}")  # fmt: skip
    return _report_swap(streamed, expected, old, moment[0])


def _report_swap(
    streamed: Sequence[Streamed], expected: Mapping[tuple[str, str], str], old: str, moment: float
) -> bool:
    failed = [each for each in streamed if each.error]
    own = [each for each in streamed if each.ask.adapter == EARLY_ADAPTER and not each.error]
    across = [each for each in own if each.revision == old and each.ended > moment]
    after = [each for each in own if each.began > moment]
    wrong = [each for each in own if each.text != expected[each.revision, each.ask.prompt]]
    stale = [each for each in after if each.revision == old]
    print(f"   {len(streamed)} streams, {len(failed)} failed; {len(own)} of them on {EARLY_ADAPTER}:")
    print(f"   {len(across)} began on the old revision, were running at the swap and ended on the old one")
    print(f"   {len(after)} began after it, {len(stale)} of them on the old revision")
    print(f"   {len(wrong)} answers differ from their revision's answer without a swap")
    return bool(across) and bool(after) and not failed and not wrong and not stale


def _side_by_side(client: Client, asks: Mapping[str, Sequence[Ask]]) -> None:
    names = list(asks)
    batch = [
        Ask(adapter, asks[names[0]][index].prompt, "")
        for index in range(_SIDE_BY_SIDE)
        for adapter in (None, *names)
    ]
    answers = ask_all(client, batch)
    for index in range(_SIDE_BY_SIDE):
        print(f"   {batch[index * (len(names) + 1)].prompt.strip()!r}")
        for ask, answer in list(zip(batch, answers, strict=True))[index * (len(names) + 1) :][
            : len(names) + 1
        ]:
            print(f"     {ask.adapter or '(base alone)':14} {answer.text}")


def _scores(
    server: Server, client: Client, asks: Mapping[str, Sequence[Ask]]
) -> dict[str, tuple[float, float, float]]:
    """Exact match of the base alone, of each adapter alone, and of each in one batch of all."""
    base_asks = [Ask(None, ask.prompt, "") for ask in next(iter(asks.values()))]
    base_answers = ask_all(client, base_asks)
    alone = {name: exact_match(own, ask_all(client, own)) for name, own in asks.items()}
    before = server.metrics()
    everything = [ask for together in zip(*asks.values(), strict=True) for ask in together]
    answers = ask_all(client, everything)
    after = server.metrics()
    steps, sequences = (
        after[name] - before[name] for name in ("turret_step_seconds_count", "turret_batch_requests_sum")
    )
    print(
        f"   all {len(everything)} at once: {steps:.0f} steps of {sequences / steps:.1f} sequences on average"
    )
    mixed = {
        name: exact_match(own, [a for ask, a in zip(everything, answers, strict=True) if ask.adapter == name])
        for name, own in asks.items()
    }
    return {name: (exact_match(own, base_answers), alone[name], mixed[name]) for name, own in asks.items()}


def _comparison(
    client: Client,
    trained: Trained,
    asks: Mapping[str, Sequence[Ask]],
    scores: Mapping[str, tuple[float, float, float]],
) -> None:
    prompts = [ask.prompt for ask in next(iter(asks.values()))[:_TIMED_PROMPTS]]
    per_token = seconds_per_token(client, [None, *asks], prompts)
    base_seconds = per_token[None]
    rows = []
    for name, report in trained.reports.items():
        base, alone, mixed = scores[name]
        rows.append(
            (
                name,
                report.method,
                f"{report.trainable_parameters:,}",
                format_size(report.file_bytes),
                "-" if report.peak_memory_bytes is None else format_size(report.peak_memory_bytes),
                f"{report.seconds:.0f} s",
                format_size(client.get_adapter(name).arena_bytes),
                f"{(per_token[name] - base_seconds) * 1000:+.2f} ms",
                _percent(base),
                _percent(alone),
                _percent(mixed),
            )
        )
    words = ("adapter", "method")
    numbers = ("trainable", "file", "memory", "time", "arena", "a token", "base", "alone", "mixed")
    print(textwrap.indent(format_table(words, numbers, rows), "   "))
    print(
        "   trainable: parameters; memory, time: of training, two adapters at a time where there are two "
        "cores;\n   arena: of the server, when resident; a token: what it adds to the base's "
        f"{base_seconds * 1000:.2f} ms in a stream of its own;\n"
        "   base, alone, mixed: exact match of the base without the adapter, of the adapter in batches of "
        "its own,\n   and in one batch of all."
    )


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"


if __name__ == "__main__":
    sys.exit(main())
