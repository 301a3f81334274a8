"""Servers to talk to: one inside the test's process, whose books can be looked at, and a real process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from turret_server.app.assembly import assemble
from turret_server.app.build import Parts
from turret_server.app.doors import make_doors
from turret_server.config import ServerConfig, default_store
from turret_server.model.sampler import Sampler
from turret_server.rpc.server import RpcServer
from turret_server.web.server import WebServer

# Only so that a failing test ends: on a busy machine a start takes minutes.
_HANG_SECONDS = 900.0
_DEFAULT_HTTP = ServerConfig(model="m").http
# The command that the package installs.
TURRET = str(Path(sys.executable).with_name("turret"))


@dataclass(frozen=True)
class Served:
    address: str
    parts: Parts
    http: str
    """The URL of the HTTP server; "" if it is off, as it is unless the settings name an address."""

    def metric(self, name: str, **labels: str) -> float:
        return self.parts.metrics.get_sample_value(name, labels) or 0.0


@contextmanager
def serving(config: ServerConfig, sampler: Sampler | None = None) -> Iterator[Served]:
    """The whole server on loopback ports, in threads of this process, with nothing in its store unless
    `config` names another, and without HTTP unless `config` names a free port.
    """
    if config.http == _DEFAULT_HTTP:
        config = replace(config, http=None)
    with TemporaryDirectory() as store, assemble(_alone(config, Path(store)), sampler) as parts:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        server, web, address, url = asyncio.run_coroutine_threadsafe(_start(parts, config), loop).result()
        try:
            yield Served(address, parts, url)
        finally:
            for door in filter(None, (web, server)):
                asyncio.run_coroutine_threadsafe(door.stop(0), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def _alone(config: ServerConfig, store: Path) -> ServerConfig:
    return replace(config, store=store) if config.store == default_store() else config


async def _start(parts: Parts, config: ServerConfig) -> tuple[RpcServer, WebServer | None, str, str]:
    server, web = make_doors(parts, config)
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    url = f"{web.scheme}://127.0.0.1:{await web.start('127.0.0.1:0')}" if web else ""
    await server.ready()
    return server, web, address, url


class ServerProcess:
    """`turret serve` as a user starts it. `log` grows while it runs."""

    def __init__(self, *arguments: str, program: Sequence[str] = (TURRET,)) -> None:
        self._data = TemporaryDirectory()
        command = [*program, "serve", *arguments]
        self.process = subprocess.Popen(  # noqa: S603 (the command is this test's)
            [*command, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--metrics", "127.0.0.1:0"],
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",  # what strangers send may come up in the log of gRPC
            env=os.environ | {"PYTHONUNBUFFERED": "1", "XDG_DATA_HOME": self._data.name},
        )
        self.log: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self._ready.wait(_HANG_SECONDS):
            self.kill()
            raise AssertionError("".join(self.log))

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)
            if "serving on" in line:
                self._ready.set()
        self._ready.set()

    def _found(self, pattern: str) -> str:
        for line in self.log:
            if match := re.search(pattern, line):
                return match[1]
        raise AssertionError("".join(self.log))

    @property
    def address(self) -> str:
        return self._found(r"serving on ([\w.:]+)")

    @property
    def http(self) -> str:
        """The URL of the HTTP server."""
        return self._found(r"HTTP on (\S+)")

    @property
    def metrics_url(self) -> str:
        return self._found(r"metrics on ([\w.:/]+)")

    def metrics(self) -> dict[str, float]:
        """Every sample by its name with its labels, as Prometheus writes them."""
        with urllib.request.urlopen(self.metrics_url) as response:  # noqa: S310 (loopback)
            lines = response.read().decode().splitlines()
        return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, signal_number: int) -> int:
        self.process.send_signal(signal_number)
        return self.wait()

    def wait(self) -> int:
        """The exit status of one that has been told to end, or ends by itself."""
        status = self.process.wait(timeout=_HANG_SECONDS)
        self._reader.join()
        assert self.process.stderr
        self.process.stderr.close()
        self._data.cleanup()
        return status


@contextmanager
def server_process(
    model: Path, cache: Path, *arguments: str, program: Sequence[str] = (TURRET,)
) -> Iterator[ServerProcess]:
    where = ("--model", str(model), "--cache", str(cache), "--device", "cpu", "--dtype", "float32")
    server = ServerProcess(*where, *arguments, program=program)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
