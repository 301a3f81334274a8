"""The arena: one flat buffer for keys and values, prefixes and LoRA rows.

A page holds `block_size` tokens' keys and values of all layers, or LoRA rows, in the compute dtype.
"""

from __future__ import annotations

import mmap

import torch

from turret_adapters.spec import BaseSpec, ModuleKind

_BLOCK_MULTIPLE = 16


def block_size_for(base: BaseSpec) -> int:
    """Tokens of a page: the smallest multiple of 16 with which a page holds the widest row of an adapter."""
    shapes = base.of_kind(ModuleKind.LINEAR, ModuleKind.EXPERT, ModuleKind.ROUTER).values()
    widest = max(max(shape.in_features, shape.out_features) for shape in shapes)
    return -(-widest // (base.kv_width * _BLOCK_MULTIPLE)) * _BLOCK_MULTIPLE


class Arena:
    """`flat` [num_pages · page_elements]; the methods read and write views of it."""

    def __init__(self, base: BaseSpec, num_bytes: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size = block_size_for(base)
        self.page_elements = self.block_size * base.kv_width
        self.num_pages = num_bytes // self.page_bytes_of(dtype)
        self.flat = _zeros(self.num_pages * self.page_elements, dtype, device)
        self._pages = self.flat.view(self.num_pages, self.page_elements)
        self._kv_PL2BKD = self.flat.view(
            self.num_pages, base.num_layers, 2, self.block_size, base.num_kv_heads, base.head_dim
        )

    def page_bytes_of(self, dtype: torch.dtype) -> int:
        return self.page_elements * dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.page_bytes_of(self.flat.dtype)

    def layer(self, index: int) -> torch.Tensor:
        """A view of one layer's keys and values, [pages, 2, block_size, kv_heads, head_dim]."""
        return self._kv_PL2BKD[:, index]

    def copy_page(self, source: int, target: int) -> None:
        self._pages[target].copy_(self._pages[source])

    def write_prefix(self, pages: tuple[int, ...], kv_NL2KD: torch.Tensor) -> None:
        """Writes keys and values of N virtual tokens to the first slots of `pages`, in order."""
        for index, page in enumerate(pages):
            block = kv_NL2KD[index * self.block_size : (index + 1) * self.block_size]
            self._kv_PL2BKD[page, :, :, : len(block)] = block.permute(1, 2, 0, 3, 4)

    def write_rows(self, offset: int, rows_NX: torch.Tensor) -> None:
        """Writes rows one after another from an element offset on; to a GPU, asynchronously."""
        self.flat[offset : offset + rows_NX.numel()].copy_(rows_NX.reshape(-1), non_blocking=True)

    def row(self, offset: int, width: int) -> torch.Tensor:
        """A view of a row."""
        return self.flat[offset : offset + width]


def _zeros(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that a CPU allocates page by page on first write; `torch.zeros` would write them all."""
    if device.type != "cpu" or not num_elements:
        return torch.zeros(num_elements, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A LoRA row is as long as a small page, and a TLB miss takes as long as reading it.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
