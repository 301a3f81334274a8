"""A client process that is killed midway; it writes its requests and answers to its output, line by line."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from soak.asking import Asked, Asker
from soak.known import QUESTIONS

NAMES = ("stable-lora", "stable-prefix", "stable-prompt", "stable-ia3", "")
TENANT = "mortal"
CONCURRENCY = 3


def _choose(chance: random.Random) -> Asked:
    name = chance.choice(NAMES)
    asked = Asked(
        tenant=TENANT,
        names=(name,) if name else (),
        question=chance.randrange(len(QUESTIONS)),
        streamed=True,
        began=time.monotonic(),
    )
    _write(asked)
    return asked


def _write(asked: Asked) -> None:
    """Write a line in one call: it is complete unless the process was killed during it."""
    os.write(1, json.dumps(dataclasses.asdict(asked)).encode() + b"\n")


def _read(line: bytes) -> Asked:
    fields = json.loads(line)
    fields["names"] = tuple(fields["names"])
    fields["usage"] = fields["usage"] and tuple(fields["usage"])
    return Asked(**fields)


@click.command()
@click.argument("address")
@click.argument("seed", type=int)
def main(address: str, seed: int) -> None:
    asyncio.run(Asker(TENANT, _choose, CONCURRENCY, seed).run(address, lambda: False, _write, _write))


@dataclass
class Mortals:
    """Starts client processes one after another and kills each while answers arrive."""

    address: str
    tell: Callable[[Asked], None]
    over: threading.Event
    killed: int = 0

    def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.over.is_set():
            self._one_life(chance)

    def _one_life(self, chance: random.Random) -> None:
        command = [sys.executable, "-m", "soak.mortal", self.address, str(chance.randrange(2**30))]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        }
        running: dict[int, Asked] = {}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:  # noqa: S603
            assert process.stdout
            death = threading.Timer(chance.uniform(0.2, 3.0), process.kill)
            for line in process.stdout:
                if not death.ident:
                    death.start()
                if line.endswith(b"\n"):
                    asked = _read(line)
                    running[asked.number] = asked
                    if asked.outcome:
                        self.tell(running.pop(asked.number))
        self.killed += 1
        for asked in running.values():
            asked.outcome, asked.ended = "killed", time.monotonic()
            self.tell(asked)


if __name__ == "__main__":
    main()
