"""The server of the soak, with its limits and tenants."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soak.killed_clients import TENANT as KILLED
from support.serving import ServerProcess, server_process
from turret_server.kernels import has_avx512bf16
from turret_server.tenancy.keys import digest_of

# Where the CPU has AVX512-BF16, answers in bfloat16 do not depend on the batch.
DTYPE = "bfloat16" if has_avx512bf16() else "float32"

# Room for some of the adapters in the arena, in host memory and in the store, and for some of the requests.
PAGES, PAGE_BYTES = 56, {"bfloat16": 6144, "float32": 12288}[DTYPE]
HOST_BYTES = 150 << 10
STORE_BYTES = 2500 << 10
# Each concurrent load adds a revision to the store until one is deleted.
STORE_SLACK = 6 * (100 << 10)

STABLE = {
    "stable-lora": "lora-0",
    "stable-prefix": "prefix-0",
    "stable-prompt": "prompt-0",
    "stable-ia3": "ia3-0",
}
CHURN = tuple(f"churn-{index}" for index in range(6))
WATCHED = tuple(f"watched-{index}" for index in range(4))
ALL_NAMES = (*STABLE, *CHURN, *WATCHED)

OPERATOR, CANCELLING, SMALL, POOR = "operator", "cancelling", "small", "poor"
# These tenants do not cancel and are not killed, so the server's counts must match exactly.
EXACT = ("acme", "bolt", SMALL, POOR)
# Prefix of the names that a tenant may not use.
FORBIDDEN = {"bolt": "churn-"}
_TENANTS = {
    "acme": 'use = ["*"]\nweight = 2.0',
    "bolt": 'use = ["stable-*", "watched-*"]\nshare_cache = true',
    SMALL: 'use = ["*"]\nmax_queued_requests = 1',
    POOR: 'use = ["*"]\ntokens_per_minute = 4000',
    CANCELLING: 'use = ["stable-*"]\nshare_cache = true',
    KILLED: 'use = ["stable-*"]',
    OPERATOR: "admin = true",
}


def write_tenants(path: Path) -> Path:
    """Write the tenants file; each tenant's key is its name."""
    path.write_text(
        "".join(
            f'[tenants.{name}]\nkeys = ["{digest_of(name)}"]\n{more}\n' for name, more in _TENANTS.items()
        )
    )
    return path


@contextmanager
def constrained_server(root: Path) -> Iterator[ServerProcess]:
    (root / "watched").mkdir()
    arguments = {
        "--dtype": DTYPE,
        "--memory": PAGES * PAGE_BYTES,
        "--host-memory": HOST_BYTES,
        "--store": root / "store",
        "--store-size": STORE_BYTES,
        "--adapters": root / "watched",
        "--tenants": write_tenants(root / "tenants.toml"),
        "--usage-log": root / "usage.jsonl",
        "--max-batch-tokens": 64,
        "--max-batch-requests": 12,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    program = (sys.executable, "-m", "soak.pools", str(root / "pools.json"))
    with server_process(root / "model", root / "cache", "--watch", *words, program=program) as server:
        yield server


@contextmanager
def idle_server(root: Path) -> Iterator[ServerProcess]:
    arguments = ("--dtype", DTYPE, "--memory", "64MiB", "--store", str(root / "idle-store"))
    with server_process(root / "model", root / "cache", *arguments) as server:
        yield server
