"""A child process that says in its log when it is ready, and is ended with the benchmark."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.layout import BENCH
from bench.work import NotRunError

_PATIENCE_SECONDS = 600


class LoggedProcess:
    """`log` is where its standard error goes: for a person, and to see that it is ready."""

    def __init__(
        self, name: str, command: Sequence[str | Path], env: Mapping[str, str], *, pipes: bool = False
    ) -> None:
        self.name = name
        self.log = BENCH / "logs" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        with self.log.open("w") as file:
            self.process = subprocess.Popen(  # noqa: S603 (the benchmark's own command)
                [str(word) for word in command],
                stdin=pipe,
                stdout=pipe,
                stderr=file,
                text=True,
                env=dict(env),
            )

    def wait_for(self, pattern: str) -> str:
        """The first group of what the log says.

        Raises:
            NotRunError: the process ended first, or did not say it in ten minutes.
        """
        while time.perf_counter() - self.started < _PATIENCE_SECONDS:
            ended = self.process.poll() is not None
            if match := re.search(pattern, self.log.read_text(errors="replace")):
                return match[1]
            if ended:
                raise self.failed()
            time.sleep(0.02)
        raise self.failed()

    def failed(self) -> NotRunError:
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no word"]
        return NotRunError(f"failed: {lines[-1][:80]}; see {self.log.relative_to(BENCH.parent)}")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
