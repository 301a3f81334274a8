"""The real lifecycle on a real store, registry and engine; only the device computes with hashes."""

from __future__ import annotations

import itertools
import json
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.adapter_files import digest
from support.fake_device import PAGE_ELEMENTS, FakeDevice
from support.prompts import until
from support.tokenizers import make_tokenizer
from turret_adapters.formats.tokenizer import BaseTokenizer
from turret_adapters.host_memory import HostMemory
from turret_adapters.library import AdapterLibrary
from turret_adapters.registry import AdapterRegistry, Named
from turret_adapters.sources.policy import Policy
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape
from turret_adapters.store.names import Names
from turret_adapters.store.store import AdapterStore
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine
from turret_server.engine.request import AdapterUse, Output, Request, SamplingParams
from turret_server.engine.scheduler import Limits
from turret_server.lifecycle import cleanup
from turret_server.lifecycle.adapter_info import AdapterDescriber
from turret_server.lifecycle.administration import AdapterAdministration
from turret_server.lifecycle.cleanup import CleanupWorker
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.revisions import Revisions
from turret_server.lifecycle.watches import AdapterWatches

WIDTH, RANK = 8, 2
MODULE = "model.layers.0.self_attn.q_proj"
BASE = BaseSpec(
    name_or_path="tiny",
    hidden_size=WIDTH,
    num_layers=1,
    num_kv_heads=1,
    head_dim=WIDTH,
    modules={MODULE: ModuleShape(kind=ModuleKind.LINEAR, in_features=WIDTH, out_features=WIDTH)},
    tied=False,
)
NUM_PAGES, BLOCK_SIZE, PAGE_BYTES = 256, 4, 32
_request_ids = itertools.count(1)


class NoWeights:
    def weight(self, module: str) -> torch.Tensor:
        raise AssertionError(module)

    bias = weight


class Site:
    """A lifecycle with everything that it changes. Sources lie below `folder`."""

    def __init__(self, folder: Path, pinned: tuple[str, ...] = (), host_bytes: int | None = None) -> None:
        self.folder = folder
        self.root = folder / "store"
        self.store = AdapterStore(self.root)
        self.names = Names(self.root / "names.sqlite", "tiny")
        self.library = AdapterLibrary(
            store=self.store,
            names=self.names,
            policy=Policy(roots=(folder,)),
            base=BASE,
            weights=NoWeights(),
            tokenizer=BaseTokenizer(make_tokenizer(), None),
        )
        self.registry = AdapterRegistry(HostMemory(host_bytes, self.library.read))
        device = FakeDevice(NUM_PAGES, BLOCK_SIZE, immediate=True)
        self.engine = Engine(
            runner=device,
            memory=device,
            num_pages=NUM_PAGES,
            page_elements=PAGE_ELEMENTS,
            block_size=BLOCK_SIZE,
            limits=Limits(max_batch_tokens=32, max_batch_requests=8, max_step_seconds=1.0),
            tenants=lambda _: TenantLimits(),
            on_stats=lambda _: None,
        )
        self.cleanup = CleanupWorker()
        self.revisions = Revisions(
            engine=self.engine, registry=self.registry, library=self.library, cleanup=self.cleanup
        )
        self.lifecycle = AdapterLifecycle(
            engine=self.engine,
            registry=self.registry,
            library=self.library,
            revisions=self.revisions,
            cleanup=self.cleanup,
            pinned=pinned,
        )
        describer = AdapterDescriber(self.engine, PAGE_BYTES)
        self.watches = AdapterWatches(self.registry, describer)
        self.administration = AdapterAdministration(
            registry=self.registry,
            library=self.library,
            lifecycle=self.lifecycle,
            describer=describer,
            watches=self.watches,
        )
        self.engine.start()

    def close(self) -> None:
        self.engine.stop()
        self.cleanup.close()
        self.library.close()
        self.store.close()

    def source(self, seed: int) -> str:
        """The folder of an adapter that no other seed has."""
        folder = self.folder / f"source-{seed}"
        if not folder.exists():
            folder.mkdir()
            config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
            (folder / "adapter_config.json").write_text(json.dumps(config))
            pattern = torch.full((RANK, WIDTH), float(seed))
            key = f"base_model.model.{MODULE}"
            save_file(
                {f"{key}.lora_A.weight": pattern, f"{key}.lora_B.weight": pattern.t().contiguous()},
                folder / "adapter_model.safetensors",
            )
        return str(folder)

    def size(self, seed: int) -> int:
        """Bytes of the same adapter."""
        return sum(file.stat().st_size for file in Path(self.source(seed)).iterdir())

    def load(self, name: str, seed: int) -> str:
        """Load an adapter, and return its revision."""
        self.lifecycle.load(name, self.source(seed))
        return self.served(name)

    def upload(self, name: str, seed: int) -> str:
        """Upload the same adapter, and return its revision."""
        folder = Path(self.source(seed))
        tensors = (folder / "adapter_model.safetensors").read_bytes()
        config = (folder / "adapter_config.json").read_bytes()
        with self.store.receive(digest(tensors, config), config, len(tensors), "") as upload:
            upload.write(0, tensors)
            self.lifecycle.load_upload(name, upload)
        return self.served(name)

    def served(self, name: str) -> str:
        """The revision that new requests get; empty where there is none."""
        found = {each.name: each.spec for each in self.registry.statuses() if not each.unloaded}
        spec = found.get(name)
        return spec.revision if spec else ""

    def written(self, name: str) -> list[str]:
        """The history that the next start would find, newest first."""
        return [each.revision for each in self.names.histories([name])[name]]

    def generate(self, name: str, max_tokens: int) -> Iterator[int]:
        """Tokens of a request that runs on an adapter; the lease is released when it ends."""
        lease = self.registry.acquire([Named(name)])
        outputs: list[Output] = []
        arrived = threading.Condition()

        def sink(output: Output) -> None:
            with arrived:
                outputs.append(output)
                arrived.notify()

        request_id = next(_request_ids)
        self.engine.submit(
            Request(
                request_id=request_id,
                prompt_token_ids=(1, 2, 3),
                adapters=tuple(AdapterUse(spec, weight) for spec, weight in lease.uses),
                sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0),
                stop_token_ids=frozenset(),
                deadline=None,
                sink=sink,
            )
        )
        try:
            for number in itertools.count():
                with arrived:
                    arrived.wait_for(lambda number=number: len(outputs) > number)
                output = outputs[number]
                assert output.token_id is not None, output
                yield output.token_id
                if output.finish_reason:
                    return
        finally:
            self.engine.cancel(request_id)
            self.registry.release(lease)

    def holds(self) -> set[str]:
        """The revisions whose files are held in the store."""
        return {revision for revision in self.store.revisions() if self.is_held(revision)}

    def is_held(self, revision: str) -> bool:
        return bool(self.store._held[revision])

    def refuse_to_write(self, what: str) -> None:
        """Make the database refuse changes of a kind, such as "INSERT ON published"."""
        with closing(sqlite3.connect(self.root / "names.sqlite")) as database:
            database.execute(
                f"CREATE TRIGGER refused BEFORE {what} BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )

    def write_again(self) -> None:
        with closing(sqlite3.connect(self.root / "names.sqlite")) as database:
            database.execute("DROP TRIGGER refused")

    @contextmanager
    def store_locked(self) -> Iterator[None]:
        """The store's lock is held by something else within the block."""
        with self.store._lock:
            yield

    @contextmanager
    def database_locked(self) -> Iterator[None]:
        """SQLite's write lock is held elsewhere within the block."""
        with closing(sqlite3.connect(self.root / "names.sqlite", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            yield

    def settle(self) -> None:
        """Wait until the clean-up has done what was asked for, retries included."""

        def is_idle() -> bool:
            # Asked on the worker's thread, where no other job runs meanwhile.
            left: queue.Queue[int] = queue.Queue()
            self.cleanup.submit("the end of the queue", lambda: left.put(len(self.cleanup._jobs)))
            return left.get(timeout=60) == 0

        until(is_idle)
        self.engine.check_integrity()


@pytest.fixture(autouse=True)
def retries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(cleanup, "MAX_RETRY_SECONDS", 0.05)


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Opens the site; after closing it, the next one is as after a restart."""
    opened: list[Site] = []

    def open_site(**options: Any) -> Site:
        if opened:
            opened.pop().close()
        opened.append(Site(tmp_path, **options))
        return opened[-1]

    yield open_site
    for site in opened:
        site.close()


@pytest.fixture
def site(open_site: Callable[..., Site]) -> Site:
    return open_site()
