#!/usr/bin/env python3
"""Exits with status 0 if the server at ADDRESS (default: this container's) reports SERVING.

    turret-health [ADDRESS [CA [KEY CERT]]]

CA is the PEM file of the authority of a server with TLS; KEY and CERT are a client's, if it requires them.
"""

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
files = [Path(file).read_bytes() for file in sys.argv[2:]]
with (
    grpc.secure_channel(address, grpc.ssl_channel_credentials(*files))
    if files
    else grpc.insecure_channel(address)
) as channel:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=4)
    except grpc.RpcError as error:
        sys.exit(f"{address}: {error.code().name}: {error.details()}")
if answer.status != health_pb2.HealthCheckResponse.SERVING:
    sys.exit(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
