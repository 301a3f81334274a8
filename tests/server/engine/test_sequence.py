from __future__ import annotations

import pytest

from support.fake_device import make_run, make_spec
from turret_server.engine.prefix_cache import block_keys
from turret_server.engine.sequence import Sequence
from turret_server.engine.step import VIRTUAL_TOKEN

PREFIX = make_spec("prefix", num_virtual=3)


def sequence(prompt, adapter=None):
    return Sequence.of(make_run(prompt, adapter).request)


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


def test_a_step_names_the_adapter():
    assert sequence([1], PREFIX).step(1).revision == "prefix"
    assert sequence([1]).step(1).revision is None


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
