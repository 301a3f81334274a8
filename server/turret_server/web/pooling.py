"""POST /v1/embeddings, /classify, /score and /v1/rerank, in the forms of OpenAI, vLLM, Jina and Cohere."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from turret_server.doors.caller import caller, request_id
from turret_server.errors import InvalidRequestError, PromptTooLongError
from turret_server.serving.pooling import PoolingService
from turret_server.serving.request import EmbedRequest, Input, Pooling, TextBatch, TextPair, Usage
from turret_server.web.bodies import Body, Int32, Priority, Refusal, Texts, TokenIds, parse
from turret_server.web.generation import Head
from turret_server.web.names import ModelNames

_POOLING = {
    "cls": Pooling.CLS,
    "mean": Pooling.MEAN,
    "weighted_mean": Pooling.WEIGHTED_MEAN,
    "last": Pooling.LAST,
}
_SAME = ("truncate", "cache_salt", "routing_key", "add_special_tokens")


class BatchBody(Body):
    """What all four have in common."""

    model: str | None = None
    """The base's name, an adapter's name, NAME@REVISION, or BASE:NAME. Default: the base."""
    user: Annotated[str, Field(max_length=128)] | None = None
    """Requests of the same user use the same revision while the traffic of an adapter is split."""
    truncate: bool | None = None
    """Extension: cut texts that are longer than the context at their end. Default: they are refused."""
    add_special_tokens: bool | None = None
    """Extension: add the tokenizer's special tokens to texts. Default: true."""
    priority: Priority | None = None
    """Extension: from -10 to 10 among the tenant's waiting requests; lower ones are served earlier."""
    cache_salt: str | None = None
    """Extension: only requests with the same salt share cached blocks on decoders."""
    routing_key: Annotated[str, Field(max_length=128)] | None = None
    """Extension: the same as `user`, which it overrides."""

    truncate_prompt_tokens: Literal[-1] | None = None
    """As `truncate`, in vLLM's words; other lengths than -1, that of the context, are not served."""

    refused: ClassVar = {
        "mm_processor_kwargs": Refusal("the model reads texts alone"),
    }

    def batch(self, inputs: Sequence[Input], names: ModelNames) -> TextBatch:
        fields = {name: getattr(self, name) for name in _SAME if getattr(self, name) is not None}
        if self.truncate_prompt_tokens is not None:
            fields.setdefault("truncate", True)
        if self.user is not None:
            fields.setdefault("routing_key", self.user)
        if self.priority is not None:
            fields["priority"] = -self.priority
        return TextBatch(inputs=inputs, adapters=names.adapters_of(self.model), **fields)


class InputBody(BatchBody):
    input: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    """A text, token ids, or several of either."""

    def inputs(self) -> Sequence[Input]:
        if isinstance(self.input, str):
            return [self.input]
        given: list[Any] = self.input
        return [given] if given and isinstance(given[0], int) else given  # then all are


class EmbeddingBody(InputBody):
    encoding_format: Literal["float", "base64"] | None = None
    """`base64` is that of little-endian numbers of 32 bits. Default: `float`."""
    dimensions: Annotated[Int32, Field(ge=1)] | None = None
    """Numbers of each vector, for models that were trained to be cut. Default: all."""
    normalize: bool | None = None
    """Extension: scale vectors to length 1. Default: as the model's files say, else true."""
    pooling: Literal["cls", "mean", "weighted_mean", "last"] | None = None
    """Extension: how tokens become a vector. Default: as the model's files say, else `mean` or `last`."""


class ClassifyBody(InputBody):
    pass


class ScoreBody(BatchBody):
    text_1: str | Texts
    """A text for all of `text_2`, or as many as those."""
    text_2: str | Texts
    """A text, or several."""

    def pairs(self) -> list[TextPair]:
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise InvalidRequestError(
                f"text_1 has one text, or as many as text_2; found {len(first)} and {len(second)}",
                field="text_1",
            )
        return [TextPair(first=one, second=two) for one, two in zip(first, second, strict=True)]


class Document(Body):
    text: str


class RerankBody(BatchBody):
    query: str
    documents: Annotated[list[str | Document], Field(fail_fast=True)]
    """Texts, or objects with a `text`."""
    top_n: Annotated[Int32, Field(ge=1)] | None = None
    """Number of results. Default: all."""
    return_documents: bool | None = None
    """Give the documents back in the results. Default: true."""

    refused: ClassVar = BatchBody.refused | {
        "max_tokens_per_doc": Refusal("use truncate, which cuts to the context"),
        "rank_fields": Refusal("join the fields to a text"),
    }

    def texts(self) -> list[str]:
        return [each.text if isinstance(each, Document) else each for each in self.documents]


class TextNumbers:
    """Numbers of texts: vectors, classes and scores."""

    def __init__(self, service: PoolingService, names: ModelNames) -> None:
        self._service = service
        self._names = names

    async def embed(self, request: Request) -> Response:
        """Get a vector of each text."""
        body = await parse(EmbeddingBody, request)
        wanted = EmbedRequest(
            batch=body.batch(body.inputs(), self._names),
            pooling=_POOLING[body.pooling] if body.pooling else None,
            normalize=body.normalize,
            dimensions=body.dimensions or 0,
        )
        with _names_of("input", "input[{}]"):
            found = await self._service.embed(wanted, caller())
        in_base64 = body.encoding_format == "base64"

        def answer() -> Response:
            data = [
                {"object": "embedding", "index": index, "embedding": _shown(vector, in_base64=in_base64)}
                for index, vector in enumerate(found.vectors)
            ]
            return JSONResponse(self._list(body, "embd", data, found.usage, found.revision))

        # In a thread, as the others that grow: a million numbers take a second, and streams go on meanwhile.
        return await asyncio.to_thread(answer)

    async def classify(self, request: Request) -> Response:
        """Get the label of each text, and the scores of all labels."""
        body = await parse(ClassifyBody, request)
        with _names_of("input", "input[{}]"):
            found = await self._service.classify(body.batch(body.inputs(), self._names), caller())

        def answer() -> Response:
            data = [
                {
                    "index": index,
                    "label": found.label(index),
                    "probs": scores.tolist(),
                    "num_classes": len(found.labels),
                }
                for index, scores in enumerate(found.scores)
            ]
            listed = self._list(body, "classify", data, found.usage, found.revision)
            return JSONResponse(listed | {"labels": found.labels})

        return await asyncio.to_thread(answer)

    async def score(self, request: Request) -> Response:
        """Get the score of each pair of texts."""
        body = await parse(ScoreBody, request)
        with _names_of("text_2", "text_2[{}] with its text_1"):
            found = await self._service.score(body.batch(body.pairs(), self._names), caller())
        data = [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(found.scores.tolist())
        ]
        return JSONResponse(self._list(body, "score", data, found.usage, found.revision))

    async def rerank(self, request: Request) -> Response:
        """Order documents by their score for a query."""
        body = await parse(RerankBody, request)
        texts = body.texts()
        pairs = [TextPair(first=body.query, second=text) for text in texts]
        with _names_of("documents", "documents[{}] with the query"):
            found = await self._service.score(body.batch(pairs, self._names), caller())
        # By logits: large ones have the same score.
        order = sorted(range(len(texts)), key=lambda index: -found.logits[index])
        with_documents = body.return_documents is not False

        def answer() -> Response:
            results = [
                {"index": index, "relevance_score": float(found.scores[index])}
                | ({"document": {"text": texts[index]}} if with_documents else {})
                for index in order[: body.top_n]
            ]
            return JSONResponse(
                {
                    "id": f"rerank-{request_id()}",
                    "model": body.model or self._names.base,
                    "results": results,
                    "usage": _usage(found.usage),
                    "system_fingerprint": found.revision or None,
                }
            )

        return await asyncio.to_thread(answer)

    def _list(
        self, body: BatchBody, prefix: str, data: list[dict[str, Any]], usage: Usage, revision: str
    ) -> dict[str, Any]:
        head = Head.of(prefix, "list", body.model or self._names.base)
        return {
            "id": head.id,
            "object": head.object,
            "created": head.created,
            "model": head.model,
            "data": data,
            "usage": _usage(usage),
            "system_fingerprint": revision or None,
        }


@contextmanager
def _names_of(field: str, shown: str) -> Iterator[None]:
    """Errors within the block name the fields of the body: its texts are in `field`, one of them is `shown`
    with its number, and the adapter is its model.

    Raises:
        TurretError: as it is raised within the block, with these names.
    """
    try:
        yield
    except (InvalidRequestError, PromptTooLongError) as error:
        names = {"inputs": field, "adapters": "model"}
        own = error.metadata.get("field", "inputs")
        message = str(error)
        if number := error.metadata.get("input"):
            message = message.replace(f"inputs[{number}]", shown.format(number), 1)
        raise type(error)(message, **{**error.metadata, "field": names.get(own, own)}) from error


def _shown(vector: NDArray[np.float32], *, in_base64: bool) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if in_base64 else vector.tolist()


def _usage(usage: Usage) -> dict[str, int]:
    return {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
