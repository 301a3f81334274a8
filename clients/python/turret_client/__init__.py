"""Client of a Turret server.

    from turret_client import Client

    with Client("127.0.0.1:50051") as client:
        for chunk in client.stream("Once upon a time", adapter="pirate"):
            print(chunk.text, end="", flush=True)

`AsyncClient` has the same methods for asyncio. Failed calls raise a `TurretError`, whose subclasses
`turret_client.errors` lists.
"""

from turret_client._async import AsyncClient
from turret_client._channel import DEFAULT_ADDRESS, ConnectionOptions
from turret_client._chat import ChatMessages, ChatOptions
from turret_client._options import AdapterRef, BatchOptions, GenerationOptions
from turret_client._results import (
    Adapter,
    AdapterMethod,
    AdapterRevision,
    AdapterState,
    Choice,
    Chunk,
    Classification,
    Classifications,
    Download,
    Embeddings,
    FinishReason,
    Generation,
    Limits,
    Model,
    PinnedPrompt,
    Pooling,
    Problem,
    Scores,
    Span,
    TaggedText,
    TaggedToken,
    Tags,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TrafficSplit,
    Usage,
)
from turret_client._sync import Client
from turret_client.errors import (
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    TurretError,
    UnauthenticatedError,
    UnavailableError,
)

__all__ = [
    "DEFAULT_ADDRESS",
    "Adapter",
    "AdapterMethod",
    "AdapterRef",
    "AdapterRevision",
    "AdapterState",
    "AsyncClient",
    "BatchOptions",
    "CancelledError",
    "ChatMessages",
    "ChatOptions",
    "Choice",
    "Chunk",
    "Classification",
    "Classifications",
    "Client",
    "ConnectionOptions",
    "DeadlineExceededError",
    "Download",
    "Embeddings",
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
    "Pooling",
    "Problem",
    "ResourceExhaustedError",
    "Scores",
    "Span",
    "TaggedText",
    "TaggedToken",
    "Tags",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "TrafficSplit",
    "TurretError",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
]
