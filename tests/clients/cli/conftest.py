from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from turret_cli.main import main


@pytest.fixture
def turret(server) -> Callable[..., Result]:
    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner(env={"TURRET_SERVER": server.address}).invoke(main, arguments, input=stdin)

    return run
