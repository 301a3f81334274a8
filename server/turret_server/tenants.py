"""The tenants file: who gets which share of the server, and how much of whom may wait.

    [tenants.acme]
    weight = 2.0
    max_queued_requests = 100
    max_queued_tokens = 200_000

What a tenant's table leaves out, and every tenant without a table, has the server's defaults.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError

_FIELDS = {field.name for field in fields(TenantLimits)}


def read_tenants(path: Path | None, default: TenantLimits) -> Callable[[str], TenantLimits]:
    """The limits of a tenant by its name.

    Raises:
        ConfigError: the file cannot be read, or holds something that is not known or cannot be.
    """
    if path is None:
        return lambda _: default
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tenants {path}: expected a TOML file; {error}") from error
    tables = content.pop("tenants", {})
    if content or not isinstance(tables, dict):
        raise ConfigError(f"--tenants {path}: expected tables named [tenants.NAME] and nothing else")
    limits = {name: _limits(f"--tenants {path}: {name}", table, default) for name, table in tables.items()}
    return lambda tenant: limits.get(tenant, default)


def _limits(where: str, table: object, default: TenantLimits) -> TenantLimits:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table [tenants.NAME], found {table!r}")
    unknown = sorted(table.keys() - _FIELDS)
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]!r} is not known; there are {', '.join(sorted(_FIELDS))}")
    for name, value in table.items():
        types, kind = ((int, float), "number") if name == "weight" else ((int,), "whole number")
        if isinstance(value, bool) or not isinstance(value, types) or not 0 < value < math.inf:
            raise ConfigError(f"{where}: {name} is a {kind} above 0; found {value!r}")
    return replace(default, **table)
