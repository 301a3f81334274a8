"""The tenants file while the server runs: what it says now, read again whenever it changes."""

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
    """Holds the last table of the file that was sound. Every method may be called from any thread.

    The file is small and is read each time it is looked at: times of files do not tell every change, and a
    link, as in a mounted volume of Kubernetes, may come to point elsewhere.
    """

    def __init__(self, path: Path | None, default: TenantLimits, *, hooked: bool = False) -> None:
        """Read the file. `hooked` is as for `TenantTable`.

        Raises:
            ConfigError: it cannot be read, or holds something that is not known or cannot be.
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
        """Take over what changed in the file; where it is not sound, keep what was and log why, once."""
        assert self._path
        try:
            content = self._read(self._path)
            if content == self._content:
                return
            self._take(content)
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("what the tenants file said before holds on: %s", error)  # noqa: TRY400

    def _take(self, content: bytes) -> None:
        table = self._parse(content)
        if table.is_open and not self.table.is_open:
            # As when the file is found cut off while somebody writes it.
            raise ConfigError(
                f"{self._where}: no tenant has keys or identities any more, which would open the server to "
                "anybody; restart it to do that"
            )
        self._content, self._complaint, self.table = content, "", table
        log.info("the tenants file changed, and holds from now on")

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
