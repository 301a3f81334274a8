from __future__ import annotations

import pytest

from turret.v1 import inference_pb2, prompts_pb2
from turret_server.serving.request import AdapterRef, PinnedPrompt, PinRequest

PINNED = PinnedPrompt(name="rules", revision="r1", prompt_tokens=40)
MESSAGE = prompts_pb2.PinnedPrompt(name="rules", revision="r1", prompt_tokens=40)
METADATA = (("turret-tenant", "acme"),)


class Prompts:
    """Notes what it is asked, and by which tenant."""

    def __init__(self):
        self.asked = []

    async def pin(self, request, caller):
        self.asked.append((request, caller.tenant.name))
        return PINNED

    def unpin(self, name, caller):
        self.asked.append((name, caller.tenant.name))

    def list(self, caller):
        self.asked.append(caller.tenant.name)
        return [PINNED, PinnedPrompt(name="two", revision="", prompt_tokens=16)]


@pytest.fixture
def prompts():
    return Prompts()


@pytest.fixture
async def stub(open_door, prompts):
    return (await open_door(prompts=prompts)).prompts


async def test_a_prompt_to_pin_is_passed_on_with_every_field(stub, prompts):
    request = prompts_pb2.PinPromptRequest(
        name="rules",
        token_ids=inference_pb2.TokenIds(ids=[3, 1]),
        adapters=[inference_pb2.AdapterRef(name="a", weight=0.5, task=3)],
        cache_salt="salt",
    )
    assert await stub.PinPrompt(request, metadata=METADATA) == prompts_pb2.PinPromptResponse(prompt=MESSAGE)
    assert prompts.asked == [
        (
            PinRequest(
                name="rules",
                prompt=[3, 1],
                adapters=(AdapterRef(name="a", weight=0.5, task=3),),
                cache_salt="salt",
            ),
            "acme",
        )
    ]


async def test_a_pin_has_the_deadline_of_its_call(stub, prompts):
    await stub.PinPrompt(prompts_pb2.PinPromptRequest(name="rules", text="Hello"), timeout=600)
    [(request, _)] = prompts.asked
    assert (request.prompt, request.deadline is not None) == ("Hello", True)


async def test_a_prompt_is_unpinned_for_its_tenant(stub, prompts):
    await stub.UnpinPrompt(prompts_pb2.UnpinPromptRequest(name="rules"), metadata=METADATA)
    assert prompts.asked == [("rules", "acme")]


async def test_the_pinned_prompts_of_a_tenant_are_listed(stub, prompts):
    listed = await stub.ListPinnedPrompts(prompts_pb2.ListPinnedPromptsRequest(), metadata=METADATA)
    assert list(listed.prompts) == [MESSAGE, prompts_pb2.PinnedPrompt(name="two", prompt_tokens=16)]
    assert prompts.asked == ["acme"]
