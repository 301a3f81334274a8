from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from turret_cli.main import main


@pytest.fixture(scope="session")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "python" / "scripted_server.py"
    spec = importlib.util.spec_from_file_location("scripted_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(script) -> Iterator[Any]:
    with script.ScriptedServer() as server:
        yield server


@pytest.fixture
def turret(server) -> Callable[..., Result]:
    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner(env={"TURRET_SERVER": server.address}).invoke(main, arguments, input=stdin)

    return run
