from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import generate
from turret_adapters.errors import AdapterError
from turret_server.errors import TurretError

README = Path(generate.__file__).with_name("README.md")
# Raised before the server serves.
AT_START = {"INVALID_CONFIG", "UNSUPPORTED_MODEL"}


def subclasses(error: type) -> Iterator[type]:
    for each in error.__subclasses__():
        yield each
        yield from subclasses(each)


def test_the_table_of_errors_lists_every_reason_with_its_statuses():
    errors = {
        error.reason: (error.code, str(error.http_status))
        for tree in (TurretError, AdapterError)
        for error in subclasses(tree)
        if error.reason not in AT_START
    }
    listed, status = {}, ""
    for row in re.findall(
        r"^\| ([A-Z_]*) ?\| ([A-Z_]+) \| (\d+) \| .+ \|$", README.read_text(), re.MULTILINE
    ):
        status = row[0] or status
        listed[row[1]] = status, row[2]
    assert listed == errors
