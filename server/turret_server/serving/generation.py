"""Generation: one request in, chunks of its answer out."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

from turret_server import logs
from turret_server.engine.loop import Engine
from turret_server.engine.request import Grammar, LogitAdjustment, Logprob, Output, Request, SamplingParams
from turret_server.observability.request_log import RequestLog, RequestRecord
from turret_server.serving.chat import Chat
from turret_server.serving.codec import TextCodec
from turret_server.serving.jobs import JobFields, Jobs, Outputs, Prepared
from turret_server.serving.model_info import ModelInfo
from turret_server.serving.request import Chunk, FinishReason, GenerationRequest, TokenLogprob, Usage
from turret_server.serving.structured import (
    Grammars,
    after_reasoning,
    check_stops,
    form_of,
    form_of_call,
    must_call,
)
from turret_server.serving.text import TextStream
from turret_server.serving.tools import AnswerParser
from turret_server.serving.validation import check_num_answers, check_num_tokens, validate
from turret_server.tenancy.auth import Caller

_ADJUSTMENT_FIELDS = [field.name for field in fields(LogitAdjustment)]
_SAMPLING_FIELDS = [field.name for field in fields(SamplingParams) if field.name != "adjustment"]


class GenerationService:
    """What every door calls to generate. Used on one event loop."""

    def __init__(
        self, *, engine: Engine, jobs: Jobs, model: ModelInfo, grammars: Grammars, request_log: RequestLog
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._jobs = jobs
        self._model = model
        self._request_log = request_log

    async def generate(self, request: GenerationRequest, caller: Caller) -> AsyncGenerator[Chunk]:
        """Generate, and yield the answer as it comes. Closing the generator cancels the request.

        The texts and token ids of all chunks make the whole answer; the last chunk has `finish_reason` and
        `usage`. When it comes, the request is in the usage log.

        Raises:
            InvalidRequestError: a field is invalid.
            ChatTemplateError: the chat template refuses the chat.
            NoChatTemplateError: there is no chat template.
            PromptTooLongError: prompt and tokens to generate do not fit into the context.
            AdapterError: an adapter does not exist, or its use is invalid.
            QuotaExceededError: the tenant has used its quota.
            TurretError: the engine refuses the request, or the request fails.
        """
        async with self._request_log.follow(caller, request.deadline) as record:
            adapters = validate(request)
            check_num_answers(request.n, caller, "n")
            async with self._jobs.prepare(request, adapters, caller, request.routing_key) as prepared:
                outputs: Outputs[Chunk] = Outputs()
                grammar = await self._grammar(request, prepared)
                jobs = self._jobs_of(request, prepared, grammar, record, outputs)
                check_num_tokens([job.num_tokens for job in jobs], caller, "n")
                with self._jobs.submit(prepared, jobs, record, self._engine.submit):
                    reasons: list[FinishReason] = []
                    while len(reasons) < len(jobs):
                        chunk = await outputs.get()
                        if chunk.finish_reason:
                            reasons.append(chunk.finish_reason)
                        if len(reasons) == len(jobs):
                            await self._request_log.finish(record, _outcome(reasons))
                            chunk = replace(chunk, usage=_usage(record))
                        yield chunk

    async def _grammar(self, request: GenerationRequest, prepared: Prepared) -> Grammar | None:
        form, vocabulary, answers = form_of(request), prepared.vocabulary, prepared.answers
        if isinstance(request.prompt, Chat) and must_call(request):
            form = form_of_call(request.prompt, answers.form if answers else None, vocabulary.codec)
        if form is None:
            return None
        if answers and answers.reasoning:
            form = after_reasoning(form, answers.reasoning, vocabulary.codec)
        check_stops(request, vocabulary)
        return await self._grammars.compiled(form, vocabulary)

    def _jobs_of(
        self,
        request: GenerationRequest,
        prepared: Prepared,
        grammar: Grammar | None,
        record: RequestRecord,
        outputs: Outputs[Chunk],
    ) -> list[Request]:
        """A job for each answer. The first computes the prompt, and the others share it."""
        vocabulary = prepared.vocabulary
        stops = set(request.stop_token_ids).union(_special_stops(request, vocabulary.codec))
        if not request.ignore_eos:
            stops |= vocabulary.stop_token_ids
        sampling = self._sampling(request, prepared)
        jobs: list[Request] = []
        for index in range(request.n):
            fields, own = prepared.fields, sampling
            if jobs:
                fields = JobFields(**fields | {"request_id": self._jobs.next_id()})
                own = replace(sampling, seed=_seed_of(sampling.seed, index), prompt_logprobs=None)
            answer = self._answer(request, prepared, record, index, fields["request_id"], stops)
            job = Request(
                **fields,
                sink=outputs.sink(answer.receive),
                sampling=own,
                stop_token_ids=frozenset(stops),
                leader=jobs[0].request_id if jobs else None,
                grammar=grammar,
                priority=request.priority,
                about=logs.bound(),
            )
            jobs.append(job)
        return jobs

    def _sampling(self, request: GenerationRequest, prepared: Prepared) -> SamplingParams:
        """A sampling field of the protocol reaches the sampler under the same name."""
        vocabulary = prepared.vocabulary
        vocabulary.check_named(request.stop_token_ids, "stop_token_ids")
        vocabulary.check_named(request.logit_bias, "logit_bias")
        adjustment = LogitAdjustment(**{name: getattr(request, name) for name in _ADJUSTMENT_FIELDS})
        fields = {name: getattr(request, name) for name in _SAMPLING_FIELDS}
        if request.seed is None:
            fields["seed"] = secrets.randbits(64)
        num_context, at_least = prepared.num_context, request.min_tokens
        fields["max_tokens"] = self._model.max_tokens(request.max_tokens, num_context, at_least)
        return SamplingParams(**fields, adjustment=None if adjustment == LogitAdjustment() else adjustment)

    def _answer(
        self,
        request: GenerationRequest,
        prepared: Prepared,
        record: RequestRecord,
        index: int,
        request_id: int,
        stop_token_ids: Container[int],
    ) -> _Answer:
        answers, codec = prepared.answers, prepared.vocabulary.codec
        shown = codec.showing(answers.marks) if answers else codec
        if not request.skip_special_tokens:
            shown = codec.with_special_tokens()
        special_stops = _special_stops(request, codec)
        ends = {*request.stop_token_ids, *special_stops}
        return _Answer(
            index=index,
            record=record,
            codec=codec,
            text=TextStream(
                shown,
                prepared.fields["prompt_token_ids"],
                request.stop,
                include_stop=request.include_stop,
                min_tokens=request.min_tokens,
            ),
            stop_token_ids=stop_token_ids,
            special_stops=special_stops,
            shows_end=lambda token_id: (
                request.include_stop and (token_id in ends or not request.skip_special_tokens)
            ),
            parser=answers.parser() if answers else None,
            revision=prepared.lease.revision,
            stop_engine=partial(self._engine.cancel, request_id),
        )


@dataclass(slots=True, kw_only=True)
class _Answer:
    """Makes chunks of tokens as they come, not as the client reads them: a slow reader changes neither what
    is counted nor where a stop string ends the generation. `stop_token_ids` end it, `special_stops` are stop
    strings by their token, `shows_end` says whether a special token that ended the answer is in its text, and
    `parser` finds reasoning and calls of tools in the text.
    """

    index: int
    record: RequestRecord
    codec: TextCodec
    text: TextStream
    stop_token_ids: Container[int]
    special_stops: Mapping[int, str]
    shows_end: Callable[[int], bool]
    revision: str
    stop_engine: Callable[[], None]
    parser: AnswerParser | None
    last_token: float | None = None
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
        self.record.token(output.cached_tokens, emitted, self.last_token)
        self.last_token = emitted
        reason = FinishReason(output.finish_reason.value) if output.finish_reason else None
        piece = self._piece(output.token_id, reason)
        stop_string, stop_token_id = self.text.stopped_by, None
        if stop_string:
            reason = FinishReason.STOP
            self.stop_engine()
        elif reason is FinishReason.STOP and output.token_id in self.stop_token_ids:
            stop_token_id = output.token_id
            stop_string = self.special_stops.get(stop_token_id)
        self.is_whole = reason is not None
        chunk = Chunk(
            text=piece,
            token_ids=(output.token_id,),
            revision=self.revision,
            index=self.index,
            logprobs=(self._logprob(output.logprob),) if output.logprob else (),
            prompt_logprobs=tuple(map(self._logprob, output.prompt_logprobs)),
            finish_reason=reason,
            stop_string=stop_string,
            stop_token_id=stop_token_id,
        )
        return self._parsed(chunk, self.parser) if self.parser else chunk

    def _parsed(self, chunk: Chunk, parser: AnswerParser) -> Chunk:
        found = parser.push(chunk.text, final=self.is_whole)
        reason = chunk.finish_reason
        if reason is FinishReason.STOP and parser.num_calls:
            reason = FinishReason.TOOL_CALLS
        return replace(
            chunk,
            text=found.text,
            reasoning=found.reasoning,
            tool_calls=found.tool_calls,
            finish_reason=reason,
        )

    def _piece(self, token_id: int, reason: FinishReason | None) -> str:
        """The new text. Of a special token that ended the answer, it has the text only if that is wanted."""
        if reason is None:
            return self.text.push(token_id)
        if reason is FinishReason.STOP and self.codec.is_special(token_id):
            text = self.text.finish()
            shown = self.shows_end(token_id) and not self.text.stopped_by
            return text + self.codec.token_bytes(token_id).decode() * shown
        return self.text.push(token_id) + self.text.finish()

    def _logprob(self, found: Logprob) -> TokenLogprob:
        text = self.codec.token_bytes
        return TokenLogprob(
            token_id=found.token_id,
            token=text(found.token_id),
            logprob=found.logprob,
            rank=found.rank,
            top=tuple(
                TokenLogprob(token_id=token_id, token=text(token_id), logprob=logprob, rank=rank)
                for rank, (token_id, logprob) in enumerate(found.top, 1)
            ),
        )


def _special_stops(request: GenerationRequest, codec: TextCodec) -> dict[int, str]:
    """The stop strings that are special tokens, by token: no answer's text ever has them."""
    found = {codec.special_token_id(each): each for each in request.stop}
    return {token_id: each for token_id, each in found.items() if token_id is not None}


def _seed_of(seed: int, index: int) -> int:
    """The seed of another answer than the first, whose draws have nothing in common with other seeds'."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _outcome(reasons: Sequence[FinishReason]) -> str:
    """The reason of a request: that an answer was cut is what its owner may want to know."""
    return (FinishReason.LENGTH if FinishReason.LENGTH in reasons else reasons[-1]).value


def _usage(record: RequestRecord) -> Usage:
    return Usage(
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        generated_tokens=record.generated_tokens,
    )
