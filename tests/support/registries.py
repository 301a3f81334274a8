"""Adapters without files, and a registry that is watched."""

from __future__ import annotations

from dataclasses import replace

import torch

from support.fake_device import make_spec
from turret_adapters.host import HostAdapter
from turret_adapters.registry import AdapterRegistry, Lease, Named
from turret_adapters.spec import TASK_MARK


def host(revision: str) -> HostAdapter:
    spec = make_spec(revision, slab_pages=1)
    return HostAdapter(spec=spec, deltas={})


def multitask(revision: str, num_tasks: int) -> HostAdapter:
    tasks = tuple(
        HostAdapter(spec=make_spec(f"{revision}#{task}", num_virtual=2), deltas={})
        for task in range(num_tasks)
    )
    spec = replace(make_spec(revision, num_virtual=2), num_tasks=num_tasks)
    return HostAdapter(spec=spec, deltas={}, tasks=tasks)


def prefix(revision: str, tokens: int) -> HostAdapter:
    kv = torch.full((tokens, 1, 2, 1, 1), float(revision))
    return HostAdapter(spec=make_spec(revision, num_virtual=tokens), deltas={}, prefix_kv=kv)


def acquire(registry: AdapterRegistry, name: str) -> Lease:
    return registry.acquire([Named(name)])


class Watched(AdapterRegistry):
    """A registry that remembers what is gone, and sees that it is gone by then and nothing comes between."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[str] = []
        self.on_gone = self._note

    def _note(self, revision: str) -> None:
        assert self._lock.locked()
        assert revision not in self._joined
        assert revision.partition(TASK_MARK)[0] not in self._specs
        self.gone.append(revision)
