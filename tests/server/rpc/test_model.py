from __future__ import annotations

import pytest

from turret.v1 import adapters_pb2, chat_pb2, inference_pb2, model_pb2
from turret_server.serving.chat import Chat, Message
from turret_server.serving.model import Model, ModelService
from turret_server.serving.request import AdapterRef, GenerationRequest
from turret_server.serving.tokens import Tokens

MODEL = Model(name="tiny", max_context=64, vocab_size=320, has_chat_template=True, calls_tools=True)


class TokenService:
    """Notes what it is asked."""

    def __init__(self):
        self.asked = []

    async def tokens(self, request, caller):
        self.asked.append((request, caller.tenant.name))
        return Tokens(token_ids=(5, 6), parts=(b"a", b"b"), text="<s>ab")


@pytest.fixture
def tokens():
    return TokenService()


@pytest.fixture
async def stub(open_door, tokens):
    return (await open_door(model=ModelService(MODEL), tokens=tokens)).model


async def test_the_model_is_described_with_the_callers_limits(stub):
    found = (await stub.GetModel(model_pb2.GetModelRequest())).model
    assert (found.name, found.max_context, found.vocab_size) == ("tiny", 64, 320)
    assert (found.has_chat_template, found.calls_tools) == (True, True)
    methods = set(adapters_pb2.AdapterMethod.values()) - {adapters_pb2.ADAPTER_METHOD_UNSPECIFIED}
    assert set(found.adapter_methods) == methods
    assert found.limits == model_pb2.Limits(
        max_adapters=8, max_messages=4096, max_tools=128, max_queued_requests=1024, max_queued_tokens=2**20
    )
    assert not found.limits.HasField("max_pinned_tokens")


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"text": "ab"}, "ab"),
        (
            {"chat": chat_pb2.Chat(messages=[chat_pb2.ChatMessage(role="user", content=["ab"])])},
            Chat(messages=(Message(role="user", content=("ab",)),)),
        ),
    ],
    ids=["text", "chat"],
)
async def test_a_prompt_is_tokenised_as_a_generation_would(stub, tokens, values, prompt):
    request = model_pb2.TokenizeRequest(
        **values, adapters=[inference_pb2.AdapterRef(name="a")], add_special_tokens=False
    )
    answer = await stub.Tokenize(request, metadata=(("turret-tenant", "acme"),))
    assert (list(answer.token_ids), answer.text) == ([5, 6], "<s>ab")
    wanted = GenerationRequest(prompt=prompt, adapters=(AdapterRef(name="a"),), add_special_tokens=False)
    assert tokens.asked == [(wanted, "acme")]


async def test_tokens_become_text_in_the_adapters_vocabulary(stub, tokens):
    request = model_pb2.DetokenizeRequest(token_ids=[5, 6], adapters=[inference_pb2.AdapterRef(name="a")])
    assert (await stub.Detokenize(request)).text == "<s>ab"
    [(asked, _)] = tokens.asked
    assert asked == GenerationRequest(prompt=[5, 6], adapters=(AdapterRef(name="a"),))
