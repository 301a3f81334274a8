from __future__ import annotations

import grpc
import pytest
import trustme

from support.certificates import Files
from turret_server.rpc.tls import credentials


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


async def test_without_an_authority_a_client_needs_no_certificate(open_door, files):
    door = await open_door(credentials=credentials(files.opened()))
    assert await door.is_reached_with(files.client())
    with pytest.raises(grpc.aio.AioRpcError) as refused:  # nor is anything answered unencrypted
        await door.status()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_an_authority_only_its_clients_reach_the_server(open_door, files):
    door = await open_door(credentials=credentials(files.opened(mutual=True)))
    assert await door.is_reached_with(files.client(files.clients))
    for stranger in (None, files.authority):
        assert not await door.is_reached_with(files.client(stranger))


async def test_a_connection_has_the_certificates_of_its_time(open_door, files):
    door = await open_door(credentials=credentials(files.opened(mutual=True)))
    trusts_the_former, former = files.client(files.clients), files.clients
    assert await door.is_reached_with(trusts_the_former)
    files.authority, files.clients = trustme.CA(), trustme.CA()
    files.renew()
    files.clients.cert_pem.write_to_path(files.client_ca)
    assert await door.is_reached_with(files.client(files.clients))
    assert not await door.is_reached_with(trusts_the_former)
    assert not await door.is_reached_with(files.client(former))
