from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from support.fake_device import make_spec
from support.tokenizers import VOCAB_SIZE, make_tokenizer
from turret_adapters.errors import RevisionCorruptError
from turret_adapters.formats.tokenizer import OwnTokenizer
from turret_adapters.host import HostAdapter
from turret_server.engine.request import FinishReason
from turret_server.errors import InvalidRequestError
from turret_server.serving import vocabulary as vocabularies_module
from turret_server.serving.codec import TextCodec
from turret_server.serving.request import AdapterRef, GenerationRequest
from turret_server.serving.vocabulary import Vocabularies, Vocabulary

BASE = Vocabulary(codec=TextCodec(make_tokenizer()), size=100, stop_token_ids=frozenset({1}))
NEW = len(make_tokenizer())  # the id of the token that `own_tokenizer` adds


def spec(tokenizer: str = "", vocab_size: int | None = None, revision: str = "1" * 32):
    return replace(make_spec(revision, slab_pages=1), tokenizer=tokenizer, vocab_size=vocab_size)


def test_token_ids_are_of_the_vocabulary():
    BASE.check_token_ids([0, 99])
    with pytest.raises(InvalidRequestError, match="below 100, the size of the vocabulary; found 100"):
        BASE.check_token_ids([0, 100, 5])
    with pytest.raises(InvalidRequestError, match="has no tokens"):
        BASE.check_token_ids([])


@pytest.mark.parametrize("wrong", [100, -1])
def test_tokens_that_a_field_names_are_of_the_vocabulary(wrong):
    BASE.check_named([0, 99], "logit_bias")
    with pytest.raises(
        InvalidRequestError, match=f"logit_bias has .* below 100, .* found {wrong}"
    ) as refused:
        BASE.check_named([5, wrong], "logit_bias")
    assert refused.value.metadata["field"] == "logit_bias"


async def test_a_request_without_a_tokenizer_of_its_own_uses_the_bases(own_tokenizer):
    vocabularies = Vocabularies(BASE, own_tokenizer)
    assert await vocabularies.of([]) is BASE
    assert await vocabularies.of([spec()]) is BASE
    assert await vocabularies.of([spec(vocab_size=102)]) == replace(BASE, size=102)


async def test_an_adapters_tokenizer_brings_its_tokens_and_its_end(own_tokenizer):
    own = await Vocabularies(BASE, own_tokenizer).of([spec(), spec("t", vocab_size=102)])
    assert own.codec.encode("<|new|>", 64) == [NEW]
    assert own.stop_token_ids == {1, NEW}
    assert own.size == 102


async def test_a_tokenizer_is_read_once_for_all_adapters_that_share_it(own_tokenizer, monkeypatch):
    monkeypatch.setattr(vocabularies_module, "_CACHED", 2)
    read = []

    def reading(revision: str):
        read.append(revision)
        return own_tokenizer(revision)

    vocabularies = Vocabularies(BASE, reading)
    for tokenizer, revision in [
        ("a", "1"),
        ("a", "2"),
        ("b", "3"),
        ("a", "4"),
        ("c", "5"),
        ("a", "6"),
        ("b", "7"),
    ]:
        await vocabularies.of([spec(tokenizer, revision=revision * 32)])
    assert [revision[0] for revision in read] == ["1", "3", "5", "7"], (
        "the least recently used one was dropped"
    )


async def test_a_tokenizer_that_is_unreadable_now_is_read_again_by_the_next_request(own_tokenizer):
    errors = [RevisionCorruptError("damaged")]

    def reading(revision: str):
        if errors:
            raise errors.pop()
        return own_tokenizer(revision)

    vocabularies = Vocabularies(BASE, reading)
    with pytest.raises(RevisionCorruptError):
        await vocabularies.of([spec("t")])
    assert (await vocabularies.of([spec("t")])).codec.special_token_id("<|new|>") == NEW


async def test_requests_that_come_at_once_read_a_tokenizer_once(own_tokenizer):
    read = []

    def reading(revision: str):
        read.append(revision)
        return own_tokenizer(revision)

    vocabularies = Vocabularies(BASE, reading)
    wanted = [spec(tokenizer) for tokenizer in "aabab"]
    found = await asyncio.gather(*(vocabularies.of([each]) for each in wanted))
    assert len(read) == 2
    assert found[0] is found[1] is found[3]
    assert found[2] is found[4]


async def test_a_vocabulary_is_made_beside_the_event_loop(own_tokenizer, monkeypatch):
    threads = []

    def codec(_tokenizer: OwnTokenizer) -> TextCodec:
        threads.append(threading.current_thread())
        return BASE.codec

    monkeypatch.setattr(vocabularies_module, "TextCodec", codec)
    await Vocabularies(BASE, own_tokenizer).of([spec("t")])
    assert threads
    assert threads != [threading.current_thread()]


async def test_prompt_stops_and_answer_are_in_the_adapters_vocabulary(services, admin):
    own = spec("t", vocab_size=VOCAB_SIZE + 1, revision="9" * 32)
    services.registry.publish("own", HostAdapter(spec=own, deltas={}))
    request = GenerationRequest(prompt="the <|new|>", adapters=[AdapterRef(name="own")], stop=("<|new|>",))
    services.engine.answer([NEW], FinishReason.STOP)
    [chunk] = await services.generate(request, admin)
    [job] = services.engine.jobs
    assert job.prompt_token_ids[-1] == NEW
    assert job.stop_token_ids == {1, NEW}
    assert job.vocab_size == VOCAB_SIZE + 1
    assert (chunk.text, chunk.stop_string, chunk.stop_token_id) == ("", "<|new|>", NEW)
    with pytest.raises(InvalidRequestError, match=f"below {VOCAB_SIZE}, the size"):
        await services.generate(replace(request, adapters=(), prompt=[VOCAB_SIZE]), admin)
