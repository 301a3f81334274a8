"""A client process that is killed midway; it writes its requests and answers to its output, line by line."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from soak.known import QUESTIONS
from soak.requests import Request, RequestLoop

NAMES = ("stable-lora", "stable-prefix", "stable-prompt", "stable-ia3", "")
TENANT = "killed"
CONCURRENCY = 3


def _choose(rng: random.Random) -> Request:
    name = rng.choice(NAMES)
    request = Request(
        tenant=TENANT,
        names=(name,) if name else (),
        question=rng.randrange(len(QUESTIONS)),
        streamed=True,
        began=time.monotonic(),
    )
    _write(request)
    return request


def _write(request: Request) -> None:
    """Write a line in one call: it is complete unless the process was killed during it."""
    os.write(1, json.dumps(dataclasses.asdict(request)).encode() + b"\n")


def _read(line: bytes) -> Request:
    fields = json.loads(line)
    fields["names"] = tuple(fields["names"])
    fields["usage"] = fields["usage"] and tuple(fields["usage"])
    return Request(**fields)


@click.command()
@click.argument("address")
@click.argument("seed", type=int)
def main(address: str, seed: int) -> None:
    asyncio.run(RequestLoop(TENANT, _choose, CONCURRENCY, seed).run(address, lambda: False, _write, _write))


@dataclass
class KilledClients:
    """Starts client processes one after another and kills each while answers arrive."""

    address: str
    check: Callable[[Request], None]
    violation: Callable[[str], None]
    over: threading.Event
    killed: int = 0

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.over.is_set():
            self._run_one(rng)

    def _run_one(self, rng: random.Random) -> None:
        command = [sys.executable, "-m", "soak.killed_clients", self.address, str(rng.randrange(2**30))]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        }
        running: dict[int, Request] = {}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:  # noqa: S603
            assert process.stdout
            kill_timer = threading.Timer(rng.uniform(0.2, 3.0), process.kill)
            for line in process.stdout:
                if not kill_timer.ident:
                    kill_timer.start()
                if line.endswith(b"\n"):
                    request = _read(line)
                    running[request.number] = request
                    if request.outcome:
                        self.check(running.pop(request.number))
        kill_timer.cancel()
        if process.returncode == -signal.SIGKILL:
            self.killed += 1
        else:
            self.violation(f"a client process exited with status {process.returncode}")
        for request in running.values():
            request.outcome, request.ended = "killed", time.monotonic()
            self.check(request)


if __name__ == "__main__":
    main()
