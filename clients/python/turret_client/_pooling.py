"""Requests and answers of `embed`, `classify`, `tag` and `score`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from turret.v1 import inference_pb2, pooling_pb2
from turret_client._messages import adapter_refs, message_of, usage_from
from turret_client._options import BatchOptions
from turret_client._results import (
    Classification,
    Classifications,
    Embeddings,
    Pooling,
    Problem,
    Scores,
    Span,
    TaggedText,
    TaggedToken,
    Tags,
)
from turret_client.errors import invalid_argument

if TYPE_CHECKING:
    from collections.abc import Sequence

Input: TypeAlias = "str | tuple[str, str] | Sequence[int]"
"""A text, a pair of texts, or token ids."""

_POOLING = {
    Pooling.CLS: pooling_pb2.POOLING_CLS,
    Pooling.MEAN: pooling_pb2.POOLING_MEAN,
    Pooling.WEIGHTED_MEAN: pooling_pb2.POOLING_WEIGHTED_MEAN,
    Pooling.LAST: pooling_pb2.POOLING_LAST,
}
_PROBLEMS = {
    pooling_pb2.PROBLEM_SINGLE_LABEL: Problem.SINGLE_LABEL,
    pooling_pb2.PROBLEM_MULTI_LABEL: Problem.MULTI_LABEL,
    pooling_pb2.PROBLEM_REGRESSION: Problem.REGRESSION,
}


def batch_of(inputs: Sequence[Input], options: BatchOptions) -> pooling_pb2.TextBatch:
    """The batch of a request; None leaves an option unset.

    Raises:
        TypeError: An option does not exist.
        InvalidArgumentError: A value is not one of its field.
    """
    for name in options:
        if name not in BatchOptions.__annotations__:
            known = ", ".join(BatchOptions.__annotations__)
            raise TypeError(f"unknown option {name!r}; the options are {known}")
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise invalid_argument("inputs", f"inputs is a sequence; for one input write [{inputs!r}]"[:200])
    scalars: dict[str, Any] = dict(options)
    adapters = adapter_refs(scalars.pop("adapter", None))
    batch = message_of(pooling_pb2.TextBatch, **scalars)
    batch.adapters.extend(adapters)
    batch.inputs.extend(_input_of(number, each) for number, each in enumerate(inputs))
    return batch


def _input_of(number: int, given: Any) -> pooling_pb2.Input:
    try:
        if isinstance(given, str):
            return pooling_pb2.Input(text=given)
        # Bytes would pass for numbers.
        if isinstance(given, Iterable) and not isinstance(given, bytes | bytearray | memoryview):
            items = list(given)
            if any(isinstance(item, str) for item in items):
                first, second = items
                return pooling_pb2.Input(pair=pooling_pb2.TextPair(first=first, second=second))
            return pooling_pb2.Input(token_ids=inference_pb2.TokenIds(ids=items))
    except (TypeError, ValueError):
        pass
    raise invalid_argument(
        "inputs",
        f"inputs[{number}] must be text that UTF-8 can encode, a pair of such texts, or token ids from 0 to "
        f"4294967295; found {type(given).__name__}",
    )


def embed_request(
    batch: pooling_pb2.TextBatch, pooling: str | None, *, normalize: bool | None, dimensions: int | None
) -> pooling_pb2.EmbedRequest:
    """`pooling` is one of `Pooling`, or its value.

    Raises:
        InvalidArgumentError: A value is not one of its field.
    """
    try:
        kind = None if pooling is None else _POOLING[Pooling(pooling)]
    except ValueError as error:
        known = ", ".join(Pooling)
        raise invalid_argument("pooling", f"pooling is one of {known}; found {pooling!r}") from error
    request = message_of(pooling_pb2.EmbedRequest, normalize=normalize, dimensions=dimensions)
    request.batch.CopyFrom(batch)
    if kind is not None:
        request.pooling = kind
    return request


def embeddings_from(response: pooling_pb2.EmbedResponse) -> Embeddings:
    return Embeddings(
        vectors=tuple(tuple(each.values) for each in response.embeddings),
        usage=usage_from(response.usage),
        revision=response.revision,
    )


def classifications_from(response: pooling_pb2.ClassifyResponse) -> Classifications:
    labels = tuple(response.labels)

    def result(message: pooling_pb2.Classification) -> Classification:
        logits = dict(zip(labels, message.logits, strict=True))
        return Classification(
            label=max(logits, key=lambda label: logits[label]),  # scores of large ones are the same
            scores=dict(zip(labels, message.scores, strict=True)),
            logits=logits,
        )

    return Classifications(
        results=tuple(map(result, response.classifications)),
        problem=_PROBLEMS.get(response.problem, Problem.UNSPECIFIED),
        usage=usage_from(response.usage),
        revision=response.revision,
    )


def tags_from(response: pooling_pb2.TagResponse) -> Tags:
    return Tags(
        texts=tuple(map(_tagged_from, response.texts)),
        usage=usage_from(response.usage),
        revision=response.revision,
    )


def _tagged_from(message: pooling_pb2.TaggedText) -> TaggedText:
    return TaggedText(
        tokens=tuple(
            TaggedToken(each.token_id, each.label, each.score, each.start, each.end, each.in_second)
            for each in message.tokens
        ),
        spans=tuple(
            Span(each.label, each.score, each.start, each.end, each.text, each.in_second)
            for each in message.spans
        ),
    )


def scores_from(response: pooling_pb2.ScoreResponse) -> Scores:
    return Scores(
        scores=tuple(response.scores),
        logits=tuple(response.logits),
        usage=usage_from(response.usage),
        revision=response.revision,
    )
