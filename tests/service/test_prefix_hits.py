"""A second request with the same long prompt computes its tail only, if its answer cannot be another."""

from __future__ import annotations

import json
import shutil

import pytest

from support.prompts import until
from support.serving import serving
from turret_client import Client
from turret_server.config import ServerConfig

BLOCK = 16
BUDGET = 128
NUM_PROMPT = 1000
# The last token is always computed, for its logits: of 1,000 tokens, 62 blocks can be found.
NUM_FOUND = 992


class Meter:
    """Tokens and steps that the server computed since it was last asked."""

    def __init__(self, served) -> None:
        until(lambda: served.metric("turret_running_requests") == 0)
        self._served = served
        self._seen = self._total()

    def computed(self, num_tokens: int) -> int:
        """Steps since the last call; no others than these tokens were computed in them."""
        tokens, steps = self._seen
        until(lambda: self._total()[0] >= tokens + num_tokens)
        self._seen = self._total()
        assert self._seen[0] == tokens + num_tokens
        return int(self._seen[1] - steps)

    def _total(self) -> tuple[float, float]:
        metric = self._served.metric
        return metric("turret_batch_tokens_sum"), metric("turret_step_seconds_count")


@pytest.fixture(scope="module")
def served(base_of, quantised_cache, tmp_path_factory):
    # The same weights with a longer context.
    model = tmp_path_factory.mktemp("long") / "llama"
    shutil.copytree(base_of("llama"), model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (model / "config.json").write_text(json.dumps(config))
    settings = ServerConfig(
        model=str(model),
        dtype="float32",
        device="cpu",
        memory="8MiB",
        max_batch_tokens=BUDGET,
        max_step_seconds=60.0,
        cache=quantised_cache,
        store=tmp_path_factory.mktemp("store"),
    )
    with serving(settings) as served:
        assert served.parts.arena.block_size == BLOCK
        yield served


@pytest.fixture
def client(served, adapter_of):
    with Client(served.address) as client:
        client.load_adapter("one", str(adapter_of("llama", "lora")))
        client.load_adapter("two", str(adapter_of("llama", "lora-attention")))
        yield client
    served.parts.engine.check_integrity()


def test_the_same_prompt_is_computed_anew_only_where_its_answer_could_differ(client, served, adapter_of):
    prompt = [3 + index % 311 for index in range(NUM_PROMPT)]
    meter = Meter(served)

    def ask(**options):
        return client.generate(prompt, max_tokens=1, **options)

    def all_of_it(**options):
        answer = ask(**options)
        assert answer.usage.cached_tokens == 0
        assert meter.computed(NUM_PROMPT) >= -(-NUM_PROMPT // BUDGET)
        return answer

    def only_the_tail(**options):
        answer = ask(**options)
        assert answer.usage.cached_tokens == NUM_FOUND
        assert meter.computed(NUM_PROMPT - NUM_FOUND) == 1
        return answer

    first = all_of_it(adapter="one")
    assert only_the_tail(adapter="one").token_ids == first.token_ids
    all_of_it(adapter="two")
    all_of_it()
    salted = all_of_it(adapter="one", cache_salt="pepper")
    assert salted.token_ids == first.token_ids
    only_the_tail(adapter="one", cache_salt="pepper")
    only_the_tail(adapter="one")

    client.load_adapter("one", str(adapter_of("llama", "lora", seed=1)))
    swapped = all_of_it(adapter="one")
    assert swapped.revision != first.revision
    assert only_the_tail(adapter="one").token_ids == swapped.token_ids
    only_the_tail(adapter="two")


def test_a_longer_prompt_computes_what_it_adds(client, served):
    prompt = [5 + index % 307 for index in range(NUM_PROMPT)]
    meter = Meter(served)
    client.generate(prompt, max_tokens=1)
    meter.computed(NUM_PROMPT)
    answer = client.generate([*prompt, *range(3, 53)], max_tokens=1)
    assert answer.usage.cached_tokens == NUM_FOUND
    assert meter.computed(NUM_PROMPT + 50 - NUM_FOUND) == 1
