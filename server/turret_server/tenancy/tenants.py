"""The tenants file: permissions, shares and limits of every tenant.

    [tenants.acme]
    keys = ["sha256:…"]                     # digests of API keys; `turret tenants key acme` makes one
    identities = ["acme.example.com"]       # common or alternative names of client certificates
    use = ["acme-*", "shared-*"]            # patterns of adapters' names
    load = ["acme-*"]
    unload = ["acme-*"]
    sources = ["/srv/adapters/acme", "hf://acme"]   # folders and URL prefixes that it may load from
    admin = false                           # true: every permission for every adapter
    share_cache = false                     # true: shares cached prompts with other tenants that set it
    weight = 2.0
    max_queued_requests = 100
    max_queued_tokens = 200_000
    max_concurrent_requests = 20            # waiting or running
    tokens_per_minute = 100_000             # of prompts and answers
    max_adapters = 50                       # adapters that it has loaded
    max_adapter_bytes = 20_000_000_000      # of its adapters, on disk or in memory, whichever is more
    max_device_bytes = 2_000_000_000        # of the arena, by adapters that it uses or used last
    max_concurrent_loads = 2                # waiting or running
    max_pinned_tokens = 50_000              # of its pinned prompts
    max_watches = 4                         # concurrent WatchAdapters calls

Earlier revisions of its adapters count as well; the oldest of them are deleted to stay within
`max_adapter_bytes`. A permission that a table leaves out is not granted; a limit that it leaves out has the
server's default. If no table has keys or identities, the server is open: a call names its tenant itself and
has every permission.
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
    """A tenant with its permissions and limits. `keys` are digests; `use`, `load` and `unload` are patterns
    of adapters' names. It is `proven` if a key or a certificate authenticated it, not on an open server.

    Tenants with the same `cache_domain` share cached prompts.
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
        """The owner of adapters that it loads, with its limits."""
        return Ownership(owner=self.name, max_names=self.max_adapters, max_bytes=self.max_adapter_bytes)

    def may_use(self, adapter: str) -> bool:
        return self.admin or _matches(adapter, self.use)

    def may_load(self, adapter: str) -> bool:
        return self.admin or _matches(adapter, self.load)

    def may_unload(self, adapter: str) -> bool:
        return self.admin or _matches(adapter, self.unload)


class TenantTable:
    """One version of the file. If it is `hooked`, an authentication hook decides first."""

    def __init__(self, tenants: Iterable[Tenant], default: TenantLimits, *, hooked: bool = False) -> None:
        self._default = default
        self._hooked = hooked
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self._by_key = _index("key", self._tenants.values(), lambda tenant: tenant.keys)
        self._by_identity = _index("identity", self._tenants.values(), lambda tenant: tenant.identities)

    @property
    def is_open(self) -> bool:
        """Whether calls need no authentication."""
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
        """The tenant of a trusted name; without a table it has no permissions."""
        return self._tenants.get(name) or Tenant(name=name, limits=self._default)

    def by_key(self, key: str) -> Tenant | None:
        """The tenant of a key, found by its digest, so that the time tells nothing about other keys."""
        return self._by_key.get(digest_of(key))

    def by_identities(self, identities: Iterable[str]) -> Tenant | None:
        """The tenant of a certificate, by the first of its names that a tenant has."""
        found = (self._by_identity.get(identity) for identity in identities)
        return next(filter(None, found), None)

    def unproven(self, name: str) -> Tenant:
        """The tenant that a call on an open server names: it has every permission."""
        return replace(self.by_name(name), admin=True, share_cache=True, proven=False)


def parse_tenants(where: str, content: bytes, default: TenantLimits, *, hooked: bool = False) -> TenantTable:
    """Parse a tenants file. `hooked` is as for `TenantTable`.

    Raises:
        ConfigError: it has an unknown or invalid setting.
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
            f"{where}: {unproven[0]}: permissions have no effect on an open server, where any call may name "
            f"any tenant; give tenants keys (`turret tenants key {unproven[0]}`) or identities"
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
    return None if ok else "a list of non-empty strings"


def _digests(value: Any) -> str | None:
    ok = _texts(value) is None and all(map(is_digest, value))
    return None if ok else 'a list of digests "sha256:…", which `turret tenants key NAME` prints'


def _places(value: Any) -> str | None:
    ok = _texts(value) is None and all("://" in each or Path(each).is_absolute() for each in value)
    return None if ok else "a list of absolute folders and URL prefixes"


# Each returns what the value must be, or None if it is valid.
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
        raise ConfigError(f"{name}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(_CHECKS))}")
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
                    f"{tenant.name}: {kind} {mark!r} also belongs to {found[mark].name}; give each tenant "
                    "its own"
                )
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
