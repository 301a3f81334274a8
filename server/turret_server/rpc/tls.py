"""gRPC's credentials from the server's certificates."""

from __future__ import annotations

import grpc

from turret_server.doors.tls import Certificates, TlsFiles


def credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow the files."""
    used = files.current()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """The configuration from this connection on; None if unchanged. Called before each handshake."""
        nonlocal used
        before, used = used, files.current()
        return None if used is before else _configuration(used)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used),
        renewed,  # type: ignore[arg-type]  # the stubs do not allow None
        require_client_authentication=used.client_ca is not None,
    )


def _configuration(used: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(used.key, used.cert)], root_certificates=used.client_ca
    )
