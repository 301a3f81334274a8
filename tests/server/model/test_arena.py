from __future__ import annotations

import psutil
import pytest
import torch

from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape
from turret_server.model.arena import Arena, block_size_for

CPU = torch.device("cpu")


def base(widest: int) -> BaseSpec:
    return BaseSpec(
        name_or_path="",
        hidden_size=8,
        num_layers=2,
        num_kv_heads=2,
        head_dim=4,
        modules={"a": ModuleShape(kind=ModuleKind.LINEAR, in_features=8, out_features=widest)},
    )


@pytest.mark.parametrize(("widest", "block_size"), [(8, 16), (512, 16), (513, 32), (1025, 48)])
def test_a_page_holds_the_widest_row(widest, block_size):
    assert block_size_for(base(widest)) == block_size
    assert block_size * base(widest).kv_width >= widest


def test_as_many_whole_pages_as_the_bytes_allow():
    arena = Arena(base(8), 10_000, dtype=torch.bfloat16, device=CPU)
    assert arena.page_bytes == 16 * 2 * 2 * 2 * 4 * 2
    assert arena.num_pages == 10_000 // arena.page_bytes


def test_pages_do_not_overlap_and_a_copy_takes_a_whole_one():
    arena = Arena(base(8), 5 * 1024, dtype=torch.float32, device=CPU)
    for layer in range(2):
        arena.layer(layer)[:] = torch.randn_like(arena.layer(layer))
    before = arena.flat.clone().view(arena.num_pages, -1)
    arena.copy_page(0, 1)
    after = arena.flat.view(arena.num_pages, -1)
    assert torch.equal(after[1], before[0])
    assert torch.equal(after[2:], before[2:])
    for layer in range(2):
        assert torch.equal(arena.layer(layer)[0], arena.layer(layer)[1])


def test_a_prefix_fills_the_first_slots_of_its_pages_in_order():
    arena = Arena(base(8), 8 * 1024, dtype=torch.float32, device=CPU)
    prefix = torch.randn(21, 2, 2, 2, 4)
    pages = (3, 1)
    arena.write_prefix(pages, prefix)
    for position in range(21):
        page, slot = pages[position // 16], position % 16
        for layer in range(2):
            assert torch.equal(arena.layer(layer)[page, :, slot], prefix[position, layer])
    assert not arena.layer(0)[1, :, 5:].any()


def test_rows_are_written_where_they_are_read():
    arena = Arena(base(8), 2048, dtype=torch.float32, device=CPU)
    arena.write_rows(100, torch.arange(8.0).view(2, 4))
    assert torch.equal(arena.row(104, 4), torch.arange(4.0, 8.0))
    assert torch.equal(arena.flat[100:108], torch.arange(8.0))
    assert not arena.flat[:100].any()
    assert not arena.flat[108:].any()


def test_an_arena_on_a_cpu_takes_memory_only_as_it_is_written():
    """Zeros that were written would be resident: 1 GiB of them."""
    process = psutil.Process()
    before = process.memory_info().rss
    arena = Arena(base(8), 1 << 30, dtype=torch.bfloat16, device=CPU)
    assert arena.flat[-1] == 0
    assert process.memory_info().rss - before < 1 << 27


def test_an_arena_may_have_no_pages():
    assert Arena(base(8), 0, dtype=torch.bfloat16, device=CPU).num_pages == 0
