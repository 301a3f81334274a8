"""Servers that start within a second: a process that has imported everything forks each of them.

    python -m chaos.nursery

It reads one line per server, the list of a command's arguments and the log file, and answers with the process
id; and one line with the id of a server that was stopped, and answers with its exit status.
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


class Nursling:
    """One server, with the parts of `support.serving.ServerProcess` that are needed here."""

    def __init__(self, nursery: Nursery, arguments: list[str], log: Path) -> None:
        self._nursery = nursery
        self._log = log
        log.touch()
        where = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        self._pid = nursery.ask({"arguments": ["serve", *arguments, *where], "log": str(log)})
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
        return os.waitstatus_to_exitcode(self._nursery.ask({"wait": self._pid}))


class Nursery:
    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        self._folder = TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.nursery"],
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

    def ask(self, question: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    @contextmanager
    def server(self, *arguments: str) -> Iterator[Nursling]:
        """Fork a server; it has not finished starting when this returns."""
        self._number += 1
        server = Nursling(self, [*arguments], Path(self._folder.name) / f"{self._number}.log")
        try:
            yield server
        finally:
            if server.running:
                server.kill()


def main() -> None:
    import turret_server.app.run  # noqa: F401, PLC0415 -- what takes so long otherwise
    from turret_cli.main import main as turret  # noqa: PLC0415

    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, answer = os.waitpid(question["wait"], 0)
        else:
            answer = os.fork()
            if not answer:
                _become(question["log"])
                turret(question["arguments"])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _become(log: str) -> None:
    """Redirect standard input and output to /dev/null, and standard error to the log."""
    nothing, file = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(file, 2)


if __name__ == "__main__":
    main()
