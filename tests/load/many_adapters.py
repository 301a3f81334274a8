"""2,000 adapters of ranks 8 to 64 on one server that has host memory for 200 and pages for 40.

A power-law load on all of them takes turns with the same load on a single one; `make load` writes what came
of it to RESULTS.md. Model and adapters are made once, in `.load`.
"""

from __future__ import annotations

import asyncio
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click
import psutil
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from support.tokenizers import save_tokenizer
from turret_client import AsyncClient
from turret_client.bench import LoadGenerator, Popularity, Workload, summarise

ROOT = Path(".load")
RESULTS = Path(__file__).with_name("RESULTS.md")
NUM_ADAPTERS, HOST_ROOM, ARENA_ROOM = 2000, 200, 40
RANKS = (8, 16, 32, 64)
CONCURRENCY, PROMPT_TOKENS, MAX_TOKENS = 16, 32, 64
ZIPF = 1.0
ROUNDS, SECONDS = 3, 60.0

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=1,
)
_BF16 = 2

ABOUT = f"""\
# Many adapters on little memory

`make load`: {NUM_ADAPTERS} LoRAs of ranks {{ranks}} on a base of {{layers}} layers and {{width}} wide, with
host memory for {HOST_ROOM} of them and pages for {ARENA_ROOM}; {CONCURRENCY} requests at a time,
prompts of {PROMPT_TOKENS} tokens, {MAX_TOKENS} generated; adapters drawn by a power law, exponent {ZIPF:g};
medians of {ROUNDS} rounds of {SECONDS:.0f} s that take turns with the same load on one adapter. {{machine}}.
"""


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)


def make_adapters(model: Path, folder: Path) -> None:
    """One of every rank by peft; the others have the same tensors with other numbers in them."""
    generator = torch.Generator().manual_seed(0)
    for rank in RANKS:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"])
        made = folder.with_name(f"rank{rank}")
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(made)
    for index in range(NUM_ADAPTERS):
        rank = RANKS[index % len(RANKS)]
        made, target = folder.with_name(f"rank{rank}"), folder / f"a{index:04}"
        target.mkdir(parents=True)
        shutil.copy(made / "adapter_config.json", target)
        tensors = load_file(made / "adapter_model.safetensors")
        rows = {
            key: (torch.randn(tensor.shape, generator=generator) / 50).to(torch.bfloat16)
            for key, tensor in tensors.items()
        }
        save_file(rows, target / "adapter_model.safetensors", metadata={"format": "pt"})
        if index % 200 == 0:
            click.echo(f"made {index} of {NUM_ADAPTERS} adapters")


def mean_adapter_bytes() -> int:
    kv = CONFIG.num_key_value_heads * CONFIG.hidden_size // CONFIG.num_attention_heads
    elements = CONFIG.num_hidden_layers * (3 * CONFIG.hidden_size + kv)
    return int(elements * statistics.mean(RANKS) * _BF16)


def kv_bytes() -> int:
    """Keys and values of the requests that run at once, a page of 16 tokens more for each."""
    kv = CONFIG.num_key_value_heads * CONFIG.hidden_size // CONFIG.num_attention_heads
    token = 2 * CONFIG.num_hidden_layers * kv * _BF16
    return CONCURRENCY * (PROMPT_TOKENS + MAX_TOKENS + 16) * token


class Server:
    """`turret serve` with the budgets above; what it logs goes to `.load/server.log`."""

    def __init__(self) -> None:
        self.log = ROOT / "server.log"
        arguments = {
            "--model": ROOT / "model",
            "--adapters": ROOT / "adapters",
            "--cache": ROOT / "cache",
            "--store": ROOT / "store",
            "--memory": ARENA_ROOM * mean_adapter_bytes() + kv_bytes(),
            "--host-memory": HOST_ROOM * mean_adapter_bytes(),
            "--max-batch-requests": CONCURRENCY,
            "--listen": "127.0.0.1:0",
            "--http": "none",
            "--metrics": "127.0.0.1:0",
        }
        turret = Path(sys.executable).with_name("turret")
        words = [str(word) for pair in arguments.items() for word in pair]
        started = time.monotonic()
        with self.log.open("w") as file:
            self.process = subprocess.Popen([turret, "serve", *words], stderr=file)  # noqa: S603
        self.address = self._wait_for(r"serving on (\S+)")
        self._metrics = self._wait_for(r"metrics on (\S+)")
        self.start_seconds = time.monotonic() - started

    def _wait_for(self, pattern: str) -> str:
        while self.process.poll() is None:
            if match := re.search(pattern, self.log.read_text()):
                return match[1]
            time.sleep(0.2)
        raise RuntimeError(self.log.read_text())

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(self._metrics) as response:  # noqa: S310 (loopback)
            lines = response.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def resident_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


class Watch(threading.Thread):
    """Samples the server's memory every second until `stop`."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._over = threading.Event()
        self.resident: list[int] = []
        self.host_adapters: list[float] = []

    def run(self) -> None:
        while not self._over.wait(1.0):
            self.resident.append(self._server.resident_bytes())
            self.host_adapters.append(self._server.metrics()["turret_host_adapter_bytes"])

    def stop(self) -> None:
        self._over.set()
        self.join()


@dataclass(frozen=True)
class Phase:
    tokens_per_second: float
    first_token_median: float
    first_token_p95: float
    gaps: list[float]
    failed: int


async def run_phase(address: str, adapters: tuple[str, ...], seed: int) -> Phase:
    workload = Workload(
        concurrency=CONCURRENCY,
        duration=SECONDS,
        adapters=adapters,
        popularity=Popularity(zipf=ZIPF),
        prompt_tokens=(PROMPT_TOKENS, PROMPT_TOKENS),
        max_tokens=MAX_TOKENS,
        seed=seed,
    )
    async with AsyncClient(address) as client:
        generator = LoadGenerator(client, workload)
        await generator.run()
    summary = summarise(generator.records, generator.seconds)
    first = sorted(record.token_seconds[0] - record.due for record in generator.records)
    return Phase(
        tokens_per_second=summary.output_tokens_per_second,
        first_token_median=statistics.median(first),
        first_token_p95=first[int(0.95 * len(first))],
        gaps=sorted(b - a for record in generator.records for a, b in pairwise(record.token_seconds)),
        failed=summary.failed,
    )


def main() -> None:
    if not (ROOT / "adapters").is_dir():
        make_model(ROOT / "model")
        making = ROOT / "making"
        shutil.rmtree(making, ignore_errors=True)
        make_adapters(ROOT / "model", making / "adapters")
        (making / "adapters").rename(ROOT / "adapters")
    server = Server()
    click.echo(f"serving {NUM_ADAPTERS} adapters after {server.start_seconds:.0f} s")
    names = tuple(f"a{index:04}" for index in range(NUM_ADAPTERS))
    one: list[Phase] = []
    many: list[Phase] = []
    try:
        asyncio.run(run_phase(server.address, names[2:3], seed=100))
        watch = Watch(server)
        watch.start()
        before = server.metrics()
        for number in range(ROUNDS):
            one.append(asyncio.run(run_phase(server.address, names[2:3], seed=number)))
            many.append(asyncio.run(run_phase(server.address, names, seed=number)))
            click.echo(
                f"round {number + 1}: {one[-1].tokens_per_second:.0f} tokens/s on one adapter, "
                f"{many[-1].tokens_per_second:.0f} on all"
            )
        watch.stop()
        after = server.metrics()
    finally:
        server.process.terminate()
        server.process.wait()
    write(one, many, watch, {key: after[key] - before.get(key, 0.0) for key in after}, server)


def write(one: list[Phase], many: list[Phase], watch: Watch, moved: dict[str, float], server: Server) -> None:
    def median(phases: list[Phase], name: str) -> float:
        return statistics.median(getattr(phase, name) for phase in phases)

    def gap(phases: list[Phase], fraction: float) -> float:
        return statistics.median(phase.gaps[int(fraction * (len(phase.gaps) - 1))] for phase in phases)

    rate = median(many, "tokens_per_second") / median(one, "tokens_per_second")
    minute = 60
    rows = [
        ("tokens per second", *(f"{median(phases, 'tokens_per_second'):.0f}" for phases in (one, many))),
        *(
            (
                f"time to first token, {text}",
                *(f"{1000 * median(phases, name):.0f} ms" for phases in (one, many)),
            )
            for text, name in (("median", "first_token_median"), ("p95", "first_token_p95"))
        ),
        *(
            (f"between two tokens, {text}", *(f"{1000 * gap(phases, at):.0f} ms" for phases in (one, many)))
            for text, at in (("median", 0.5), ("p99", 0.99), ("largest", 1.0))
        ),
        ("failed requests", *(str(sum(phase.failed for phase in phases)) for phases in (one, many))),
    ]
    budget = HOST_ROOM * mean_adapter_bytes()
    mib = 2**20
    requests = moved['turret_requests_total{outcome="ok"}']
    facts = [
        f"Throughput on all adapters is {100 * rate:.0f} % of that on one (aim: 70 %).",
        f"In all rounds together {requests:.0f} requests.",
        (
            f"Adapters that gave up their pages: {moved['turret_adapter_evictions_total']:.0f}; that were "
            f"read again from the disk: {moved['turret_adapter_disk_reads_total']:.0f}."
        ),
        f"Adapters in host memory: at most {max(watch.host_adapters) / mib:.1f} MiB of {budget / mib:.1f}.",
        (
            f"Resident memory of the process, median of the first minute: "
            f"{statistics.median(watch.resident[:minute]) / mib:.0f} MiB, of the last: "
            f"{statistics.median(watch.resident[-minute:]) / mib:.0f} MiB, at most: "
            f"{max(watch.resident) / mib:.0f} MiB."
        ),
        f"Start with all adapters, from exec to serving: {server.start_seconds:.0f} s.",
    ]
    about = ABOUT.format(
        layers=CONFIG.num_hidden_layers,
        width=CONFIG.hidden_size,
        ranks=", ".join(map(str, RANKS)),
        machine=f"{platform.machine()}, {psutil.cpu_count(logical=False)} cores, torch {torch.__version__}",
    )
    table = ["| | one adapter | all of them |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    RESULTS.write_text("\n".join([about, *table, "", *(f"- {fact}" for fact in facts), ""]))
    click.echo(RESULTS.read_text())
    (ROOT / "results.json").write_text(json.dumps({"rate": rate, "moved": moved}, indent=1))


if __name__ == "__main__":
    main()
