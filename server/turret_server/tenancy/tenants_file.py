"""The tenants file of a running server, reloaded when it changes."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Self

from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.tenancy.tenants import TenantTable, parse_tenants

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class TenantsFile:
    """The last valid table of the file. All methods may be called from any thread.

    The file is small and is read at every check: modification times miss changes, and a symbolic link, as in
    a Kubernetes volume, may be pointed elsewhere.
    """

    def __init__(self, path: Path | None, default: TenantLimits, *, hooked: bool = False) -> None:
        """Read the file. `hooked` is as for `TenantTable`.

        Raises:
            ConfigError: it cannot be read, or has an unknown or invalid setting.
        """
        self._path = path
        self._default = default
        self._hooked = hooked
        self._content = b""
        self._complaint = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="turret-tenants", daemon=True)
        self.table = TenantTable([], default, hooked=hooked)
        if path:
            self._content = self._read(path)
            self.table = self._parse(self._content)

    def __enter__(self) -> Self:
        if self._path:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def limits(self, tenant: str) -> TenantLimits:
        return self.table.limits(tenant)

    def max_device_bytes(self, tenant: str) -> int | None:
        return self.table.max_device_bytes(tenant)

    def look(self) -> None:
        """Reload the file if it has changed. Of an invalid one, log the error once and change nothing."""
        assert self._path
        try:
            content = self._read(self._path)
            if content == self._content:
                return
            self._take(content)
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("the last valid version of the tenants file stays in force: %s", error)  # noqa: TRY400

    def _take(self, content: bytes) -> None:
        table = self._parse(content)
        if table.is_open and not self.table.is_open:
            # Such as a file that is read while it is being written.
            raise ConfigError(
                f"{self._where}: no tenant has keys or identities any more, which would open the server to "
                "everybody; restart the server to allow that"
            )
        self._content, self._complaint, self.table = content, "", table
        log.info("reloaded the tenants file")

    def _parse(self, content: bytes) -> TenantTable:
        return parse_tenants(self._where, content, self._default, hooked=self._hooked)

    @property
    def _where(self) -> str:
        return f"--tenants {self._path}"

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self._where}: expected a TOML file; {error}") from error

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            self.look()
