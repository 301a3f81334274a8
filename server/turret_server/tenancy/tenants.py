"""The tenants file: who may do what, gets which share of the server, and how much of it.

    [tenants.acme]
    keys = ["sha256:…"]                     # of API keys that `turret tenants key acme` makes
    identities = ["acme.example.com"]       # common or alternative names of certificates (mutual TLS)
    use = ["acme-*", "shared-*"]            # patterns of adapters' names
    load = ["acme-*"]
    unload = ["acme-*"]
    sources = ["/srv/adapters/acme", "hf://acme"]   # where what it loads may come from
    admin = false                           # true: may do all of that with any adapter
    share_cache = false                     # true: shares cached prompts with all others that say so
    weight = 2.0
    max_queued_requests = 100
    max_queued_tokens = 200_000
    max_concurrent_requests = 20            # that wait or run
    tokens_per_minute = 100_000             # of prompts and answers
    max_adapters = 50                       # names that serve what it loaded
    max_adapter_bytes = 20_000_000_000      # what it loaded takes on the disk, or in memory if that is more
    max_device_bytes = 2_000_000_000        # of the arena, adapters that it uses or was the last to use
    max_concurrent_loads = 2                # that wait or run
    max_pinned_tokens = 50_000              # of prompts that it has pinned
    max_watches = 4                         # of adapters

Earlier revisions of its adapters count as well; to stay within `max_adapter_bytes` the oldest of them go.
What a tenant's table leaves out of rights it does not have; of limits, it has the server's defaults. Where no
table has keys or identities, the server is open: a call names its tenant itself and may do everything.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from turret_adapters.store.names import Ownership
from turret_server.config import NAME
from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError, InvalidRequestError
from turret_server.tenancy.keys import digest_of, is_digest


def check_name(name: str, field: str = "name", of: str = "an adapter") -> str:
    """Return a name that is valid for a tenant, an adapter or a pinned prompt.

    Raises:
        InvalidRequestError: it is not.
    """
    if not NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{of}'s name has 1 to 128 of the characters a-z A-Z 0-9 . _ - and begins with a letter or a "
            f"digit; found {name[:140]!r}",
            field=field,
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who calls. `keys` are digests; `use`, `load` and `unload` are patterns of adapters' names. It is
    `proven` where a key or a certificate says so, not where the server is open.

    Tenants with the same `cache_domain` find each other's cached prompts.
    """

    name: str
    limits: TenantLimits
    keys: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    use: tuple[str, ...] = ()
    load: tuple[str, ...] = ()
    unload: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    admin: bool = False
    share_cache: bool = False
    max_concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    max_adapters: int | None = None
    max_adapter_bytes: int | None = None
    max_device_bytes: int | None = None
    max_concurrent_loads: int | None = None
    max_pinned_tokens: int | None = None
    max_watches: int | None = None
    proven: bool = True

    @property
    def cache_domain(self) -> str:
        return "" if self.share_cache else self.name

    @property
    def ownership(self) -> Ownership:
        """Of what it loads."""
        return Ownership(owner=self.name, max_names=self.max_adapters, max_bytes=self.max_adapter_bytes)

    def may_use(self, adapter: str) -> bool:
        return self.admin or _matches(adapter, self.use)

    def may_load(self, adapter: str) -> bool:
        return self.admin or _matches(adapter, self.load)

    def may_unload(self, adapter: str) -> bool:
        return self.admin or _matches(adapter, self.unload)


class TenantTable:
    """What one version of the file says. Where it is `hooked`, somebody else says whose a call is."""

    def __init__(self, tenants: Iterable[Tenant], default: TenantLimits, *, hooked: bool = False) -> None:
        self._default = default
        self._hooked = hooked
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self._by_key = _index("key", self._tenants.values(), lambda tenant: tenant.keys)
        self._by_identity = _index("identity", self._tenants.values(), lambda tenant: tenant.identities)

    @property
    def is_open(self) -> bool:
        """Whether nobody has to show who it is."""
        return not self._hooked and not self._by_key and not self._by_identity

    @property
    def has_identities(self) -> bool:
        return bool(self._by_identity)

    def limits(self, name: str) -> TenantLimits:
        found = self._tenants.get(name)
        return found.limits if found else self._default

    def max_device_bytes(self, name: str) -> int | None:
        found = self._tenants.get(name)
        return found.max_device_bytes if found else None

    def by_name(self, name: str) -> Tenant:
        """Who is called so by somebody who knows; without a table of its own, it has no rights."""
        return self._tenants.get(name) or Tenant(name=name, limits=self._default)

    def by_key(self, key: str) -> Tenant | None:
        """Whose key it is. It is found by its digest: what the time of a look-up could tell is about the
        digest of a guess, from which nobody comes to another guess, let alone to a name.
        """
        return self._by_key.get(digest_of(key))

    def by_identities(self, identities: Iterable[str]) -> Tenant | None:
        """Whose certificate it is, by the first of its names that is somebody's."""
        found = (self._by_identity.get(identity) for identity in identities)
        return next(filter(None, found), None)

    def unproven(self, name: str) -> Tenant:
        """Somebody who says so, which is enough where the server is open."""
        return replace(self.by_name(name), admin=True, share_cache=True, proven=False)


def parse_tenants(where: str, content: bytes, default: TenantLimits, *, hooked: bool = False) -> TenantTable:
    """What a tenants file of this content says. `hooked` is as for the table.

    Raises:
        ConfigError: it holds something that is not known or cannot be.
    """
    try:
        parsed = tomllib.loads(content.decode())
    except ValueError as error:
        raise ConfigError(f"{where}: expected a TOML file; {error}") from error
    tables = parsed.pop("tenants", {})
    if parsed or not isinstance(tables, dict):
        raise ConfigError(f"{where}: expected tables named [tenants.NAME] and nothing else")
    try:
        found = [_tenant(name, entry, default) for name, entry in tables.items()]
        table = TenantTable(found, default, hooked=hooked)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if table.is_open and (unproven := [name for name, entry in tables.items() if entry.keys() & _RIGHTS]):
        raise ConfigError(
            f"{where}: {unproven[0]}: rights protect nothing where anybody may say that they are "
            f"{unproven[0]}; give tenants keys (`turret tenants key {unproven[0]}`) or identities"
        )
    return table


def _number(value: Any) -> str | None:
    ok = not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf
    return None if ok else "a number above 0"


def _whole(value: Any) -> str | None:
    ok = not isinstance(value, bool) and isinstance(value, int) and value > 0
    return None if ok else "a whole number above 0"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _texts(value: Any) -> str | None:
    ok = isinstance(value, list) and all(isinstance(each, str) and each for each in value)
    return None if ok else "a list of texts that are not empty"


def _digests(value: Any) -> str | None:
    ok = _texts(value) is None and all(map(is_digest, value))
    return None if ok else 'a list of digests "sha256:…", which `turret tenants key NAME` prints'


def _places(value: Any) -> str | None:
    ok = _texts(value) is None and all("://" in each or Path(each).is_absolute() for each in value)
    return None if ok else "a list of absolute folders and beginnings of URLs"


# What a value must be, or None where it is.
_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "keys": _digests,
    "identities": _texts,
    "use": _texts,
    "load": _texts,
    "unload": _texts,
    "sources": _places,
    "admin": _flag,
    "share_cache": _flag,
    "weight": _number,
    "max_queued_requests": _whole,
    "max_queued_tokens": _whole,
    "max_concurrent_requests": _whole,
    "tokens_per_minute": _whole,
    "max_adapters": _whole,
    "max_adapter_bytes": _whole,
    "max_device_bytes": _whole,
    "max_concurrent_loads": _whole,
    "max_pinned_tokens": _whole,
    "max_watches": _whole,
}
_LIMITS = {field.name for field in fields(TenantLimits)}
_RIGHTS = {"use", "load", "unload", "sources", "admin", "share_cache"}


def _tenant(name: str, table: object, default: TenantLimits) -> Tenant:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r}: a tenant's name has 1 to 128 of the characters a-z A-Z 0-9 . _ - and begins with a "
            "letter or a digit"
        )
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name}: expected a table [tenants.NAME], found {table!r}")
    if unknown := sorted(table.keys() - _CHECKS.keys()):
        raise ConfigError(f"{name}: {unknown[0]!r} is not known; there are {', '.join(sorted(_CHECKS))}")
    for setting, value in table.items():
        if expected := _CHECKS[setting](value):
            raise ConfigError(f"{name}: {setting} is {expected}; found {value!r}")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
    }
    limits = {key: settings.pop(key) for key in _LIMITS & settings.keys()}
    return Tenant(name=name, limits=replace(default, **limits), **settings)


def _index(
    kind: str, tenants: Iterable[Tenant], marks: Callable[[Tenant], Iterable[str]]
) -> dict[str, Tenant]:
    found: dict[str, Tenant] = {}
    for tenant in tenants:
        for mark in marks(tenant):
            if found.setdefault(mark, tenant) is not tenant:
                raise ConfigError(
                    f"{tenant.name}: {kind} {mark!r} is also that of {found[mark].name}; give each its own"
                )
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
