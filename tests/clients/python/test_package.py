from __future__ import annotations

import subprocess
import sys

import turret_client
from turret_client import errors

NAMES = {
    "DEFAULT_ADDRESS",
    "Adapter",
    "AdapterMethod",
    "AdapterState",
    "AdapterRef",
    "AdapterRevision",
    "AsyncClient",
    "Classification",
    "Classifications",
    "Embeddings",
    "Pooling",
    "Problem",
    "Scores",
    "Span",
    "TaggedText",
    "TaggedToken",
    "Tags",
    "BatchOptions",
    "CancelledError",
    "Choice",
    "Chunk",
    "ChatMessages",
    "ChatOptions",
    "Client",
    "ConnectionOptions",
    "DeadlineExceededError",
    "Download",
    "FailedPreconditionError",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "InternalError",
    "InvalidArgumentError",
    "Limits",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "PinnedPrompt",
    "ResourceExhaustedError",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "TrafficSplit",
    "TurretError",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
}


def test_all():
    assert set(turret_client.__all__) == NAMES
    assert all(hasattr(turret_client, name) for name in NAMES)


def test_every_error_is_exported():
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes <= NAMES


def test_the_import_is_light():
    # grpc itself imports more where it is installed, so what it brings is there before.
    code = (
        "import sys, grpc.aio, grpc_status.rpc_status; before = set(sys.modules); import turret_client; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603 -- our own code
    assert set(run.stdout.split()) == {"google", "grpc", "turret", "turret_client"}
