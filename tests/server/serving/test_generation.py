from __future__ import annotations

import asyncio
import gc
import time
import weakref
from contextlib import aclosing, suppress
from dataclasses import replace

import pytest

from support.fake_device import make_spec
from support.tokenizers import VOCAB_SIZE, make_tokenizer
from turret_adapters.host import HostAdapter
from turret_adapters.spec import Split
from turret_server import logs
from turret_server.engine.admission import TenantLimits
from turret_server.engine.request import FinishReason as EngineFinishReason
from turret_server.engine.request import LogitAdjustment, Logprob, Output, SamplingParams
from turret_server.errors import (
    InvalidRequestError,
    OutOfMemoryError,
    PromptTooLongError,
    QuotaExceededError,
)
from turret_server.serving.chat import Chat, Message, ToolChoice
from turret_server.serving.codec import TextCodec
from turret_server.serving.request import AdapterRef, FinishReason, GenerationRequest, TokenLogprob, Usage

REQUEST = GenerationRequest(prompt=[5, 6, 7])


async def job_of(services, caller, request=REQUEST):
    services.engine.answer([9])
    await services.generate(request, caller)
    return services.engine.jobs.pop()


async def test_sampling_parameters_reach_the_sampler(services, admin):
    request = replace(REQUEST, max_tokens=4, temperature=0.5, top_p=0.25, top_k=6, seed=8, priority=-4)
    job = await job_of(services, admin, request)
    assert job.sampling == SamplingParams(max_tokens=4, temperature=0.5, top_p=0.25, top_k=6, seed=8)
    assert job.priority == -4
    assert job.stop_token_ids == {1}


async def test_stop_tokens_of_the_request_and_stop_strings_that_are_special_tokens_reach_the_engine(
    services, admin
):
    request = replace(REQUEST, stop_token_ids=(5, 7), stop=("<s>", "the"))
    assert (await job_of(services, admin, request)).stop_token_ids == {0, 1, 5, 7}
    with pytest.raises(InvalidRequestError, match=f"below {VOCAB_SIZE}.*found {VOCAB_SIZE}") as refused:
        await job_of(services, admin, replace(REQUEST, stop_token_ids=(5, VOCAB_SIZE)))
    assert refused.value.metadata["field"] == "stop_token_ids"
    await job_of(services, admin, replace(REQUEST, stop_token_ids=(VOCAB_SIZE - 1,)))


async def test_adjustments_of_logits_reach_the_sampler_and_cost_nothing_where_there_are_none(services, admin):
    assert (await job_of(services, admin)).sampling.adjustment is None
    wanted = {
        "min_tokens": 3,
        "logit_bias": {5: -1.5},
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.25,
    }
    job = await job_of(services, admin, replace(REQUEST, **wanted, min_p=0.5, logprobs=2, prompt_logprobs=0))
    assert job.sampling.adjustment == LogitAdjustment(**wanted)
    assert (job.sampling.min_p, job.sampling.logprobs, job.sampling.prompt_logprobs) == (0.5, 2, 0)
    for name, value in wanted.items():
        found = (await job_of(services, admin, replace(REQUEST, **{name: value}))).sampling.adjustment
        assert found == LogitAdjustment(**{name: value})


async def test_tokens_with_a_bias_are_of_the_vocabulary(services, admin):
    with pytest.raises(InvalidRequestError, match="logit_bias has token ids below") as refused:
        await job_of(services, admin, replace(REQUEST, logit_bias={VOCAB_SIZE: 1.0}))
    assert refused.value.metadata["field"] == "logit_bias"


async def test_the_end_of_sequence_can_be_ignored_and_the_requests_own_stops_not(services, admin):
    request = replace(REQUEST, ignore_eos=True)
    assert (await job_of(services, admin, request)).stop_token_ids == set()
    request = replace(request, stop_token_ids=(5,), stop=("<s>",))
    assert (await job_of(services, admin, request)).stop_token_ids == {0, 5}


async def test_an_answer_is_never_cut_below_the_fewest_tokens(services, admin):
    with pytest.raises(InvalidRequestError, match="min_tokens is at most max_tokens, which is 3; found 4"):
        await job_of(services, admin, replace(REQUEST, min_tokens=4, max_tokens=3))
    with pytest.raises(PromptTooLongError):
        await job_of(services, admin, replace(REQUEST, min_tokens=62))
    assert (await job_of(services, admin, replace(REQUEST, min_tokens=61))).max_tokens == 61


async def text_of(services, caller, token_ids, end=EngineFinishReason.STOP, **fields):
    services.engine.answer(token_ids, end)
    chunks = await services.generate(replace(REQUEST, **fields), caller)
    return "".join(chunk.text for chunk in chunks)


async def test_what_ended_an_answer_is_in_its_text_if_that_is_wanted(services, admin, codec):
    a, x = codec.encode("a", 64), codec.encode("x", 64)
    length = EngineFinishReason.LENGTH
    assert await text_of(services, admin, [*a, *x, *a], length, stop=("x",)) == "a"
    assert await text_of(services, admin, [*a, *x, *a], length, stop=("x",), include_stop=True) == "ax"
    # Special tokens: one that the request names, and the end of the sequence.
    assert await text_of(services, admin, [*a, 0], stop=("<s>",)) == "a"
    assert await text_of(services, admin, [*a, 0], stop=("<s>",), include_stop=True) == "a<s>"
    assert await text_of(services, admin, [*a, 0], stop_token_ids=(0,), include_stop=True) == "a<s>"
    assert await text_of(services, admin, [*a, 1], include_stop=True) == "a"
    # The text of any other token belongs to the answer in any case.
    assert await text_of(services, admin, [*a, *x], stop_token_ids=tuple(x)) == "ax"


async def test_special_tokens_are_in_the_text_if_they_are_not_to_be_skipped(services, admin, codec):
    a = codec.encode("a", 64)
    assert await text_of(services, admin, [*a, 0, *a, 1]) == "aa"
    assert await text_of(services, admin, [*a, 0, *a, 1], skip_special_tokens=False) == "a<s>a"
    shown = await text_of(services, admin, [*a, 0, *a, 1], skip_special_tokens=False, include_stop=True)
    assert shown == "a<s>a</s>"


async def test_a_stop_string_within_the_fewest_tokens_does_not_count(services, admin, codec):
    token_ids = [*codec.encode("a", 64), *codec.encode("x", 64)] * 2
    length = EngineFinishReason.LENGTH
    assert await text_of(services, admin, token_ids, length, stop=("x",), min_tokens=1) == "a"
    assert await text_of(services, admin, token_ids, length, stop=("x",), min_tokens=2) == "axa"
    assert await text_of(services, admin, token_ids, length, stop=("xa",), min_tokens=2) == "axax"


async def test_log_probabilities_come_with_their_tokens_and_the_bytes_of_these(services, admin, codec):
    [a], [x] = codec.encode("a", 64), codec.encode("x", 64)
    first, second = Logprob(a, -1.0, 2, ((x, -0.5), (a, -1.0))), Logprob(x, -0.25, 1, ())
    services.engine.outputs = [
        Output(token_id=a, logprob=first, prompt_logprobs=(second, first)),
        Output(token_id=x, logprob=second, finish_reason=EngineFinishReason.LENGTH),
    ]
    chunks = await services.generate(replace(REQUEST, logprobs=2, prompt_logprobs=2), admin)
    top = (
        TokenLogprob(token_id=x, token=b"x", logprob=-0.5, rank=1),
        TokenLogprob(token_id=a, token=b"a", logprob=-1.0, rank=2),
    )
    found = TokenLogprob(token_id=a, token=b"a", logprob=-1.0, rank=2, top=top)
    other = TokenLogprob(token_id=x, token=b"x", logprob=-0.25, rank=1)
    assert [chunk.logprobs for chunk in chunks] == [(found,), (other,)]
    assert [chunk.prompt_logprobs for chunk in chunks] == [(other, found), ()]


async def test_several_answers_have_jobs_and_seeds_of_their_own(services, admin):
    services.engine.answer([9])
    request = replace(REQUEST, n=3, temperature=0.5, seed=7, prompt_logprobs=1)
    await services.generate(request, admin)
    first, *others = services.engine.jobs
    assert (first.leader, first.sampling.seed, first.sampling.prompt_logprobs) == (None, 7, 1)
    assert [job.leader for job in others] == [first.request_id] * 2
    assert len({job.request_id for job in services.engine.jobs}) == 3
    seeds = [job.sampling.seed for job in services.engine.jobs]
    assert len(set(seeds)) == 3
    assert all(
        job.sampling == replace(first.sampling, seed=seed, prompt_logprobs=None)
        for job, seed in zip(others, seeds[1:], strict=True)
    )
    services.engine.jobs.clear()
    await services.generate(request, admin)
    assert [job.sampling.seed for job in services.engine.jobs] == seeds


async def test_several_answers_of_a_greedy_request_are_refused(services, admin):
    with pytest.raises(InvalidRequestError, match="at temperature 0 all answers are the same") as refused:
        await services.generate(replace(REQUEST, n=2), admin)
    assert refused.value.metadata["field"] == "n"


async def test_several_answers_end_one_by_one_and_their_usage_comes_with_the_last(services, caller_of, codec):
    caller = caller_of(tokens_per_minute=63)
    [a], [x] = codec.encode("a", 64), codec.encode("x", 64)
    request = replace(REQUEST, n=2, temperature=1.0, stop=("x",), max_tokens=30)
    async with aclosing(services.generation.generate(request, caller)) as chunks:
        reader = asyncio.ensure_future(_rest(chunks))
        first, second = [await services.engine.arrivals.get() for _ in range(2)]
        first.sink(Output(token_id=a, cached_tokens=2))
        second.sink(Output(token_id=a, cached_tokens=3))
        second.sink(Output(token_id=x, cached_tokens=3))
        await arrived()
        assert ("cancel", second.request_id) in services.engine.calls
        assert ("cancel", first.request_id) not in services.engine.calls
        # What the engine has computed beyond counts for nothing.
        second.sink(Output(token_id=a, cached_tokens=3))
        first.sink(Output(token_id=a, finish_reason=EngineFinishReason.LENGTH, cached_tokens=2))
        found = await reader
    assert [(chunk.index, chunk.text, chunk.finish_reason) for chunk in found] == [
        (0, "a", None), (1, "a", None), (1, "", FinishReason.STOP), (0, "a", FinishReason.LENGTH),
    ]  # fmt: skip
    assert [chunk.usage for chunk in found[:-1]] == [None] * 3
    assert found[-1].usage == Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=4)
    [entry] = services.usage.entries
    assert (entry["prompt_tokens"], entry["generated_tokens"], entry["finish_reason"]) == (3, 4, "length")
    assert services.used("acme", "", "prompt") == 3
    assert services.used("acme", "", "generated") == 4
    assert services.metrics.get_sample_value("turret_inter_token_seconds_count") == 2
    with pytest.raises(QuotaExceededError, match="has 56 of its 63"):
        await services.generate(replace(REQUEST, max_tokens=54), caller)


async def _rest(chunks):
    return [chunk async for chunk in chunks]


async def test_all_answers_are_cancelled_when_one_fails_or_the_client_leaves(services, admin):
    request = replace(REQUEST, n=2, temperature=1.0)

    async def cancelled_after(output):
        services.engine.calls.clear()
        async with aclosing(services.generation.generate(request, admin)) as chunks:
            reader = asyncio.ensure_future(anext(chunks))
            jobs = [await services.engine.arrivals.get() for _ in range(2)]
            jobs[1].sink(output)
            with suppress(OutOfMemoryError):
                await reader
        return {each for what, each in services.engine.calls if what == "cancel"} == {
            job.request_id for job in jobs
        }

    assert await cancelled_after(Output(token_id=9))
    assert await cancelled_after(
        Output(error=OutOfMemoryError("full"), finish_reason=EngineFinishReason.FAILED)
    )
    assert (services.count("cancelled"), services.count("out_of_memory")) == (1, 1)


async def test_an_answer_says_which_stop_ended_it(services, admin, codec):
    async def end_of(token_ids, end=EngineFinishReason.STOP, **fields):
        services.engine.answer(token_ids, end)
        chunks = await services.generate(replace(REQUEST, **fields), admin)
        assert {(chunk.stop_string, chunk.stop_token_id) for chunk in chunks[:-1]} <= {(None, None)}
        return chunks[-1].finish_reason, chunks[-1].stop_string, chunks[-1].stop_token_id

    stop, length = FinishReason.STOP, FinishReason.LENGTH
    a, x = codec.encode("a", 64), codec.encode("x", 64)
    assert await end_of([*a, 1]) == (stop, None, 1)
    assert await end_of([*a, 7], stop_token_ids=(7,)) == (stop, None, 7)
    assert await end_of([*a, 0], stop=("<s>", "x")) == (stop, "<s>", 0)
    assert await end_of([*a, *x, *a], EngineFinishReason.LENGTH, stop=("<s>", "x")) == (stop, "x", None)
    assert await end_of([*a, *x], stop_token_ids=tuple(x), stop=("x",)) == (stop, "x", None)
    assert await end_of([*a, *a], EngineFinishReason.LENGTH, stop=("x",)) == (length, None, None)


async def test_text_continues_the_prompt(services, admin):
    codec = TextCodec(make_tokenizer("byte-fallback"))
    base = services.jobs._vocabularies._base
    services.jobs._vocabularies._base = replace(base, codec=codec)
    services.engine.answer(codec.encode("fox", 64))
    chunks = await services.generate(replace(REQUEST, prompt=codec.encode("the", 64)), admin)
    assert "".join(chunk.text for chunk in chunks) == " fox"


async def test_a_seed_is_drawn_where_none_is_given(services, admin):
    drawn = [(await job_of(services, admin)).sampling.seed for _ in range(8)]
    assert len(set(drawn)) == 8
    assert max(drawn).bit_length() > 32
    assert (await job_of(services, admin, replace(REQUEST, seed=0))).sampling.seed == 0


async def test_without_max_tokens_the_answer_fills_the_context_that_virtual_tokens_leave(services, admin):
    request = replace(REQUEST, adapters=[AdapterRef(name="first")])
    assert (await job_of(services, admin, request)).sampling.max_tokens == 64 - 3 - 2
    with pytest.raises(PromptTooLongError):
        await job_of(services, admin, replace(request, max_tokens=60))


async def test_the_engines_log_lines_name_the_request(services, admin):
    with logs.about({"request_id": "request-1"}):
        job = await job_of(services, admin, replace(REQUEST, adapters=[AdapterRef(name="poet")]))
        assert (job.about["request_id"], job.about["adapter"]) == ("request-1", "poet")


async def test_a_routing_key_decides_in_a_split(services, admin):
    services.registry.add(HostAdapter(spec=make_spec("9" * 32, slab_pages=1), deltas={}))
    services.registry.split("poet", Split("9" * 32, 50))
    found = {}
    for key in map(str, range(20)):
        request = replace(REQUEST, adapters=[AdapterRef(name="poet")], routing_key=key)
        jobs = [await job_of(services, admin, request) for _ in range(2)]
        [found[key]] = {job.adapters[0].spec.revision for job in jobs}
    assert set(found.values()) == {"1" * 32, "9" * 32}


async def test_an_answer_comes_in_chunks_and_its_usage_with_the_last(services, admin, codec):
    token_ids = codec.encode("the fox", 64)
    services.engine.answer(token_ids)
    chunks = await services.generate(replace(REQUEST, adapters=[AdapterRef(name="poet")]), admin)
    assert "".join(chunk.text for chunk in chunks) == "the fox"
    assert [chunk.token_ids for chunk in chunks] == [(each,) for each in token_ids]
    assert {chunk.revision for chunk in chunks} == {"1" * 32}
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].usage == Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=len(chunks))


@pytest.mark.parametrize("end", [EngineFinishReason.LENGTH, EngineFinishReason.STOP])
async def test_text_that_was_held_back_comes_with_the_end_and_its_reason(services, admin, codec, end):
    services.engine.answer(codec.encode("axy", 64), end)
    chunks = await services.generate(replace(REQUEST, stop=("xyz",)), admin)
    assert [chunk.text for chunk in chunks] == ["a", "", "xy"]
    assert chunks[-1].finish_reason == FinishReason(end.value)


async def test_a_stop_string_ends_an_answer_whatever_the_engine_has_beyond(services, admin, codec):
    services.engine.answer(codec.encode("axyzb", 64))
    chunks = await services.generate(replace(REQUEST, stop=("xyz",)), admin)
    assert [chunk.text for chunk in chunks] == ["a", "", "", ""]
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].usage.generated_tokens == 4
    assert services.usage.entries[-1]["finish_reason"] == "stop"
    assert {what for what, _ in services.engine.calls} == {"submit", "cancel"}


async def arrived():
    """Outputs go from the engine to the event loop in one turn of it."""
    await asyncio.sleep(0)


async def test_tokens_count_once_and_alike_whether_or_not_the_client_reads_them(services, caller_of):
    caller = caller_of(tokens_per_minute=20)
    request = replace(REQUEST, max_tokens=17)
    services.engine.outputs = [Output(token_id=9)] * 5
    async with aclosing(services.generation.generate(request, caller)) as chunks:
        await anext(chunks)
        await arrived()
    # What comes after the end counts for nothing.
    services.engine.jobs[-1].sink(Output(token_id=9))
    await arrived()
    [entry] = services.usage.entries
    assert (entry["finish_reason"], entry["generated_tokens"]) == ("cancelled", 5)
    assert services.used("acme", "", "generated") == 5
    assert services.metrics.get_sample_value("turret_generated_tokens_total") == 5
    with pytest.raises(QuotaExceededError, match="has 12 of its 20 tokens"):
        await services.generate(request, caller)


async def test_a_stop_string_stops_the_engine_although_the_client_reads_nothing(services, admin, codec):
    first, *others = codec.encode("axyz", 64)
    services.engine.outputs = [Output(token_id=first)]
    async with aclosing(services.generation.generate(replace(REQUEST, stop=("xyz",)), admin)) as chunks:
        await anext(chunks)
        for token_id in (*others, 9, 9):
            services.engine.jobs[-1].sink(Output(token_id=token_id))
        await arrived()
        assert [what for what, _ in services.engine.calls] == ["submit", "cancel"]
    [entry] = services.usage.entries
    assert (entry["finish_reason"], entry["generated_tokens"]) == ("cancelled", 4)
    assert services.used("acme", "", "generated") == 4


async def test_a_request_that_failed_while_its_client_read_nothing_has_failed(services, admin):
    services.engine.outputs = [
        Output(token_id=9),
        Output(error=OutOfMemoryError("no memory"), finish_reason=EngineFinishReason.FAILED),
    ]
    async with aclosing(services.generation.generate(REQUEST, admin)) as chunks:
        await anext(chunks)
        await arrived()
    assert (services.count("out_of_memory"), services.count("cancelled")) == (1, 0)


@pytest.mark.parametrize(("seconds", "outcome"), [(0.01, "deadline_exceeded"), (60.0, "cancelled")])
async def test_a_deadline_that_cancels_a_request_is_no_cancellation(services, admin, seconds, outcome):
    services.engine.outputs = [Output(token_id=9)]
    request = replace(REQUEST, deadline=time.monotonic() + seconds)
    async with aclosing(services.generation.generate(request, admin)) as chunks:
        await anext(chunks)
    assert services.count(outcome) == 1
    assert services.usage.entries[-1]["finish_reason"] == outcome


@pytest.mark.parametrize("stop", ["xyz", "z"])
async def test_a_stop_string_with_the_last_token_counts_as_a_stop(services, admin, codec, stop):
    services.engine.answer(codec.encode("axyz", 64))
    chunks = await services.generate(replace(REQUEST, stop=(stop,)), admin)
    assert "".join(chunk.text for chunk in chunks) == "axyz".removesuffix(stop)
    assert chunks[-1].finish_reason is FinishReason.STOP


async def test_a_request_is_in_the_usage_log_before_its_last_chunk_comes(services, admin):
    services.engine.answer([9, 10])
    entries = services.usage.entries
    async with aclosing(services.generation.generate(REQUEST, admin)) as chunks:
        await anext(chunks)
        assert entries == []
        last = await anext(chunks)
        assert (last.finish_reason, len(entries)) == (FinishReason.LENGTH, 1)
    assert len(entries) == 1
    assert services.count("ok") == 1


async def test_an_error_of_the_engine_ends_the_answer_and_releases_everything(services, admin):
    services.engine.outputs = [
        Output(token_id=9),
        Output(error=OutOfMemoryError("no memory"), finish_reason=EngineFinishReason.FAILED),
    ]
    chunks = services.generation.generate(replace(REQUEST, adapters=[AdapterRef(name="poet")]), admin)
    assert (await anext(chunks)).token_ids == (9,)
    with pytest.raises(OutOfMemoryError):
        await anext(chunks)
    assert services.registry.status("poet").active_requests == 0
    assert [what for what, _ in services.engine.calls] == ["submit", "cancel"]
    assert services.count("out_of_memory") == 1
    assert services.used("acme", "poet", "generated") == 1


async def test_closing_an_answer_cancels_its_job_at_once(services, admin):
    services.engine.answer([9, 10])
    async with aclosing(services.generation.generate(REQUEST, admin)) as chunks:
        await anext(chunks)
        assert [what for what, _ in services.engine.calls] == ["submit"]
    assert [what for what, _ in services.engine.calls] == ["submit", "cancel"]
    assert services.count("cancelled") == 1


@pytest.mark.parametrize("change", [{"top_p": 2.0}, {"adapters": [AdapterRef(name="a b")]}, {"prompt": None}])
async def test_an_invalid_request_never_reaches_the_engine_and_is_counted(services, admin, change):
    with pytest.raises(InvalidRequestError):
        await services.generate(replace(REQUEST, **change), admin)
    assert services.engine.calls == []
    assert services.count("invalid_request") == 1


async def test_the_form_of_an_answer_reaches_the_engine(services, admin, codec):
    assert (await job_of(services, admin)).grammar is None
    job = await job_of(services, admin, replace(REQUEST, regex="ab"))
    matcher = job.grammar.start()
    for token_id in codec.encode("ab", 9, add_special_tokens=False):
        assert not matcher.is_complete
        matcher.accept(token_id)
    assert matcher.is_complete


async def test_an_answer_whose_form_is_complete_was_ended_by_no_token(services, admin, codec):
    [token_id] = codec.encode("a", 9, add_special_tokens=False)
    services.engine.answer([token_id], EngineFinishReason.STOP)
    [chunk] = await services.generate(replace(REQUEST, regex="a"), admin)
    assert (chunk.text, chunk.finish_reason, chunk.stop_token_id) == ("a", FinishReason.STOP, None)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"regex": "("}, "regex"), ({"regex": "a", "stop": ("a",)}, "stop"), ({"choice": ("a",), "n": 0}, "n")],
)
async def test_a_form_that_is_refused_reaches_no_engine(services, admin, fields, field):
    with pytest.raises(InvalidRequestError) as refused:
        await services.generate(replace(REQUEST, **fields), admin)
    assert refused.value.metadata["field"] == field
    assert not services.engine.jobs


CHAT = Chat(messages=(Message(role="user", content=("the fox",)),))
TOOL = {"type": "function", "function": {"name": "f"}}


async def test_a_chat_is_rendered_and_gets_no_second_beginning(services, admin, codec, monkeypatch):
    job = await job_of(services, admin, replace(REQUEST, prompt=CHAT))
    assert codec.decode(job.prompt_token_ids) == "[user]the fox[assistant]"
    monkeypatch.setattr(services.jobs._chats, "base", "<s>{{ messages[0].content }}")
    job = await job_of(services, admin, replace(REQUEST, prompt=CHAT))
    assert job.prompt_token_ids[0] == 0
    assert 0 not in job.prompt_token_ids[1:]


async def test_calls_of_tools_are_no_text_and_are_why_an_answer_ended(services, admin, codec, monkeypatch):
    monkeypatch.setattr(services.jobs._chats, "base", "{{ tools }}<tool_call>")
    answer = 'the <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    services.engine.answer([*codec.encode(answer, 64), 1], EngineFinishReason.STOP)
    request = replace(REQUEST, prompt=replace(CHAT, tools=(TOOL,)))
    chunks = await services.generate(request, admin)
    assert "".join(chunk.text for chunk in chunks) == "the"
    deltas = [delta for chunk in chunks for delta in chunk.tool_calls]
    assert [delta.name for delta in deltas if delta.name] == ["f"]
    assert "".join(delta.arguments for delta in deltas) == '{"a": 1}'
    assert chunks[-1].finish_reason is FinishReason.TOOL_CALLS
    assert chunks[-1].usage
    # Without tools it is text.
    plain = await services.generate(replace(request, prompt=CHAT), admin)
    assert "".join(chunk.text for chunk in plain) == answer
    assert plain[-1].finish_reason is FinishReason.STOP


async def test_an_answer_that_is_cut_within_a_call_says_so(services, admin, codec, monkeypatch):
    monkeypatch.setattr(services.jobs._chats, "base", "{{ tools }}<tool_call>")
    services.engine.answer(codec.encode('<tool_call>{"name": "f", "arguments": {"a"', 64))
    chunks = await services.generate(replace(REQUEST, prompt=replace(CHAT, tools=(TOOL,))), admin)
    assert "".join(delta.arguments for chunk in chunks for delta in chunk.tool_calls) == '{"a"'
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_reasoning_has_a_field_of_its_own(services, admin, codec, monkeypatch):
    monkeypatch.setattr(services.jobs._chats, "base", "{{ messages[0].content }}<think>\n")
    services.engine.answer(codec.encode("the fox </think> the dog", 64))
    chunks = await services.generate(replace(REQUEST, prompt=CHAT), admin)
    assert "".join(chunk.reasoning for chunk in chunks) == "the fox"
    assert "".join(chunk.text for chunk in chunks) == "the dog"


async def test_an_answer_has_its_form_after_the_reasoning(services, admin, codec, monkeypatch):
    monkeypatch.setattr(services.jobs._chats, "base", "{{ messages[0].content }}<think>\n")
    services.engine.answer(codec.encode("the fox </think> 12", 64))
    await services.generate(replace(REQUEST, prompt=CHAT, regex="[0-9]+"), admin)
    [job] = services.engine.jobs
    matcher = job.grammar.start()
    for token_id in codec.encode("the fox </think> 12", 64):
        matcher.accept(token_id)
    allowed = matcher.allowed()
    for text, is_allowed in (("3", True), ("fox", False)):
        [token_id, *_] = codec.encode(text, 64)
        assert bool(allowed[token_id // 8] >> token_id % 8 & 1) is is_allowed


class Text(str):
    """A text to which weak references are possible."""

    __slots__ = ("__weakref__",)


@pytest.fixture
def without_gc():
    """Only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("end", ["done", "refused", "failed", "closed"])
async def test_a_request_is_freed_when_it_ends(services, admin, end):
    """It may have megabytes, which garbage collection would free much later."""
    text = Text("the quick fox " * (1 if end != "refused" else 10_000))
    alive, request = weakref.ref(text), GenerationRequest(prompt=text)
    del text
    if end == "failed":
        services.engine.outputs = [
            Output(error=OutOfMemoryError("no memory"), finish_reason=EngineFinishReason.FAILED)
        ]
    elif end == "done":
        services.engine.answer([9])
    if end == "closed":
        chunks = services.generation.generate(request, admin)
        waiting = asyncio.create_task(anext(chunks))
        await arrived()
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        del chunks, waiting
    else:
        with suppress(PromptTooLongError, OutOfMemoryError):
            await services.generate(request, admin)
    services.engine.jobs.clear()
    services.engine.arrivals = asyncio.Queue()
    services.engine.outputs.clear()
    del request
    await asyncio.sleep(0)
    assert alive() is None


async def test_an_answer_that_must_call_a_tool_has_its_form(services, admin, codec, monkeypatch):
    monkeypatch.setattr(services.jobs._chats, "base", "{{ tools }}<tool_call>")
    chat = replace(CHAT, tools=(TOOL,), tool_choice=ToolChoice.REQUIRED)
    job = await job_of(services, admin, replace(REQUEST, prompt=chat))
    matcher = job.grammar.start()
    for token_id in codec.encode('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', 64):
        assert not matcher.is_complete
        matcher.accept(token_id)
    assert matcher.is_complete
    monkeypatch.setattr(services.jobs._chats, "base", "{{ tools }}")
    with pytest.raises(InvalidRequestError, match="auto or none for this model"):
        await job_of(services, admin, replace(REQUEST, prompt=chat))


async def test_more_answers_than_the_tenant_may_queue_are_refused(services, caller_of, codec):
    few = caller_of(limits=TenantLimits(max_queued_requests=3))
    services.engine.answer(codec.encode("a fox", 64))
    request = replace(REQUEST, n=4, temperature=1.0)
    with pytest.raises(InvalidRequestError, match="at most 3 answers") as refused:
        await services.generate(request, few)
    assert refused.value.metadata["field"] == "n"
    assert await services.generate(replace(request, n=3), few)


async def test_answers_with_more_tokens_than_the_tenant_may_queue_are_refused(services, caller_of, codec):
    few = caller_of(limits=TenantLimits(max_queued_tokens=100))
    services.engine.answer(codec.encode("a fox", 64))
    request = replace(REQUEST, n=2, temperature=1.0, max_tokens=60)
    with pytest.raises(InvalidRequestError, match="at most 100 tokens"):
        await services.generate(request, few)
    assert services.engine.jobs == []
    assert await services.generate(replace(request, max_tokens=40), few)
