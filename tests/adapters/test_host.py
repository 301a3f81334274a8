from __future__ import annotations

from dataclasses import replace

import torch

from support.fake_device import make_spec
from turret_adapters.host import HostAdapter, ModuleDelta, join_prefixes, joined_spec, row_groups
from turret_adapters.spec import Method, Part, PrefixKind, RowGroup


def prompt(revision: str, rows_NE: torch.Tensor) -> HostAdapter:
    spec = make_spec(revision, num_virtual=len(rows_NE), kind=PrefixKind.EMBEDDING)
    return HostAdapter(spec=spec, deltas={}, prompt_embeddings=rows_NE)


def test_prompts_of_embeddings_stand_in_their_order():
    first, second = prompt("1", torch.randn(3, 4)), prompt("2", torch.randn(2, 4))
    joined = join_prefixes([second, first])
    assert joined.spec.prefix == make_spec("", num_virtual=5, kind=PrefixKind.EMBEDDING).prefix
    assert torch.equal(
        joined.prompt_embeddings, torch.cat([second.prompt_embeddings, first.prompt_embeddings])
    )
    assert joined.prefix_kv is None
    assert joined.spec.revision != join_prefixes([first, second]).spec.revision


def test_prefixes_of_both_kinds_have_rows_for_every_virtual_token():
    first, last = prompt("1", torch.randn(3, 4)), prompt("3", torch.randn(1, 4))
    keys_values = torch.randn(2, 5, 2, 1, 6)
    middle = HostAdapter(spec=make_spec("2", num_virtual=2), deltas={}, prefix_kv=keys_values)
    joined = join_prefixes([first, middle, last])
    assert joined.spec.prefix.embedded == (range(3), range(5, 6))
    assert (joined.spec.num_virtual_tokens, joined.spec.method) == (6, Method.PROMPT_TUNING)
    assert torch.equal(joined.prefix_kv[3:5], keys_values)
    assert torch.equal(joined.prompt_embeddings[:3], first.prompt_embeddings)
    assert torch.equal(joined.prompt_embeddings[5:], last.prompt_embeddings)
    assert (len(joined.prefix_kv), len(joined.prompt_embeddings)) == (6, 6)
    assert join_prefixes([middle, first]).spec.prefix.embedded == (range(2, 5),)


def test_a_joined_prefix_counts_all_its_parts_and_is_named_after_them_in_order():
    specs = [
        replace(make_spec(revision, num_virtual=tokens), num_parameters=size, file_bytes=10 * size)
        for revision, tokens, size in (("1", 3, 5), ("2", 2, 7), ("3", 1, 11))
    ]
    joined = joined_spec(specs)
    assert (joined.num_virtual_tokens, joined.num_parameters, joined.file_bytes) == (6, 23, 230)
    assert (joined.method, joined.rows, joined.max_rank) == (Method.PREFIX_TUNING, (), 0)
    orders = [specs, specs[::-1], specs[:2], specs[1:], [specs[0], specs[2], specs[1]]]
    assert len({joined_spec(order).revision for order in orders}) == len(orders)
    prompts = [make_spec("4", num_virtual=1, kind=PrefixKind.EMBEDDING)] * 2
    assert joined_spec(prompts).method is Method.PROMPT_TUNING


def test_equal_rows_of_two_adapters_are_one_object():
    deltas = [
        {"m": ModuleDelta(rows={Part.LORA_A: torch.zeros(2, 4), Part.LORA_B: torch.zeros(2, 3)})}
        for _ in range(2)
    ]
    first, second = map(row_groups, deltas)
    assert first == (RowGroup("m", Part.LORA_A, 2, 4), RowGroup("m", Part.LORA_B, 2, 3))
    assert first is second
    assert row_groups({"n": deltas[0]["m"]}) != first


def test_every_tensor_of_an_adapter_and_its_tasks_is_page_locked_and_nothing_else_changes(monkeypatch):
    """Page-locked memory needs a GPU; here a copy with one more in each element stands for it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    delta = ModuleDelta(
        rows={Part.LORA_A: torch.zeros(1, 2), Part.TOKENS: torch.zeros(2, 2)}, scaling=2.5, token_ids=(3, 5)
    )
    task = prompt("1#0", torch.zeros(2, 3))
    adapter = HostAdapter(
        spec=make_spec("1"), deltas={"m": delta, "n": delta}, prefix_kv=torch.zeros(1, 2), tasks=(task,)
    )
    locked = adapter.page_locked()
    assert (locked.spec, locked.deltas.keys()) == (adapter.spec, {"m", "n"})
    for each in locked.deltas.values():
        assert {part: rows_NX.mean() for part, rows_NX in each.rows.items()} == {
            Part.LORA_A: 1,
            Part.TOKENS: 1,
        }
        assert (each.scaling, each.token_ids) == (2.5, (3, 5))
    assert locked.prefix_kv.mean() == locked.tasks[0].prompt_embeddings.mean() == 1
    assert (locked.prompt_embeddings, locked.tasks[0].prefix_kv) == (None, None)
    assert locked.tasks[0].spec == task.spec
    assert adapter.prefix_kv.mean() == 0, "requests that copy from it go on"
