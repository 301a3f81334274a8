"""Vectors, classes, tags and scores of texts: a batch of inputs in, their numbers out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from turret_adapters.spec import BaseSpec, HeadSpec, HeadTask, Problem
from turret_server import logs
from turret_server.engine.loop import Engine
from turret_server.engine.pooling import Pooling, PoolingParams, Rows
from turret_server.engine.request import Output, PoolingRequest
from turret_server.errors import InvalidRequestError, PromptTooLongError, UnsupportedTaskError
from turret_server.observability.request_log import RequestLog, RequestRecord
from turret_server.serving.codec import Encoded
from turret_server.serving.jobs import Jobs, Leased, Outputs
from turret_server.serving.model_info import ModelInfo
from turret_server.serving.request import (
    Classes,
    Embeddings,
    EmbedRequest,
    Input,
    Scores,
    Span,
    TaggedText,
    TaggedToken,
    Tags,
    TextBatch,
    TextPair,
    Usage,
)
from turret_server.serving.request_fields import EMBED_FIELDS
from turret_server.serving.validation import (
    check_fields,
    check_num_answers,
    check_num_tokens,
    validate_batch,
)
from turret_server.tenancy.auth import Caller

_CALLS = {
    HeadTask.SEQ_CLS: "Classify",
    HeadTask.TOKEN_CLS: "Tag",
    HeadTask.QUESTION_ANS: "none of the calls",
}
# Of no span, as in transformers.
_OUTSIDE = "O"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingModel:
    """What a base does with texts. `pooling` and `normalize` are those of a request that names none,
    `max_tokens` is the length to which texts for vectors are cut, if the model's files name one, and
    `refusal` is why the model has no vectors, or "". Tokens of type 1, those of a pair's second text, exist
    if `takes_pairs`; a decoder's head reads the last token that is not `pad_token_id`.
    """

    base: BaseSpec
    takes_pairs: bool
    pad_token_id: int | None
    pooling: Pooling
    normalize: bool
    max_tokens: int | None = None
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Computed:
    """The numbers of a batch in the order of its inputs."""

    texts: Sequence[Encoded]
    rows: Sequence[Rows]
    revision: str
    usage: Usage
    head: HeadSpec | None

    @property
    def labels(self) -> tuple[str, ...]:
        assert self.head, "of a task"
        return self.head.labels

    def matrix(self) -> NDArray[np.float64]:
        """One row of each input."""
        return np.stack([_matrix(rows)[0] for rows in self.rows])


class PoolingService:
    """Used on one event loop."""

    def __init__(
        self, *, engine: Engine, jobs: Jobs, model: ModelInfo, pooling: PoolingModel, request_log: RequestLog
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._model = model
        self._pooling = pooling
        self._request_log = request_log

    async def embed(self, request: EmbedRequest, caller: Caller) -> Embeddings:
        """A vector of each input.

        Raises:
            UnsupportedTaskError: the model's own vectors are not those that the server can compute.
            And the errors of `classify`.
        """
        params = PoolingParams(pooling=request.pooling or self._pooling.pooling)
        found = await self._compute(
            request.batch, params, caller, check=lambda _: self._check_vectors(request)
        )
        vectors = found.matrix()[:, : request.dimensions or None]
        if self._pooling.normalize if request.normalize is None else request.normalize:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.where(lengths == 0, 1, lengths)
        return Embeddings(vectors=vectors.astype(np.float32), revision=found.revision, usage=found.usage)

    def _check_vectors(self, request: EmbedRequest) -> None:
        check_fields(request, EMBED_FIELDS)
        most = self._pooling.base.hidden_size
        if request.dimensions > most:
            raise InvalidRequestError(
                f"dimensions is at most {most}, the size of the model's vectors; found {request.dimensions}",
                field="dimensions",
            )
        if self._pooling.refusal and request.pooling is None:
            raise UnsupportedTaskError(self._pooling.refusal)

    async def classify(self, batch: TextBatch, caller: Caller) -> Classes:
        """The scores of each input's labels.

        Raises:
            InvalidRequestError: a field is invalid, or an input has no tokens.
            PromptTooLongError: an input does not fit into the context.
            UnsupportedTaskError: there is no head for the task.
            AdapterError: an adapter does not exist, or its use is invalid.
            QuotaExceededError: the tenant has used its quota.
            TurretError: the engine refuses an input, or computing it fails.
        """
        found = await self._compute(batch, PoolingParams(task=HeadTask.SEQ_CLS), caller)
        assert found.head
        logits = found.matrix()
        return Classes(
            labels=found.labels,
            problem=found.head.problem,
            logits=logits,
            scores=_scores(logits, found.head.problem),
            revision=found.revision,
            usage=found.usage,
        )

    async def score(self, batch: TextBatch, caller: Caller) -> Scores:
        """The score of each input by a head with one label, as cross-encoders have. Raises as `classify`."""
        params = PoolingParams(task=HeadTask.SEQ_CLS)
        found = await self._compute(batch, params, caller, check=_check_score)
        logits = found.matrix()[:, 0]
        scores = _scores(logits, Problem.MULTI_LABEL)
        return Scores(logits=logits, scores=scores, revision=found.revision, usage=found.usage)

    async def tag(self, batch: TextBatch, caller: Caller) -> Tags:
        """Labels of each input's tokens, and spans of the same label. Raises as `classify`."""
        found = await self._compute(batch, PoolingParams(task=HeadTask.TOKEN_CLS), caller)

        def tagged() -> tuple[TaggedText, ...]:
            return tuple(
                _tagged(each, text, rows, found.labels)
                for each, text, rows in zip(batch.inputs, found.texts, found.rows, strict=True)
            )

        # In a thread: of thousands of tokens it takes a while, and streams go on meanwhile.
        texts = await asyncio.to_thread(tagged)
        return Tags(texts=texts, revision=found.revision, usage=found.usage)

    async def _compute(
        self,
        batch: TextBatch,
        params: PoolingParams,
        caller: Caller,
        *,
        check: Callable[[HeadSpec | None], None] = lambda _: None,
    ) -> _Computed:
        """`check` refuses what the call cannot do with the head."""
        async with self._request_log.follow(caller, batch.deadline) as record:
            adapters = validate_batch(batch)
            check_num_answers(len(batch.inputs), caller, "inputs")
            async with self._jobs.lease(adapters, caller, batch.routing_key) as leased:
                head = self._head(leased, params.task) if params.task else None
                check(head)
                texts = await self._encode(batch, leased, params.task)
                outputs: Outputs[tuple[int, Output]] = Outputs()
                jobs = [
                    PoolingRequest(
                        **self._jobs.fields(leased, text.token_ids, batch.deadline, batch.cache_salt),
                        sink=outputs.sink(partial(_numbered, index)),
                        params=params,
                        token_type_ids=text.type_ids,
                        priority=batch.priority,
                        about=logs.bound(),
                    )
                    for index, text in enumerate(texts)
                ]
                check_num_tokens([job.num_tokens for job in jobs], caller, "inputs")
                with self._jobs.submit(leased, jobs, record, self._engine.submit):
                    rows = await _all_rows(outputs, len(jobs), record)
                    await self._request_log.finish(record, "pooled")
                    usage = Usage(
                        prompt_tokens=record.prompt_tokens,
                        cached_tokens=record.cached_tokens,
                        generated_tokens=0,
                    )
        return _Computed(texts=texts, rows=rows, revision=leased.lease.revision, usage=usage, head=head)

    def _head(self, leased: Leased, task: HeadTask) -> HeadSpec:
        """The head for a task: that of the request's adapter, or the base's own."""
        base = self._pooling.base
        # At most one: an adapter with a head is requested alone.
        of_adapters = [(name, spec.head) for name, spec in leased.lease.pins if spec.head]
        whose, head = of_adapters[0] if of_adapters else ("", base.head)
        if head is None:
            possible = ", ".join(each.value for each in base.heads)
            raise UnsupportedTaskError(
                f"neither the model nor the request's adapters have a head for {task.value}; name an adapter "
                f"that was trained for it (the model can have heads for {possible or 'no task'})",
                task=task.value,
            )
        if head.task is not task:
            owner = f"adapter {whose!r}" if whose else "the model"
            raise UnsupportedTaskError(
                f"{owner} has a head for {head.task.value}, which {_CALLS[head.task]} uses; this call needs "
                f"one for {task.value}",
                task=task.value,
            )
        return head

    async def _encode(self, batch: TextBatch, leased: Leased, task: HeadTask | None) -> list[Encoded]:
        texts = [text for each in batch.inputs for text in _texts(each)]

        def encode() -> list[Encoded]:
            return [
                self._encode_input(number, each, batch, leased, task)
                for number, each in enumerate(batch.inputs)
            ]

        return await self._jobs.tokenising(encode, sum(map(len, texts)))

    def _encode_input(
        self, number: int, given: Input | None, batch: TextBatch, leased: Leased, task: HeadTask | None
    ) -> Encoded:
        room = self._model.max_context - leased.num_virtual_tokens
        if task is None and batch.truncate:
            room = min(room, self._pooling.max_tokens or room)
        try:
            if texts := _texts(given):
                found = leased.vocabulary.codec.encode_texts(
                    texts,
                    room,
                    add_special_tokens=batch.add_special_tokens,
                    truncate=batch.truncate,
                    context_note=self._model.context_note,
                )
            else:
                assert not isinstance(given, str | TextPair | None), "validated"
                found = Encoded(token_ids=tuple(given)[: room if batch.truncate else None])
            found = self._fitted(found, task)
            self._model.check_room(len(found.token_ids) + leased.num_virtual_tokens, num_generated=0)
            leased.vocabulary.check_token_ids(found.token_ids)
        except PromptTooLongError as error:
            raise PromptTooLongError(f"inputs[{number}]: {error}", **error.metadata, input=number) from error
        except InvalidRequestError as error:
            message = f"inputs[{number}]: {error}"
            raise InvalidRequestError(message, field="inputs", input=number) from error
        return found

    def _fitted(self, found: Encoded, task: HeadTask | None) -> Encoded:
        """As the model takes it: without types that it does not have, and without the padding that a
        decoder's head passes over, as in transformers.
        """
        token_ids, num_tokens = found.token_ids, len(found.token_ids)
        if task is HeadTask.SEQ_CLS and not self._pooling.base.is_encoder:
            while num_tokens > 1 and token_ids[num_tokens - 1] == self._pooling.pad_token_id:
                num_tokens -= 1
        return Encoded(
            token_ids=token_ids[:num_tokens],
            type_ids=found.type_ids[:num_tokens] if self._pooling.takes_pairs else (),
            spans=found.spans[:num_tokens],
        )


def _check_score(head: HeadSpec | None) -> None:
    if head and len(head.labels) > 1:
        raise UnsupportedTaskError(
            f"a score needs a head with one label, as rerankers have; this one has {len(head.labels)}; use "
            "Classify"
        )


def _texts(given: Input | None) -> list[str]:
    """The texts of an input; none of token ids."""
    if isinstance(given, TextPair):
        return [given.first, given.second]
    return [given] if isinstance(given, str) else []


def _numbered(index: int, output: Output, _: float) -> tuple[int, Output]:
    """Raises the error of a job that failed."""
    if output.error:
        raise output.error
    return index, output


async def _all_rows(outputs: Outputs[tuple[int, Output]], num_jobs: int, record: RequestRecord) -> list[Rows]:
    found: dict[int, Rows] = {}
    while len(found) < num_jobs:
        index, output = await outputs.get()
        assert output.rows, "only an error ends without rows, or this call's own cancellation"
        found[index] = output.rows
        record.cached_tokens += output.cached_tokens
    return [found[index] for index in range(num_jobs)]


def _matrix(rows: Rows) -> NDArray[np.float64]:
    return np.frombuffer(rows.values, dtype=np.float64).reshape(-1, rows.width)


def _scores(logits: NDArray[np.float64], problem: Problem) -> NDArray[np.float64]:
    """Of logits [..., labels]."""
    match problem:
        case Problem.SINGLE_LABEL:
            exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
            probabilities: NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
            return probabilities
        case Problem.MULTI_LABEL:
            # In two halves, so that no exponent overflows.
            exponents = np.exp(-np.abs(logits))
            sigmoids: NDArray[np.float64] = np.where(logits >= 0, 1, exponents) / (1 + exponents)
            return sigmoids
        case Problem.REGRESSION:
            return logits


def _tagged(given: Input | None, text: Encoded, rows: Rows, labels: Sequence[str]) -> TaggedText:
    scores = _scores(_matrix(rows), Problem.SINGLE_LABEL)
    best = scores.argmax(axis=1)
    sources = text.spans or ((0, 0, 0),) * len(text.token_ids)
    tokens = tuple(
        TaggedToken(
            token_id=token_id,
            label=labels[label],
            score=float(own[label]),
            source=source[0],
            start=source[1],
            end=source[2],
        )
        for token_id, label, own, source in zip(text.token_ids, best, scores, sources, strict=True)
        if source is not None
    )
    return TaggedText(tokens=tokens, spans=tuple(_spans(tokens, _texts(given))))


def _spans(tokens: Sequence[TaggedToken], texts: Sequence[str]) -> list[Span]:
    """Tokens with the same label that follow each other, as transformers aggregates them ("simple")."""
    groups: list[tuple[str, list[TaggedToken]]] = []
    for token in tokens if texts else ():
        begins, label = _split(token.label)
        if groups and not begins and groups[-1][0] == label and groups[-1][1][-1].source == token.source:
            groups[-1][1].append(token)
        else:
            groups.append((label, [token]))
    return [
        Span(
            label=label,
            score=float(np.mean([token.score for token in own])),
            source=own[0].source,
            start=own[0].start,
            end=own[-1].end,
            text=texts[own[0].source][own[0].start : own[-1].end],
        )
        for label, own in groups
        if label != _OUTSIDE
    ]


def _split(label: str) -> tuple[bool, str]:
    """Whether it begins a span, and the label of the span."""
    if label.startswith(("B-", "I-")):
        return label.startswith("B-"), label[2:]
    return False, label
