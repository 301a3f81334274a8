from __future__ import annotations

import pytest

from support.fake_device import block_keys, make_run, make_spec
from turret_server.engine.request import AdapterUse
from turret_server.engine.sequence import NEVER, Sequence
from turret_server.engine.step import VIRTUAL_TOKEN

PREFIX = make_spec("prefix", num_virtual=3)


def sequence(prompt, adapter=None):
    return Sequence.of(make_run(prompt, adapter).job)


def test_the_adapters_virtual_tokens_come_first():
    with_prefix = sequence([5, 6], PREFIX)
    assert with_prefix.tokens == [VIRTUAL_TOKEN] * 3 + [5, 6]
    assert (with_prefix.num_virtual, with_prefix.num_remaining) == (3, 5)
    assert sequence([5, 6]).tokens == [5, 6]


def test_only_tokens_after_the_prompt_are_generated():
    running = sequence([5, 6], PREFIX)
    assert running.num_generated == 0
    running.tokens += [7, 8]
    assert running.num_generated == 2


@pytest.mark.parametrize(("num_tokens", "samples"), [(1, False), (2, False), (3, True)])
def test_a_token_is_sampled_once_nothing_remains(num_tokens, samples):
    running = sequence([1, 2, 3, 4])
    running.num_computed, running.block_table = 1, [9, 8]
    part = running.step(num_tokens)
    assert part.token_ids == (2, 3, 4)[:num_tokens]
    assert (part.start, part.block_table) == (1, (9, 8))
    assert (part.sampling is not None) == samples


def test_a_prompt_that_is_to_be_pinned_is_sampled_from_for_the_sake_of_the_check():
    sequence = Sequence.of(make_run(range(6), pinned=True).job)
    assert sequence.step(5).sampling is None
    assert sequence.step(6).sampling.temperature == 0


def test_a_step_names_the_adapter():
    assert sequence([1], PREFIX).step(1).adapters == (("prefix", 1.0),)
    assert sequence([1]).step(1).adapters == ()


def test_keys_are_those_of_all_tokens_however_they_are_asked_for():
    tokens = list(range(12))
    at_once, piecemeal = sequence(tokens), sequence(tokens)
    expected = list(block_keys(b"", tokens, 4))
    assert at_once.keys(3, 4) == expected
    assert [piecemeal.keys(count, 4) for count in (0, 1, 3, 2)] == [
        expected[:count] for count in (0, 1, 3, 2)
    ]


def test_keys_go_on_with_what_is_generated():
    running = sequence([0, 1, 2])
    assert running.keys(0, 4) == []
    running.tokens += [3, 4, 5, 6, 7]
    assert running.keys(2, 4) == list(block_keys(b"", range(8), 4))


def test_the_same_tokens_under_another_revision_have_other_keys():
    tokens = [1, 2, 3, 4]
    keys = [
        sequence(tokens, adapter).keys(2, 2)
        for adapter in (None, make_spec("a", slab_pages=1), make_spec("b", slab_pages=1), PREFIX)
    ]
    assert len({key for chain in keys for key in chain}) == 8


@pytest.mark.parametrize(
    ("prompt", "active_from"),
    [
        ([1, 7, 8, 2], 1),
        ([7, 8, 3, 7, 8, 4], 3),
        ([7, 7, 8], 1),
        ([8, 7], NEVER),
        ([7], NEVER),
        ([4, 7, 8], 1),
    ],
)
def test_activated_lora_applies_from_the_last_invocation_on(prompt, active_from):
    activated = make_spec("a", slab_pages=1, invocation=(7, 8))
    assert sequence(prompt, activated).active_from == active_from


def test_blocks_before_the_activation_have_the_keys_of_the_base():
    activated = make_spec("a", slab_pages=1, invocation=(9,))
    tokens = [1, 2, 3, 4, 5, 9, 6, 7, 8, 8]
    keys, base = sequence(tokens, activated).keys(5, 2), sequence(tokens).keys(5, 2)
    assert keys[:2] == base[:2]
    assert not set(keys[2:]) & set(base)


def test_never_activated_it_has_the_keys_of_the_base():
    activated = make_spec("a", slab_pages=1, invocation=(9,))
    assert sequence([1, 2, 3, 4], activated).keys(2, 2) == sequence([1, 2, 3, 4]).keys(2, 2)


def test_blocks_with_the_same_tokens_and_another_activation_have_other_keys():
    """The invocation tokens may be generated: then they activate nothing, as part of a prompt they do."""
    activated = make_spec("a", slab_pages=1, invocation=(9,))
    generated, given = sequence([9, 1], activated), sequence([9, 1, 9, 2], activated)
    generated.tokens += [9, 2]
    assert (generated.active_from, given.active_from) == (0, 2)
    assert generated.keys(1, 4) != given.keys(1, 4)


def test_a_salt_that_looks_like_a_revision_finds_nothing_of_it():
    of_adapter = sequence([1, 2], make_spec("a", slab_pages=1))
    salt = of_adapter._salt.decode()
    assert Sequence.of(make_run([1, 2], cache_salt=salt).job).keys(1, 2) != of_adapter.keys(1, 2)


def test_virtual_tokens_set_all_blocks_apart_also_beside_a_lora_that_is_activated_late():
    tokens, late = [1, 2, 9, 3], make_spec("a", slab_pages=1, invocation=(9,))
    first, second = (
        sequence(tokens, [AdapterUse(make_spec(name, num_virtual=2)), AdapterUse(late)])
        for name in ("prefix", "other")
    )
    assert first.active_from == 4
    assert first.keys(1, 2) != second.keys(1, 2)


def test_a_salt_comes_before_the_revision_in_the_chain():
    activated = make_spec("a", slab_pages=1, invocation=(9,))
    tokens = [1, 2, 3, 9]
    plain, salted = (
        Sequence.of(make_run(tokens, activated, cache_salt=salt).job).keys(2, 2) for salt in ("", "x")
    )
    assert not set(plain) & set(salted)


def test_a_weight_and_the_company_of_another_adapter_make_other_keys():
    first, second = make_spec("a", slab_pages=1), make_spec("b", slab_pages=1)
    named = [
        [AdapterUse(first)],
        [AdapterUse(first, 0.5)],
        [AdapterUse(first), AdapterUse(second)],
        [AdapterUse(first), AdapterUse(second, 0.5)],
    ]
    assert len({sequence([1, 2], uses).keys(1, 2)[0] for uses in named}) == 4
