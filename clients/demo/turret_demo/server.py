"""The real server, as a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Self


class Server:
    """`turret serve` on ports that the system chooses; what it logs goes to `log`."""

    def __init__(self, model: Path, cache: Path, log: Path) -> None:
        turret = Path(sys.executable).with_name("turret")
        ports = ["--listen", "127.0.0.1:0", "--http", "none", "--metrics", "127.0.0.1:0"]
        self._log = log
        started = time.monotonic()
        with log.open("w") as file:
            self._process = subprocess.Popen(  # noqa: S603 (the command is this package's own)
                [turret, "serve", "--model", model, "--cache", cache, "--store", cache / "adapters", *ports],
                stderr=file,
            )
        try:
            self.address = self._wait_for(r"serving on (\S+)")
        except BaseException:
            self._process.kill()
            raise
        self.metrics_url = self._wait_for(r"metrics on (\S+)")
        self.pid = self._process.pid
        self.start_seconds = time.monotonic() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def metrics(self) -> dict[str, float]:
        """Every sample that Prometheus would scrape now."""
        with urllib.request.urlopen(self.metrics_url) as response:  # noqa: S310 (loopback)
            lines = response.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def _wait_for(self, pattern: str) -> str:
        waiting = threading.Event()
        while self._process.poll() is None:
            if match := re.search(pattern, self._log.read_text()):
                return match[1]
            waiting.wait(0.1)
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()}")
