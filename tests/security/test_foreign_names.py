"""A tenant gets the same answer for what belongs to another as for what does not exist, from every method."""

from __future__ import annotations

from functools import partial

import grpc
import pytest

from security.conftest import EVIL, Answer, answer_of
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc, prompts_pb2
from turret.v1.prompts_pb2_grpc import PromptServiceStub

FOREIGN, ABSENT = "good-lora", "good-none"


def answers(channel: grpc.Channel, name: str, folder: str, revision: str) -> list[Answer]:
    """Those of every method that takes the name of an adapter."""
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
    prompts = PromptServiceStub(channel)
    named = (
        [inference_pb2.AdapterRef(name=name)],
        [inference_pb2.AdapterRef(name=name, weight=0.5, task=1)],
        [inference_pb2.AdapterRef(name=f"{name}@{revision[:8]}")],
        [inference_pb2.AdapterRef(name="shared"), inference_pb2.AdapterRef(name=name, weight=2)],
    )
    start = adapters_pb2.UploadStart(name=name, digest="0" * 64, config=b"{}", size=5)
    calls = [
        partial(adapters.GetAdapter, adapters_pb2.GetAdapterRequest(name=name)),
        partial(adapters.LoadAdapter, adapters_pb2.LoadAdapterRequest(name=name, path=folder)),
        partial(adapters.UnloadAdapter, adapters_pb2.UnloadAdapterRequest(name=name)),
        partial(adapters.RollbackAdapter, adapters_pb2.RollbackAdapterRequest(name=name)),
        partial(adapters.RollbackAdapter, adapters_pb2.RollbackAdapterRequest(name=name, revision=revision)),
        *(
            partial(
                adapters.SetTrafficSplit,
                adapters_pb2.SetTrafficSplitRequest(name=name, revision=revision, percent=percent),
            )
            for percent in (0, 50, -1)
        ),
        lambda metadata: next(
            adapters.UploadAdapter(iter([adapters_pb2.UploadAdapterRequest(start=start)]), metadata=metadata)
        ),
    ]
    for refs in named:
        request = inference_pb2.GenerateRequest(text="x", adapters=refs, max_tokens=1)
        pin = prompts_pb2.PinPromptRequest(name="p", token_ids={"ids": [5] * 64}, adapters=refs)
        calls += [
            partial(inference.Generate, request),
            lambda metadata, request=request: next(inference.GenerateStream(request, metadata=metadata)),
            partial(prompts.PinPrompt, pin),
        ]
    found = [answer_of(partial(call, metadata=EVIL)) for call in calls]
    return [Answer(each.code, each.reason, each.message.replace(name, "NAME")) for each in found]


def test_a_foreign_name_is_answered_like_one_that_is_not_there(channel, place, good):
    revision = good.get_adapter(FOREIGN).revision
    folder = str(place.folder / "own")
    foreign, absent = (answers(channel, name, folder, revision) for name in (FOREIGN, ABSENT))
    assert foreign == absent
    assert {(each.code, each.reason, each.message) for each in foreign} == {
        (
            grpc.StatusCode.NOT_FOUND,
            "ADAPTER_NOT_FOUND",
            "no adapter is loaded under the name 'NAME'; load it, or list those that are",
        )
    }


def test_lists_and_watches_do_not_tell_of_it(channel, evil, good, place):
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
    for token in ("", "good", "good-lor", "good-loqz", "\0", "é" * 1000):
        listed = adapters.ListAdapters(
            adapters_pb2.ListAdaptersRequest(page_size=1, page_token=token), metadata=EVIL
        )
        names = {adapter.name for adapter in listed.adapters} | {listed.next_page_token}
        assert not any(name.startswith("good") for name in names)
    watch = adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=EVIL)
    assert {next(watch).adapter.name for _ in range(2)} == {"broken", "shared"}
    good.load_adapter("good-other", str(place.secret))
    good.unload_adapter("good-other")
    evil.load_adapter("evil-own", str(place.folder / "own"))
    assert next(watch).adapter.name == "evil-own"
    watch.cancel()
    evil.unload_adapter("evil-own")


def test_a_foreign_revision_cannot_be_had_under_a_name_of_ones_own(evil, good, channel, place):
    revision = good.get_adapter(FOREIGN).revision
    evil.load_adapter("evil-own", str(place.folder / "own"))
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
    ref = inference_pb2.AdapterRef(name=f"evil-own@{revision}")
    split = adapters_pb2.SetTrafficSplitRequest(name="evil-own", revision=revision, percent=50)
    back = adapters_pb2.RollbackAdapterRequest(name="evil-own", revision=revision)
    for call in (
        partial(inference.Generate, inference_pb2.GenerateRequest(text="x", adapters=[ref])),
        partial(adapters.SetTrafficSplit, split),
        partial(adapters.RollbackAdapter, back),
    ):
        answer = answer_of(partial(call, metadata=EVIL))
        assert answer.code is grpc.StatusCode.NOT_FOUND
        # As for a revision that nobody has.
        assert answer.reason == "REVISION_NOT_FOUND"
    evil.unload_adapter("evil-own")


@pytest.mark.parametrize("pinned", ["rules", "none"])
def test_pinned_prompts_of_others_cannot_be_unpinned(channel, good, pinned):
    good.pin_prompt("rules", [7] * 64)
    prompts = PromptServiceStub(channel)
    listed = prompts.ListPinnedPrompts(prompts_pb2.ListPinnedPromptsRequest(), metadata=EVIL)
    assert not listed.prompts
    answer = answer_of(
        partial(prompts.UnpinPrompt, prompts_pb2.UnpinPromptRequest(name=pinned), metadata=EVIL)
    )
    assert (answer.code, answer.reason) == (grpc.StatusCode.NOT_FOUND, "PROMPT_NOT_FOUND")
    good.unpin_prompt("rules")


def test_the_error_of_a_failed_adapter_is_shown_only_to_tenants_that_may_load_it(channel, place):
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    root = str(place.secret.parent.parent)
    get = partial(adapters.GetAdapter, adapters_pb2.GetAdapterRequest(name="broken"))
    operator = (("authorization", "Bearer operator"),)
    assert root in get(metadata=operator).adapter.error
    watch = adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=EVIL)
    listed = adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(), metadata=EVIL).adapters
    seen = [get(metadata=EVIL).adapter, next(watch).adapter, *(one for one in listed if one.name == "broken")]
    watch.cancel()
    assert [adapter.error for adapter in seen] == 3 * [
        "it could not be loaded; ask the server's operator why"
    ]
    request = inference_pb2.GenerateRequest(text="x", adapters=[inference_pb2.AdapterRef(name="broken")])
    generate = partial(inference.Generate, request)
    assert root in answer_of(partial(generate, metadata=operator)).message
    assert answer_of(partial(generate, metadata=EVIL)).message == "adapter 'broken' could not be loaded"
