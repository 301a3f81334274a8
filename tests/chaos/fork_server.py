"""Servers that start within a second, forked from a process that has imported everything.

    python -m chaos.fork_server

Requests are lines of JSON on standard input: the arguments and the log file of a server to start, answered
with its process id; or the id of a process to wait for, answered with its exit status.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from support.prompts import until

TESTS = Path(__file__).parents[1]


class ForkedServer:
    """One server, with the subset of `support.serving.ServerProcess` that is used here."""

    def __init__(self, fork_server: ForkServer, arguments: list[str], log: Path) -> None:
        self._fork_server = fork_server
        self._log = log
        log.touch()
        addresses = ["--listen", "127.0.0.1:0", "--http", "none", "--metrics", "127.0.0.1:0"]
        self._pid = fork_server.call({"arguments": ["serve", *arguments, *addresses], "log": str(log)})
        self.running = True

    def wait_until_it_serves(self) -> None:
        until(lambda: bool(re.search(r"serving on|\berror", self._log.read_text())))

    @property
    def log(self) -> list[str]:
        return self._log.read_text().splitlines()

    @property
    def address(self) -> str:
        found = re.search(r"serving on ([\w.:]+)", self._log.read_text())
        assert found, self._log.read_text()
        return found[1]

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, signal_number: int) -> int:
        os.kill(self._pid, signal_number)
        self.running = False
        return os.waitstatus_to_exitcode(self._fork_server.call({"wait": self._pid}))


class ForkServer:
    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        self._folder = TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def call(self, request: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    @contextmanager
    def server(self, *arguments: str) -> Iterator[ForkedServer]:
        """Fork a server; it has not finished starting when this returns."""
        self._number += 1
        server = ForkedServer(self, [*arguments], Path(self._folder.name) / f"{self._number}.log")
        try:
            yield server
        finally:
            if server.running:
                server.kill()


def main() -> None:
    import turret_server.app.run  # noqa: F401, PLC0415 -- imported once, before the forks
    from turret_cli.main import main as turret  # noqa: PLC0415

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, reply = os.waitpid(request["wait"], 0)
        else:
            reply = os.fork()
            if not reply:
                _redirect(request["log"])
                turret(request["arguments"])
        sys.stdout.write(f"{reply}\n")
        sys.stdout.flush()


def _redirect(log: str) -> None:
    """Redirect standard input and output to /dev/null, and standard error to the log."""
    null, file = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(file, 2)


if __name__ == "__main__":
    main()
