"""From each kind of source the same bytes come into the store, or a reason why not and nothing."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import socket
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import psutil
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from support.adapter_files import CONFIG, fetch_into, files, read_folder, revision, write_folder
from support.web import LOOPBACK, Handler, Web
from turret_adapters.errors import (
    AdapterSourceError,
    SourceForbiddenError,
    SourceTooLargeError,
    SourceUnavailableError,
)
from turret_adapters.formats.files import TOKENIZER_FILES
from turret_adapters.sources import intake
from turret_adapters.sources.fetch import fetch
from turret_adapters.sources.filesystems import hub_url
from turret_adapters.sources.policy import Policy
from turret_adapters.store.store import AdapterStore

COMMIT = "c" * 40


def zipped(tensors: bytes = b"tensors") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("poet/adapter_config.json", CONFIG)
        archive.writestr("poet/adapter_model.safetensors", tensors)
    return data.getvalue()


def test_reading_a_folder_has_a_time_limit(store: AdapterStore, tmp_path: Path) -> None:
    write_folder(tmp_path / "poet", b"tensors")
    with pytest.raises(SourceUnavailableError, match="expected the adapter within 0 s"):
        fetch_into(store, str(tmp_path / "poet"), Policy(roots=(tmp_path,), timeout=0.0))
    assert store.revisions() == {}


def test_a_folder_of_this_machine(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "root" / "poet")
    policy = Policy(roots=(tmp_path / "root",))
    assert fetch_into(store, str(folder), policy) == revision()
    assert read_folder(store.path(revision())) == files()
    for refused in (tmp_path, "/etc", f"{folder}/../../store"):
        with pytest.raises(SourceForbiddenError, match="below"):
            fetch_into(store, str(refused), policy)
    with pytest.raises(SourceTooLargeError):
        fetch_into(store, str(folder), Policy(roots=(tmp_path,), max_bytes=26))


def test_a_folder_on_the_web(web: Web, policy: Policy, store: AdapterStore) -> None:
    seen: list[tuple[int, int | None]] = []
    assert (
        fetch_into(store, f"{web.url}/poet/?token=1", policy, lambda *told: seen.append(told)) == revision()
    )
    assert read_folder(store.path(revision())) == files()
    names = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES)
    assert web.asked == [f"/poet/{name}?token=1" for name in names]
    assert seen == [(len(CONFIG), len(CONFIG)), (len(CONFIG) + 7, len(CONFIG) + 7)]


SOURCES = ("folder", "web", "archive", "file system")


@pytest.mark.parametrize("kind", SOURCES)
def test_a_tokenizer_comes_from_any_source(kind: str, web: Web, store: AdapterStore, tmp_path: Path) -> None:
    """The template is where it may be missing, and another folder's tokenizer is none of the adapter's."""
    pages = {
        "poet/adapter_config.json": CONFIG,
        "poet/adapter_model.safetensors": b"tensors",
        "poet/tokenizer.json": b"tokens",
        "poet/chat_template.jinja": b"template",
        "tokenizer_config.json": b"another's",
    }
    found = fetched_from(kind, pages, web, store, tmp_path)
    assert found == {name.removeprefix("poet/"): data for name, data in pages.items() if "poet/" in name}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("task", "taken"), [("SEQ_CLS", True), ("TOKEN_CLS", True), ("CAUSAL_LM", False), ("QUESTION_ANS", False)]
)
def test_the_labels_of_a_head_come_from_any_source_and_without_a_head_the_file_stays_there(
    *, kind: str, task: str, taken: bool, web: Web, store: AdapterStore, tmp_path: Path
) -> None:
    pages = {
        "poet/adapter_config.json": json.dumps({"task_type": task}).encode(),
        "poet/adapter_model.safetensors": b"tensors",
        "poet/config.json": b"labels",
        "config.json": b"another's",
    }
    found = fetched_from(kind, pages, web, store, tmp_path)
    assert found.pop("config.json", None) == (b"labels" if taken else None)
    assert found.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert ("/poet/config.json" in web.asked) == (taken and kind == "web")


def fetched_from(
    kind: str, pages: dict[str, bytes], web: Web, store: AdapterStore, tmp_path: Path
) -> dict[str, bytes]:
    """The files that are fetched of the adapter in the folder `poet`."""
    source, policy = f"{web.url}/poet", Policy(urls=(web.url,), networks=LOOPBACK)
    if kind == "folder":
        source, policy = str(tmp_path / "poet"), Policy(roots=(tmp_path,))
        (tmp_path / "poet").mkdir()
        for name, data in pages.items():
            (tmp_path / name).write_bytes(data)
    elif kind == "web":
        web.pages |= {f"/{name}": data for name, data in pages.items()}
    elif kind == "archive":
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for name, content in pages.items():
                archive.writestr(name, content)
        web.pages["/poet.zip"] = data.getvalue()
        source = f"{web.url}/poet.zip"
    else:
        # All tests share the memory.
        root = tmp_path.name
        source, policy = f"memory://{root}/poet", Policy(urls=(f"memory://{root}",))
        memory = fsspec.filesystem("memory")
        for name, content in pages.items():
            memory.pipe(f"/{root}/{name}", content)
    with store.staging() as staged:
        fetch(source, staged, policy)
        return {path.name: path.read_bytes() for path in staged.iterdir()}


def test_an_archive_on_the_web(web: Web, policy: Policy, store: AdapterStore) -> None:
    web.pages["/poet.zip"] = zipped()
    assert fetch_into(store, f"{web.url}/poet.zip?token=1", policy) == revision()
    assert read_folder(store.path(revision())) == files()


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("place", ["poet", "poet.zip"])
def test_more_than_is_taken(
    *, announced: bool, place: str, web: Web, policy: Policy, store: AdapterStore
) -> None:
    def large(it: Handler) -> None:
        it.close_connection = True
        it.send_response(200)
        if announced:
            it.send_header("Content-Length", str(1 << 40))
        it.end_headers()
        with contextlib.suppress(OSError):  # until we hang up
            for _ in range(1000):
                it.wfile.write(bytes(65536))

    web.pages["/poet/adapter_model.safetensors"] = web.pages["/poet.zip"] = large
    few = Policy(urls=policy.urls, networks=LOOPBACK, max_bytes=1 << 20)
    with pytest.raises(SourceTooLargeError):
        fetch_into(store, f"{web.url}/{place}", few)


def test_an_aborted_fetch_leaves_nothing(web: Web, policy: Policy, store: AdapterStore) -> None:
    def give_up(_done: int, _total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_into(store, f"{web.url}/poet", policy, give_up)
    assert store.revisions() == {}


def test_any_file_system_that_fsspec_has(store: AdapterStore) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe(
        {"/bucket/poet/adapter_config.json": CONFIG, "/bucket/poet/adapter_model.safetensors": b"tensors"}
    )
    policy = Policy(urls=("memory://bucket",))
    assert fetch_into(store, "memory://bucket/poet", policy) == revision()
    assert read_folder(store.path(revision())) == files()
    with pytest.raises(SourceTooLargeError):
        fetch_into(store, "memory://bucket/poet", Policy(urls=policy.urls, max_bytes=26))
    with pytest.raises(AdapterSourceError, match="absent"):
        fetch_into(store, "memory://bucket/absent", policy)
    with pytest.raises(SourceUnavailableError):
        fetch_into(store, "memory://bucket/poet", Policy(urls=policy.urls, timeout=0.0))


def test_the_parent_of_adapters_says_which_folder_to_load(store: AdapterStore) -> None:
    config = {f"/parent/checkpoint-{step}/adapter_config.json": CONFIG for step in (500, 1000)}
    fsspec.filesystem("memory").pipe(config | {"/parent/runs/events": b"", "/parent/README.md": b""})
    with pytest.raises(AdapterSourceError) as error:
        fetch_into(store, "memory://parent/", Policy(urls=("memory://parent",)))
    said = "one in 'checkpoint-500', 'checkpoint-1000' (load 'memory://parent/checkpoint-1000', for example)"
    assert str(error.value).endswith(f"found: {said}")


@pytest.mark.parametrize(
    ("url", "found"),
    [("smb://host/a", "smbprotocol"), ("nonsense://host/a", "fsspec knows, found 'nonsense'")],
)
def test_a_protocol_without_package_says_which(url: str, found: str, store: AdapterStore) -> None:
    with pytest.raises(AdapterSourceError, match=found):
        fetch_into(store, url, Policy(urls=("smb://host", "nonsense://host")))


def test_a_file_system_that_does_not_answer(store: AdapterStore) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"ftp://127.0.0.1:{unused.getsockname()[1]}/poet"
        with pytest.raises(SourceUnavailableError, match="try again later"):
            fetch_into(store, url, Policy(urls=(url,)))


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("owner/name", "hf://owner/name"),
        ("owner/name@v1.0", "hf://owner/name@v1.0"),
        ("hf://owner/name@refs/pr/1", "hf://owner/name@refs/pr/1"),
        ("./name", None),
        ("../name", None),
        ("/owner/name", None),
        ("a/b/c", None),
        ("name", None),
        ("https://owner/name", None),
    ],
)
def test_what_a_hub_id_is(source: str, url: str | None) -> None:
    assert hub_url(source) == url


@pytest.fixture
def hub(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """As much of the Hugging Face hub as a download asks for."""
    model = json.dumps({"id": "owner/poet", "sha": COMMIT, "siblings": []}).encode()

    tree = json.dumps(
        [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in files().items()
        ]
    ).encode()

    for revision_path in ("", "/revision/v1", f"/revision/{COMMIT}"):
        web.pages[f"/api/models/owner/poet{revision_path}"] = lambda it: it.answer(
            200, model, Content_Type="application/json"
        )
    web.pages[f"/api/models/owner/poet/tree/{COMMIT}"] = lambda it: it.answer(
        200, tree, Content_Type="application/json"
    )
    for name, content in files().items():
        web.pages[f"/owner/poet/resolve/{COMMIT}/{name}"] = content
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", web.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"{web.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    return web


@pytest.mark.parametrize("source", ["owner/poet", "owner/poet@v1", f"hf://owner/poet@{COMMIT}"])
def test_a_model_of_the_hub_is_of_one_commit(source: str, hub: Web, store: AdapterStore) -> None:
    assert fetch_into(store, source, Policy(urls=("hf://owner/poet",))) == revision()
    assert read_folder(store.path(revision())) == files()
    resolved = [path for path in hub.asked if "/resolve/" in path]
    assert {path.split("/")[4] for path in resolved} == {COMMIT}


def test_a_model_that_the_hub_does_not_have(hub: Web, store: AdapterStore) -> None:
    hub.pages["/api/models/owner/absent"] = lambda it: it.answer(404, X_Error_Code="RepoNotFound")
    with pytest.raises(AdapterSourceError, match="hf://owner/absent"):
        fetch_into(store, "owner/absent", Policy(urls=("hf://",)))
    with pytest.raises(SourceForbiddenError):
        fetch_into(store, "other/poet", Policy(urls=("hf://owner",)))


def test_a_model_of_checkpoints_says_which_one_to_load(hub: Web, store: AdapterStore) -> None:
    tree = f"/api/models/owner/poet/tree/{COMMIT}"
    folder = {"type": "directory", "path": "checkpoint-500", "oid": "0" * 40}
    file = {"type": "file", "path": "checkpoint-500/adapter_config.json", "size": 2, "oid": "0" * 40}
    for path, entry in ((tree, folder), (f"{tree}/checkpoint-500", file)):
        answer = json.dumps([entry]).encode()
        hub.pages[path] = lambda it, answer=answer: it.answer(200, answer, Content_Type="application/json")
    said = r"found: one in 'checkpoint-500' \(download the model, and load or upload 'checkpoint-500'"
    with pytest.raises(AdapterSourceError, match=said):
        fetch_into(store, "owner/poet", Policy(urls=("hf://",)))


def test_a_hub_that_fails(hub: Web, store: AdapterStore) -> None:
    hub.pages["/api/models/owner/poet"] = lambda it: it.answer(500)
    with pytest.raises(SourceUnavailableError, match="try again later"):
        fetch_into(store, "owner/poet", Policy(urls=("hf://",)))
    assert "/api/models/owner/poet" in hub.asked


def test_a_fetch_leaves_no_file_and_no_connection_open(web: Web, policy: Policy, store: AdapterStore) -> None:
    web.pages["/poet.zip"] = zipped()
    web.pages["/moved/adapter_config.json"] = lambda it: it.answer(302, Location="/poet/adapter_config.json")
    web.pages["/moved/adapter_model.safetensors"] = lambda it: it.answer(503)
    for source in ("poet", "poet.zip", "moved", "absent"):
        with contextlib.suppress(AdapterSourceError, SourceUnavailableError):
            fetch_into(store, f"{web.url}/{source}", policy)
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        opened = [target for target in map(os.readlink, links) if target.startswith(str(store.root))]
        assert opened == [str(store.root / "lock")]
        ours = [
            each
            for each in psutil.Process().net_connections("tcp")
            if each.raddr and each.raddr.port == web.server_port
        ]
        assert [each.status for each in ours if each.status == psutil.CONN_ESTABLISHED] == []


@pytest.mark.parametrize("kind", ["folder", "web", "memory", "poet.zip", "poet.tar.gz"])
def test_an_adapter_exactly_as_large_as_allowed_is_fetched(
    kind: str, web: Web, store: AdapterStore, tmp_path: Path
) -> None:
    size = len(CONFIG) + 7
    fsspec.filesystem("memory").pipe(
        {"/exact/adapter_config.json": CONFIG, "/exact/adapter_model.safetensors": b"tensors"}
    )
    folder = write_folder(tmp_path / "poet")
    if kind == "poet.zip":
        web.pages["/poet.zip"] = zipped()
        size = len(zipped())
    elif kind == "poet.tar.gz":
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as archive:
            archive.add(folder, "poet")
        web.pages["/poet.tar.gz"] = data.getvalue()
        # What is decompressed counts: a tar has headers, and ends in zeros.
        size = len(gzip.decompress(data.getvalue()))
    source = {"folder": str(folder), "web": f"{web.url}/poet", "memory": "memory://exact"}.get(
        kind, f"{web.url}/{kind}"
    )
    allowed = Policy(roots=(tmp_path,), urls=(web.url, "memory://exact"), networks=LOOPBACK, max_bytes=size)
    assert fetch_into(store, source, allowed) == revision()
    with pytest.raises(SourceTooLargeError):
        fetch_into(store, source, replace(allowed, max_bytes=size - 1))


def test_a_folder_whose_file_system_shares_blocks_is_counted_and_reported_like_any(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file systems of tests cannot, so a copy stands for it."""

    def share(target: int, _request: int, source: int) -> None:
        os.write(target, os.pread(source, 1000, 0))

    monkeypatch.setattr(intake.fcntl, "ioctl", share)
    folder = write_folder(tmp_path / "poet")
    seen: list[tuple[int, int | None]] = []
    policy = Policy(roots=(tmp_path,), max_bytes=len(CONFIG) + 7)
    assert fetch_into(store, str(folder), policy, lambda *told: seen.append(told)) == revision()
    assert seen == [(len(CONFIG), len(CONFIG)), (len(CONFIG) + 7, len(CONFIG) + 7)]
    with pytest.raises(SourceTooLargeError):
        fetch_into(store, str(folder), replace(policy, max_bytes=len(CONFIG) + 6))


class Listed(MemoryFileSystem):
    """A file system that lists a folder once, as those of object stores do."""

    protocol = "listed"
    cachable = True
    made: ClassVar[list[Listed]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.made.append(self)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("listed://"))
        return stripped


def test_listings_of_an_earlier_fetch_are_not_used(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("listed", Listed, clobber=True)
    monkeypatch.setattr(Listed, "made", [])
    fsspec.filesystem("memory").pipe(
        {"/listed/adapter_config.json": CONFIG, "/listed/adapter_model.safetensors": b"tensors"}
    )
    for _ in range(2):
        assert fetch_into(store, "listed://listed", Policy(urls=("listed://listed",))) == revision()
    assert len(Listed.made) == 2


class Answer(Exception):  # noqa: N818
    """As the libraries of object stores raise it."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize("method", ["info", "open", "read"])
@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        (Answer(401), AdapterSourceError, "found: Answer$"),
        (Answer(403, "denied"), AdapterSourceError, "found: denied$"),
        (Answer(404, "no\n such  key"), AdapterSourceError, "found: no such key$"),
        (PermissionError("denied"), AdapterSourceError, "found: denied$"),
        (Answer(500, "busy"), SourceUnavailableError, r"found: busy \(try again later\)"),
        (OSError(5, "broken"), SourceUnavailableError, "broken"),
    ],
)
def test_what_libraries_raise_says_whether_a_retry_may_help(
    method: str,
    failure: Exception,
    error: type[Exception],
    said: str,
    store: AdapterStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    fsspec.filesystem("memory").pipe(
        {"/failing/adapter_config.json": CONFIG, "/failing/adapter_model.safetensors": b"tensors"}
    )
    owner = MemoryFile if method == "read" else MemoryFileSystem
    monkeypatch.setattr(owner, method, fail)
    with pytest.raises(error, match=said):
        fetch_into(store, "memory://failing", Policy(urls=("memory://failing",)))
