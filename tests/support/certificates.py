"""The server's certificate files, as an operator writes them, and clients that trust them."""

from __future__ import annotations

import grpc
import trustme

from turret_server.doors.tls import TlsFiles


class Files:
    def __init__(self, folder):
        self.cert, self.key, self.client_ca = (folder / f"{name}.pem" for name in ("cert", "key", "ca"))
        self.authority, self.clients = trustme.CA(), trustme.CA()
        self.clients.cert_pem.write_to_path(self.client_ca)
        self.renew()

    def renew(self):
        made = self.authority.issue_cert("127.0.0.1")
        self.cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        self.key.write_bytes(made.private_key_pem.bytes())

    def opened(self, *, mutual=False):
        return TlsFiles(self.cert, self.key, self.client_ca if mutual else None)

    def client(self, certified_by=None):
        """Credentials of a client that trusts the server."""
        ca = self.authority.cert_pem.bytes()
        if certified_by is None:
            return grpc.ssl_channel_credentials(ca)
        made = certified_by.issue_cert("client.example.com")
        chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
        return grpc.ssl_channel_credentials(ca, made.private_key_pem.bytes(), chain)
