"""From whatever names an adapter's place to a revision in the store."""

from __future__ import annotations

import tempfile
from urllib.parse import urlsplit, urlunsplit

from turret_adapters.sources.archive import SUFFIXES, unpack
from turret_adapters.sources.filesystems import hub_url, take_from_fsspec
from turret_adapters.sources.folder import CONFIG_NAME, TENSORS_NAME
from turret_adapters.sources.http import HttpSource
from turret_adapters.sources.intake import Intake, Progress, untold
from turret_adapters.sources.policy import Deadline, Policy
from turret_adapters.store.staging import write_whole
from turret_adapters.store.store import AdapterStore
from turret_adapters.store.store_errors import SourceTooLargeError


def fetch(source: str, store: AdapterStore, policy: Policy, progress: Progress = untold) -> str:
    """Brings an adapter into the store, and holds it once for the caller, who releases it.

    Nothing of it is to be seen in the store before all of it is there.

    Args:
        source: a folder of this machine (a path that is absolute or begins with a dot), `owner/name` or
            `hf://owner/name@revision` of the Hugging Face hub, `https://` of a folder or of an archive (.zip,
            .tar.gz, .tgz), or a folder's URL of any protocol that fsspec has a package for.
        store: where it goes.
        policy: what is allowed.
        progress: told bytes done and in all, on this thread; what it raises ends the fetch.

    Returns:
        The revision.

    Raises:
        AdapterSourceError: there is no adapter at that place.
        SourceForbiddenError: the policy does not allow it.
        SourceTooLargeError, SourceUnavailableError, StoreFullError, StoreFailedError
    """
    url = hub_url(source) or source
    deadline = Deadline(policy.timeout)
    if "://" not in url:
        return store.add(policy.folder(source), _in_time(deadline, progress), policy.max_bytes)
    # A hub's revision stands behind an @.
    scheme = policy.url(url.partition("@")[0] if url.startswith("hf://") else url).scheme
    with store.staging() as staged:
        intake = Intake(staged, policy.max_bytes, progress)
        if scheme not in ("http", "https"):
            take_from_fsspec(url, intake, deadline)
        elif urlsplit(url).path.endswith(SUFFIXES):
            _take_archive(url, intake, policy, deadline, progress)
        else:
            _take_folder(url, intake, policy, deadline)
        return store.adopt(staged)


def _in_time(deadline: Deadline, progress: Progress) -> Progress:
    """A disk across the network may be slower than anything that is downloaded."""

    def told(done: int, total: int | None) -> None:
        deadline.left()
        progress(done, total)

    return told


def _take_folder(url: str, intake: Intake, policy: Policy, deadline: Deadline) -> None:
    parts = urlsplit(url)
    with HttpSource(policy, deadline) as source:
        for name in (CONFIG_NAME, TENSORS_NAME):
            place = parts._replace(path=f"{parts.path.rstrip('/')}/{name}")
            with source.get(urlunsplit(place)) as body:
                intake.take(name, body.chunks, body.size)


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
