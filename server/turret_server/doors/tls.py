"""TLS certificates, checked at every new connection: renewing them needs no restart."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from turret_server.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Contents of the files in PEM, and `context` made of them."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class TlsFiles:
    """PEM files of the server's certificate chain, of its key, and of the authority that signs client
    certificates; without the latter, clients need none.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Read the files.

        Raises:
            ConfigError: one cannot be read, or key and certificate do not match.
        """
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self._complaint = ""
        self._current = self._read(self._contents())

    def current(self) -> Certificates:
        """The certificates for a new connection: another object once the files have changed."""
        try:
            contents = self._contents()
            if contents == (self._current.cert, self._current.key, self._current.client_ca):
                return self._current
            found = self._read(contents)
            if contents != self._contents():
                return self._current  # they are being written; the next connection checks again
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("the last valid certificates stay in use: %s", error)  # noqa: TRY400
            return self._current
        self._current, self._complaint = found, ""
        log.info("reloaded the certificates")
        return found

    def _contents(self) -> tuple[bytes, bytes, bytes | None]:
        try:
            client_ca = self._client_ca.read_bytes() if self._client_ca else None
            return self._cert.read_bytes(), self._key.read_bytes(), client_ca
        except OSError as error:
            raise ConfigError(f"{error.filename}: expected a PEM file; {error.strerror}") from error

    def _read(self, contents: tuple[bytes, bytes, bytes | None]) -> Certificates:
        """Find errors here that would otherwise make every handshake fail."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._cert, self._key, password="")  # or it would prompt for one
        except OSError as error:
            raise ConfigError(
                f"--tls-cert {self._cert}, --tls-key {self._key}: expected PEM files of a certificate and "
                f"its key without a password; {error}"
            ) from error
        try:
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:
            raise ConfigError(
                f"--tls-client-ca {self._client_ca}: expected a PEM file of the authority that signs the "
                f"clients' certificates; {error}"
            ) from error
        cert, key, client_ca = contents
        return Certificates(cert=cert, key=key, client_ca=client_ca, context=context)
