"""TLS certificates, checked at every new connection: renewing them needs no restart."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from turret_server.errors import ConfigError

log = logging.getLogger(__name__)


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
        self._taken = self._contents()
        self._check()

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._taken),
            self._renewed,  # type: ignore[arg-type]  # the stubs do not allow None
            require_client_authentication=bool(self._client_ca),
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration from this connection on; None if unchanged. Called before each handshake."""
        try:
            contents = self._contents()
            if contents == self._taken:
                return None
            self._check()
            if contents != self._contents():
                return None  # they are being written; the next connection checks again
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("the last valid certificates stay in use: %s", error)  # noqa: TRY400
            return None
        self._taken, self._complaint = contents, ""
        log.info("reloaded the certificates")
        return _configuration(contents)

    def _contents(self) -> tuple[bytes, bytes, bytes | None]:
        try:
            client_ca = self._client_ca.read_bytes() if self._client_ca else None
            return self._cert.read_bytes(), self._key.read_bytes(), client_ca
        except OSError as error:
            raise ConfigError(f"{error.filename}: expected a PEM file; {error.strerror}") from error

    def _check(self) -> None:
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
        except OSError as error:
            raise ConfigError(
                f"--tls-client-ca {self._client_ca}: expected a PEM file of the authority that signs the "
                f"clients' certificates; {error}"
            ) from error


def _configuration(contents: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
    cert, key, client_ca = contents
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=client_ca)
