"""Signals in every phase of a real server process."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from turret_adapters.store.store import AdapterStore
from turret_server.app.build import assemble
from turret_server.config import ServerConfig
from turret_server.errors import ConfigError

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


def start(program: str, model: Path, cache: Path) -> subprocess.Popen[str]:
    arguments = ("--model", str(model), "--cache", str(cache), "--store", str(cache / "store"))
    ports = ("--listen", "127.0.0.1:0", "--metrics", "none", "--memory", "1MiB")
    return subprocess.Popen(  # noqa: S603 -- our own code
        ["/usr/bin/env", "--default-signal=INT", sys.executable, "-c", program, "serve", *arguments, *ports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_whose_model_is_loading(number, tmp_path):
    with start(LOADING, tmp_path, tmp_path) as server:
        assert server.stdout.readline() == "reached\n"
        server.send_signal(number)
        _, log = server.communicate(timeout=HANG_S)
    assert server.returncode == 0
    assert log.splitlines()[-1].endswith("stopped before the server was ready")


def test_a_second_signal_does_not_cut_the_closing_off(base_of, quantised_cache):
    with start(CLOSING, base_of("llama"), quantised_cache) as server:
        assert any("serving on" in line for line in server.stderr)
        server.send_signal(signal.SIGTERM)
        assert server.stdout.readline() == "reached\n"
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate("go on\n", timeout=HANG_S)
    assert (server.returncode, rest) == (0, "closed\n")


def test_a_second_server_on_a_store_is_refused_in_one_sentence_before_the_model_is_loaded(tmp_path):
    with closing(AdapterStore(tmp_path / "store")), start(LOADING, tmp_path, tmp_path) as server:
        out, log = server.communicate(timeout=HANG_S)
    assert (server.returncode, out) == (1, "")
    assert log.splitlines()[-1].startswith(f"error: store '{tmp_path}/store': another server")
    assert log.splitlines()[-1].endswith("--store (STORE_BUSY)")
    assert "Traceback" not in log


def test_a_start_that_fails_frees_the_store(tmp_path):
    config = ServerConfig(model=str(tmp_path / "none"), store=tmp_path / "store", device="cpu")
    with pytest.raises(ConfigError, match="--model"), assemble(config):
        pass
    AdapterStore(tmp_path / "store").close()
