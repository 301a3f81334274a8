"""Signals in every phase of a real server process."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from turret.v1 import inference_pb2, inference_pb2_grpc
from turret_adapters.store.store import AdapterStore
from turret_server.app.assembly import assemble
from turret_server.app.run import Shutdown, _check_port, _serve_metrics
from turret_server.config import ServerConfig
from turret_server.engine.watchdog import Pace
from turret_server.errors import ConfigError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

HANG_S = 120
"""Only so that a failing test ends."""

# It writes a line when it has come to the phase, and goes on when it reads one.
LOADING = """
import sys
from turret_cli.main import main
from turret_server.app import build

def load_model(*_, **__):
    print("reached", flush=True)
    sys.stdin.readline()

build.load_model = load_model
main(sys.argv[1:])
"""
# Without the model's libraries.
EARLY = """
import sys
from turret_cli.main import main

sys.modules["torch"] = None
main(sys.argv[1:])
"""
CLOSING = """
import sys
from turret_adapters.library import AdapterLibrary
from turret_cli.main import main

close = AdapterLibrary.close

def close_slowly(self):
    print("reached", flush=True)
    sys.stdin.readline()
    close(self)
    print("closed", flush=True)

AdapterLibrary.close = close_slowly
main(sys.argv[1:])
"""
# Its first step never ends.
HANGING = """
import sys, threading
from turret_cli.main import main
from turret_server.engine import watchdog
from turret_server.model.runner import ModelRunner

watchdog._LATE_SECONDS = 0.1
watchdog._LATE_STEPS = 0.1
ModelRunner.run = lambda *_: threading.Event().wait()
main(sys.argv[1:])
"""


def start(program: str, model: Path, cache: Path, *more: str) -> subprocess.Popen[str]:
    if model.is_dir() and not (model / "config.json").exists():
        (model / "config.json").touch()  # enough to be taken for a model
    arguments = ("--model", str(model), "--cache", str(cache), "--store", str(cache / "store"))
    arguments += ("--listen", "127.0.0.1:0", "--http", "none", "--metrics", "none", "--memory", "1MiB", *more)
    return subprocess.Popen(  # noqa: S603 -- our own code
        ["/usr/bin/env", "--default-signal=INT", sys.executable, "-c", program, "serve", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_whose_model_is_loading(number, tmp_path):
    with start(LOADING, tmp_path, tmp_path) as server:
        assert server.stdout.readline() == "reached\n"
        server.send_signal(number)
        _, log = server.communicate(timeout=HANG_S)
    assert server.returncode == 0
    assert log.splitlines()[-1].endswith("stopping before the server is ready")


@pytest.mark.slow
def test_a_step_that_hangs_turns_readiness_off_then_liveness_and_does_not_hold_the_end_up(
    base_of, quantised_cache, tmp_path
):
    usage = ("--usage-log", str(tmp_path / "usage.jsonl"), "--grace", "0")
    with ExitStack() as stack:
        server = stack.enter_context(start(HANGING, base_of("llama"), quantised_cache, *usage))
        stack.callback(server.kill)
        log = []

        def logged(words: str) -> str:
            for line in server.stderr:
                log.append(line)
                if words in line:
                    return line
            raise AssertionError("".join(log))

        address = logged("serving on").split()[-1]
        logged("ready")
        channel = stack.enter_context(grpc.insecure_channel(address))
        request = inference_pb2.GenerateRequest(text="the", max_tokens=9)
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate.future(request)
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        watch_life = stub.Watch(health_pb2.HealthCheckRequest(service="liveness"))
        assert [next(watch).status, next(watch).status] == [SERVING, NOT_SERVING]
        assert [next(watch_life).status, next(watch_life).status] == [SERVING, NOT_SERVING]
        assert stub.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
        server.send_signal(signal.SIGTERM)
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        rest = server.stderr.read()
        assert server.wait(HANG_S) == 1
    assert "hangs, and liveness is NOT_SERVING" in "".join(log) + rest
    assert rest.splitlines()[-1].endswith("does not stop; the process ends without it")
    [entry] = (tmp_path / "usage.jsonl").read_text().splitlines()
    assert json.loads(entry)["finish_reason"] == "shutting_down"


@pytest.mark.slow
def test_a_second_signal_does_not_cut_the_closing_off(base_of, quantised_cache):
    with start(CLOSING, base_of("llama"), quantised_cache) as server:
        assert any("serving on" in line for line in server.stderr)
        server.send_signal(signal.SIGTERM)
        assert server.stdout.readline() == "reached\n"
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate("go on\n", timeout=HANG_S)
    assert (server.returncode, rest) == (0, "closed\n")


def test_a_second_server_on_a_store_is_refused_in_one_sentence_before_the_model_is_loaded(tmp_path):
    with closing(AdapterStore(tmp_path / "store")), start(EARLY, tmp_path, tmp_path) as server:
        out, log = server.communicate(timeout=HANG_S)
    assert (server.returncode, out) == (1, "")
    assert log.splitlines()[-1].startswith(f"error: store '{tmp_path}/store': another server")
    assert log.splitlines()[-1].endswith("--store (STORE_BUSY)")
    assert "Traceback" not in log


def test_a_model_folder_that_is_not_there_is_named_at_once(tmp_path):
    with start(EARLY, tmp_path / "nowhere", tmp_path) as server:
        _, log = server.communicate(timeout=HANG_S)
    assert server.returncode == 2
    expected = f"error: --model {tmp_path}/nowhere: no such folder; check the path (INVALID_CONFIG)"
    assert log.splitlines()[-1] == expected


@pytest.mark.parametrize("flag", ["--listen", "--http", "--metrics"])
def test_a_port_that_is_in_use_is_refused_before_the_model_is_loaded(flag, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with start(EARLY, tmp_path, tmp_path, flag, address) as server:
            out, log = server.communicate(timeout=HANG_S)
    assert (server.returncode, out) == (2, "")
    assert log.splitlines()[-1] == (
        f"error: {flag} {address}: the port cannot be opened (Address already in use); stop the program that "
        "uses it, or choose another (INVALID_CONFIG)"
    )


def test_a_start_that_fails_frees_the_store(tmp_path):
    config = ServerConfig(model=str(tmp_path / "none"), store=tmp_path / "store", device="cpu")
    with pytest.raises(ConfigError, match="--model"), assemble(config):
        pass
    AdapterStore(tmp_path / "store").close()


def test_a_port_for_metrics_that_is_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--metrics {address}: .*another port"):
            _serve_metrics(address, CollectorRegistry())


class Recorded:
    """A server's parts that note in which order they are used."""

    def __init__(self, *, failed: bool = False, num_running: int = 1) -> None:
        self.used: list[str] = []
        note = self._note
        self.stops = [True]
        self.engine = SimpleNamespace(
            failed=failed, on_failure=None, stop=self._stop_engine, abandon=note("engine.abandon")
        )
        self.watchdog = SimpleNamespace(pace=Pace.NORMAL)
        self.watches = SimpleNamespace(close=note("watches.close"))
        self.lifecycle = SimpleNamespace(interrupt=note("lifecycle.interrupt"))
        self.calls = SimpleNamespace(
            num_running=num_running,
            skip_grace=note("calls.skip_grace"),
            wait_grace=self._note_async("calls.wait_grace"),
            wait=self._note_async("calls.wait"),
            end=note("calls.end"),
        )
        self.drain = self._note_async("drain")
        self.stop = self._note_async("stop")

    def _stop_engine(self, _: float) -> bool:
        self.used.append("engine.stop")
        return self.stops.pop(0)

    def _note(self, what: str) -> Callable[..., None]:
        return lambda *values: self.used.append(" ".join([what, *map(str, values)]))

    def _note_async(self, what: str) -> Callable[..., Any]:
        async def use(*values: object) -> None:
            self._note(what)(*values)

        return use


async def test_new_calls_are_refused_before_running_ones_are_waited_for_and_ended_after():
    parts = Recorded()
    await Shutdown(parts, None, parts, parts.watchdog).drain(30)
    assert parts.used == [
        "drain",
        "watches.close",
        "calls.wait_grace 30",
        "engine.stop",
        "calls.wait 2.0",
        "calls.end",
        "lifecycle.interrupt",
        "calls.wait 2.0",
        "stop 2.0",
    ]


async def test_a_step_that_is_slow_is_waited_for_and_one_that_hangs_is_not():
    parts = Recorded()
    parts.stops = [False, False, True]
    assert await Shutdown(parts, None, parts, parts.watchdog).drain(30)
    assert (parts.used.count("engine.stop"), parts.used.count("engine.abandon")) == (3, 0)
    parts = Recorded()
    parts.stops, parts.watchdog.pace = [False], Pace.LATE
    assert not await Shutdown(parts, None, parts, parts.watchdog).drain(30)
    assert (parts.used.count("engine.stop"), parts.used.count("engine.abandon")) == (1, 1)
    # Calls are ended and told all the same.
    assert parts.used[-4:] == ["calls.end", "lifecycle.interrupt", "calls.wait 2.0", "stop 2.0"]


async def test_after_a_failure_of_the_engine_nothing_is_waited_for():
    parts = Recorded(failed=True)
    shutdown = Shutdown(parts, None, parts, parts.watchdog)
    assert shutdown.requested.is_set()
    await shutdown.drain(30)
    assert parts.used[:3] == ["drain", "watches.close", "engine.stop"]


async def test_a_failure_of_the_engine_ends_the_server():
    parts = Recorded()
    shutdown = Shutdown(parts, None, parts, parts.watchdog)
    assert not shutdown.requested.is_set()
    await asyncio.to_thread(parts.engine.on_failure)
    await shutdown.requested.wait()


async def test_a_second_request_ends_the_grace_period():
    parts = Recorded()
    shutdown = Shutdown(parts, None, parts, parts.watchdog)
    shutdown.request()
    assert (shutdown.requested.is_set(), parts.used) == (True, [])
    shutdown.request()
    assert parts.used == ["calls.skip_grace"]


def test_a_port_that_only_waits_for_late_packets_can_be_opened_again():
    """As after a restart: whoever closes a connection first keeps its port for a while."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as client:
            connection, _ = server.accept()
            connection.close()
            assert client.recv(1) == b""
    _check_port("--listen", f"127.0.0.1:{address[1]}")


def test_an_address_that_this_machine_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"^--metrics 192\.0\.2\.1:0: the port cannot be opened \("):
        _check_port("--metrics", "192.0.2.1:0")


@pytest.mark.parametrize("num_running", [0, 1])
async def test_calls_that_are_cut_off_are_in_the_log(num_running, caplog):
    parts = Recorded(num_running=num_running)
    await Shutdown(parts, None, parts, parts.watchdog).drain(0)
    assert caplog.messages == ["1 calls have not finished and are ended now"][:num_running]
