from __future__ import annotations

import resource

import pytest

from turret_server.doors.limits import max_connections


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "connections"),
    [
        # As many files as the system allows, and not fewer than before.
        (1024, 4096, 4096, 4096 - 512),
        (1024, 2**20, 2**16, 2**16 - 512),
        (1024, resource.RLIM_INFINITY, 2**16, 2**16 - 512),
        (2**17, 2**20, 2**17, 2**17 - 512),
        # Of few files connections get half.
        (256, 400, 400, 200),
    ],
)
def test_connections_leave_files_for_the_server(monkeypatch, soft, hard, allowed, connections):
    limits = {}
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_NOFILE: (soft, hard)}.get)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    assert max_connections() == connections
    assert limits == {resource.RLIMIT_NOFILE: (allowed, hard)}
