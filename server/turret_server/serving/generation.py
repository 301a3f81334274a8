"""Generation: one request in, chunks of its answer out."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial

from turret_server import logs
from turret_server.engine.loop import Engine
from turret_server.engine.request import Output, Request, SamplingParams
from turret_server.observability.request_log import RequestLog, RequestRecord
from turret_server.serving.codec import TextCodec
from turret_server.serving.jobs import Jobs, Outputs, Prepared
from turret_server.serving.model_info import ModelInfo
from turret_server.serving.request import Chunk, FinishReason, GenerationRequest, Usage
from turret_server.serving.text import TextStream
from turret_server.serving.validation import validate
from turret_server.tenancy.auth import Caller

_SAMPLING_FIELDS = [field.name for field in fields(SamplingParams)]


class GenerationService:
    """What every door calls to generate. Used on one event loop."""

    def __init__(self, *, engine: Engine, jobs: Jobs, model: ModelInfo, request_log: RequestLog) -> None:
        self._engine = engine
        self._jobs = jobs
        self._model = model
        self._request_log = request_log

    async def generate(self, request: GenerationRequest, caller: Caller) -> AsyncGenerator[Chunk]:
        """Generate, and yield the answer as it comes. Closing the generator cancels the request.

        The texts and token ids of all chunks make the whole answer; the last chunk has `finish_reason` and
        `usage`. When it comes, the request is in the usage log.

        Raises:
            InvalidRequestError: a field is invalid.
            PromptTooLongError: prompt and tokens to generate do not fit into the context.
            AdapterError: an adapter does not exist, or its use is invalid.
            QuotaExceededError: the tenant has used its quota.
            TurretError: the engine refuses the request, or the request fails.
        """
        async with self._request_log.follow(caller, request.deadline) as record:
            adapters = validate(request)
            async with self._jobs.prepare(request, adapters, caller, request.routing_key) as prepared:
                answer = self._answer(request, prepared, record)
                outputs = Outputs(answer.receive)
                job = self._job(request, prepared, outputs.put)
                with self._jobs.submit(prepared, job, record, self._engine.submit):
                    reason = None
                    while reason is None:
                        chunk = await outputs.get()
                        if reason := chunk.finish_reason:
                            await self._request_log.finish(record, reason.value)
                        yield chunk

    def _job(self, request: GenerationRequest, prepared: Prepared, sink: Callable[[Output], None]) -> Request:
        # A sampling field of the protocol reaches the sampler under the same name.
        sampling = {name: getattr(request, name) for name in _SAMPLING_FIELDS}
        if request.seed is None:
            sampling["seed"] = secrets.randbits(64)
        sampling["max_tokens"] = self._model.max_tokens(request.max_tokens, prepared.num_context)
        vocabulary = prepared.vocabulary
        stops = vocabulary.all_stop_token_ids(request.stop_token_ids)
        return Request(
            **prepared.fields,
            sink=sink,
            sampling=SamplingParams(**sampling),
            stop_token_ids=stops.union(_special_stops(request, vocabulary.codec)),
            priority=request.priority,
            about=logs.bound(),
        )

    def _answer(self, request: GenerationRequest, prepared: Prepared, record: RequestRecord) -> _Answer:
        return _Answer(
            record=record,
            text=TextStream(prepared.vocabulary.codec, prepared.fields["prompt_token_ids"], request.stop),
            special_stops=_special_stops(request, prepared.vocabulary.codec),
            revision=prepared.lease.revision,
            stop_engine=partial(self._engine.cancel, prepared.fields["request_id"]),
        )


@dataclass(slots=True, kw_only=True)
class _Answer:
    """Makes chunks of tokens as they come, not as the client reads them: a slow reader changes neither what
    is counted nor where a stop string ends the generation. `special_stops` are stop strings by their token.
    """

    record: RequestRecord
    text: TextStream
    special_stops: Mapping[int, str]
    revision: str
    stop_engine: Callable[[], None]
    is_whole: bool = False

    def receive(self, output: Output, emitted: float) -> Chunk | None:
        """The chunk of a token; None for one beyond the end.

        Raises:
            TurretError: the job failed.
        """
        if self.is_whole or self.record.ended is not None:
            return None
        if output.error:
            self.record.error = output.error
            raise output.error
        assert output.token_id is not None, "only an error or a cancellation ends without a token"
        self.record.token(output.cached_tokens, emitted)
        piece = self.text.push(output.token_id)
        reason = None
        if output.finish_reason:
            piece += self.text.finish()
            reason = FinishReason(output.finish_reason.value)
        stop_string, stop_token_id = self.text.stopped_by, None
        if stop_string:
            reason = FinishReason.STOP
            self.stop_engine()
        elif reason is FinishReason.STOP:
            stop_token_id = output.token_id
            stop_string = self.special_stops.get(stop_token_id)
        self.is_whole = reason is not None
        return Chunk(
            text=piece,
            token_ids=(output.token_id,),
            revision=self.revision,
            finish_reason=reason,
            usage=_usage(self.record) if reason else None,
            stop_string=stop_string,
            stop_token_id=stop_token_id,
        )


def _special_stops(request: GenerationRequest, codec: TextCodec) -> dict[int, str]:
    """The stop strings that are special tokens, by token: no answer's text ever has them."""
    found = {codec.special_token_id(each): each for each in request.stop}
    return {token_id: each for token_id, each in found.items() if token_id is not None}


def _usage(record: RequestRecord) -> Usage:
    return Usage(
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        generated_tokens=record.generated_tokens,
    )
