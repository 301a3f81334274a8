"""An adapter with added tokens: its tokenizer goes with it into the store, and its requests use it."""

from __future__ import annotations

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from transformers import AutoTokenizer

from support.adapters import VOCABULARIES
from support.models import VOCAB_SIZE
from support.prompts import PROMPT
from support.serving import serving
from turret_client import Client, FailedPreconditionError, InvalidArgumentError
from turret_client import _upload as sending
from turret_server.config import ServerConfig

KIND = "vocabulary-trained"
SIZE = VOCABULARIES[KIND]


@pytest.fixture(scope="module")
def folder(base_of, adapter_of, tmp_path_factory) -> Path:
    """The last tokens of the resized vocabulary are tokens of the tokenizer, the last one ends an answer."""
    folder = tmp_path_factory.mktemp("adapter")
    shutil.copytree(adapter_of("llama", KIND), folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base_of("llama"))
    tokenizer.add_tokens([f"<more{index}>" for index in range(SIZE - 1 - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    assert tokenizer.eos_token_id == SIZE - 1
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(base_of, quantised_cache, tmp_path) -> ServerConfig:
    model = str(base_of("llama"))
    return ServerConfig(model=model, memory="8MiB", cache=quantised_cache, store=tmp_path / "store")


def test_its_requests_are_in_its_tokens_after_a_load_an_upload_and_a_restart(config, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = f"{PROMPT} <more3> <|end|>"
    answers = {}
    with serving(config) as served, Client(served.address) as client:
        loaded = client.load_adapter("loaded", str(folder))
        assert (loaded.vocab_size, loaded.own_tokenizer) == (SIZE, True)
        assert client.upload_adapter("sent", folder).revision == loaded.revision
        assert not list((config.store / "adapters" / loaded.revision).glob("tokenizer*"))
        for name in ("loaded", "sent"):
            answers[name] = client.generate(prompt, adapter=name, max_tokens=12)
        of_tokens = client.generate(tokenizer.encode(prompt), adapter="sent", max_tokens=12)
        assert answers["sent"].usage.prompt_tokens == len(tokenizer.encode(prompt))
        with pytest.raises(InvalidArgumentError, match=f"below {VOCAB_SIZE}"):
            client.generate([SIZE - 1], max_tokens=1)
    assert of_tokens.token_ids == answers["sent"].token_ids == answers["loaded"].token_ids
    with serving(config) as served, Client(served.address) as client:
        again = client.generate(prompt, adapter="sent", max_tokens=12)
    assert (again.text, again.token_ids) == (answers["sent"].text, answers["sent"].token_ids)


def test_its_tokens_may_stop_its_answers_and_no_others(config, folder):
    with serving(config) as served, Client(served.address) as client:
        client.load_adapter("own", str(folder))
        found = client.generate(PROMPT, adapter="own", max_tokens=8)
        stop = found.token_ids[3]
        stopped = client.generate(PROMPT, adapter="own", max_tokens=8, stop_token_ids=[stop, SIZE - 1])
        assert stopped.token_ids == found.token_ids[: found.token_ids.index(stop) + 1]
        with pytest.raises(InvalidArgumentError, match=f"below {VOCAB_SIZE}"):
            client.generate(PROMPT, max_tokens=1, stop_token_ids=[SIZE - 1])


def test_its_tokens_are_biased_penalised_and_scored(config, folder):
    with serving(config) as served, Client(served.address) as client:
        client.load_adapter("own", str(folder))
        wanted, end = SIZE - 2, SIZE - 1
        tokenizer = AutoTokenizer.from_pretrained(folder)
        biased = client.generate(
            [wanted, 5], adapter="own", max_tokens=3, logit_bias={wanted: 100}, logprobs=20, prompt_logprobs=0
        )
        assert biased.token_ids == (wanted,) * 3
        assert {each.text for each in biased.logprobs} == {tokenizer.decode([wanted])}
        assert max(each.token_id for found in biased.logprobs for each in found.top) < SIZE
        # Beside a request of the base, whose rows are shorter.
        asked = {"max_tokens": 6, "logprobs": 20, "prompt_logprobs": 20, "presence_penalty": 2}
        with ThreadPoolExecutor(2) as pool:
            own, base = pool.map(lambda name: client.generate(PROMPT, adapter=name, **asked), ["own", None])
        assert own == client.generate(PROMPT, adapter="own", **asked)
        assert base == client.generate(PROMPT, **asked)
        seen = [each.token_id for found in (*base.logprobs, *base.prompt_logprobs) for each in found.top]
        assert max(seen) < VOCAB_SIZE
        # Its end of an answer waits, and is ignored, as the base's.
        ends = {"adapter": "own", "max_tokens": 4, "logit_bias": {end: 100}}
        assert client.generate(PROMPT, **ends).token_ids == (end,)
        assert len(client.generate(PROMPT, **ends, min_tokens=2).token_ids) == 3
        assert client.generate(PROMPT, **ends, ignore_eos=True).token_ids == (end,) * 4
        with pytest.raises(InvalidArgumentError, match=f"below {VOCAB_SIZE}"):
            client.generate(PROMPT, max_tokens=1, logit_bias={end: 1})


def test_an_upload_that_broke_within_the_tokenizer_goes_on_there(config, folder, monkeypatch):
    monkeypatch.setattr(sending, "_CHUNK_BYTES", 1 << 12)
    files = sending.AdapterFolder("sent", folder, None)
    start = files.start()
    size, offsets = start.start.size, []

    def broken_off():
        yield start
        chunks = files.chunks(0, start.start)
        yield from itertools.takewhile(lambda part: part.chunk.offset < size + (1 << 12), chunks)

    with serving(config) as served, Client(served.address) as client:
        with pytest.raises(grpc.RpcError, match="upload again to continue there"):
            list(client._adapters.UploadAdapter(broken_off()))
        sent = client.upload_adapter("sent", folder, progress=lambda done, _: offsets.append(done))
        assert sent.own_tokenizer
        assert client.load_adapter("loaded", str(folder)).revision == sent.revision
    assert offsets[0] > size


def of_another_model(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(values))


def with_a_token_too_many(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<without a row>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("change", [of_another_model, with_a_token_too_many])
def test_a_tokenizer_that_does_not_fit_leaves_nothing_behind(change, config, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    change(broken)
    with serving(config) as served, Client(served.address) as client:
        for load in (
            lambda: client.load_adapter("broken", str(broken)),
            lambda: client.upload_adapter("broken", broken),
        ):
            with pytest.raises(FailedPreconditionError, match="delete the tokenizer's files"):
                load()
        assert client.list_adapters() == []
        for kept in ("adapters", "staging", "uploads"):
            assert not list((config.store / kept).iterdir())
