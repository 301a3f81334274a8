"""Fetches an adapter's files from any kind of source into a folder, and counts what is being fetched."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from turret_adapters.errors import SourceTooLargeError
from turret_adapters.formats.files import (
    CONFIG_NAME,
    TENSORS_NAME,
    Progress,
    no_progress,
    refuse_other_tensors,
    write_whole,
)
from turret_adapters.sources.archive import SUFFIXES, unpack
from turret_adapters.sources.filesystems import hub_url, take_from_fsspec
from turret_adapters.sources.http import HttpSource
from turret_adapters.sources.intake import Intake, take_files
from turret_adapters.sources.policy import Deadline, Policy


def fetch(source: str, folder: Path, policy: Policy, progress: Progress = no_progress) -> None:
    """Fetches an adapter's two files, those of its tokenizer, and of a head its labels, if there are any.

    Args:
        source: a folder of this machine (a path that is absolute or begins with a dot), `owner/name` or
            `hf://owner/name@revision` of the Hugging Face hub, `https://` of a folder or of an archive (.zip,
            .tar.gz, .tgz), or a folder's URL of any protocol that fsspec has a package for.
        folder: where to write the files; an empty folder.
        policy: which sources are allowed.
        progress: called with the bytes done and in total, on this thread.

    Raises:
        AdapterSourceError: there is no adapter at the source.
        AdapterFormatError: its tensors are a pickle.
        SourceForbiddenError: the policy does not allow the source.
        SourceTooLargeError: it is larger than the policy allows.
        SourceUnavailableError: it does not answer, or not in time.
        OSError: a file in `folder` is not writable.
    """
    url = hub_url(source) or source
    deadline = Deadline(policy.timeout)
    if "://" not in url:
        real = policy.folder(source)
        refuse_other_tensors(real)
        intake = Intake(folder, policy.max_bytes, _until(deadline, progress))
        for name in (CONFIG_NAME, TENSORS_NAME):
            intake.copy(real, name)
        for name in intake.optional_files:
            if (real / name).exists():
                intake.copy(real, name)
        return
    # The @ of a hub URL begins the revision, which the policy does not look at.
    scheme = policy.url(url.partition("@")[0] if url.startswith("hf://") else url).scheme
    intake = Intake(folder, policy.max_bytes, progress)
    if scheme not in ("http", "https"):
        take_from_fsspec(url, intake, deadline)
    elif urlsplit(url).path.endswith(SUFFIXES):
        _take_archive(url, intake, policy, deadline, progress)
    else:
        _take_folder(url, intake, policy, deadline)


def _until(deadline: Deadline, progress: Progress) -> Progress:
    """Checks the deadline at each report: a folder may lie on a slow network disk."""

    def report(done: int, total: int | None) -> None:
        deadline.left()
        progress(done, total)

    return report


def _take_folder(url: str, intake: Intake, policy: Policy, deadline: Deadline) -> None:
    parts = urlsplit(url)
    with HttpSource(policy, deadline) as source:

        def take(name: str) -> None:
            file_parts = parts._replace(path=f"{parts.path.rstrip('/')}/{name}")
            with source.get(urlunsplit(file_parts)) as body:
                intake.take(name, body.chunks, body.size)

        take_files(intake, take)


def _take_archive(url: str, intake: Intake, policy: Policy, deadline: Deadline, progress: Progress) -> None:
    name = urlsplit(url).path.rpartition("/")[2]
    with tempfile.TemporaryFile(buffering=0, dir=intake.folder) as archive:
        with HttpSource(policy, deadline) as source, source.get(url) as body:
            done = 0
            for chunk in body.chunks:
                done += len(chunk)
                if max(done, body.size or 0) > policy.max_bytes:
                    raise SourceTooLargeError(
                        f"{name}: expected at most {policy.max_bytes} bytes, found more"
                    )
                write_whole(archive.fileno(), chunk)
                progress(done, body.size)
        archive.seek(0)
        unpack(archive, name, intake, policy.max_bytes)


@dataclass(frozen=True, slots=True)
class Download:
    """An adapter that is being fetched: its name, and bytes done and in total (None: unknown)."""

    name: str
    num_done: int = 0
    num_total: int | None = None


class Downloads:
    """The running downloads, and the bytes of all downloads so far. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[object, Download] = {}
        self.num_bytes = 0

    @property
    def running(self) -> list[Download]:
        """Sorted by name."""
        with self._lock:
            return sorted(self._running.values(), key=lambda download: download.name)

    @contextmanager
    def track(self, name: str, progress: Progress) -> Iterator[Progress]:
        """Lists a download while the block runs. Yields the `Progress` to report to, which calls
        `progress`.
        """
        key, most = object(), 0

        def report(done: int, total: int | None) -> None:
            nonlocal most
            # The bytes of an archive are reported a second time when it is unpacked.
            if done > most:
                with self._lock:
                    self.num_bytes += done - most
                    self._running[key] = replace(self._running[key], num_done=done, num_total=total)
                most = done
            progress(done, total)

        with self._lock:
            self._running[key] = Download(name)
        try:
            yield report
        finally:
            with self._lock:
                del self._running[key]
