"""What a tenant may do with an adapter.

An adapter that a tenant may not use is answered like one that does not exist, and before it is looked up:
neither the message nor the time shows whether it exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from turret_adapters.errors import (
    AdapterNotFoundError,
    NamesCorruptError,
    RevisionCorruptError,
    SourceForbiddenError,
    StoreBusyError,
    StoreFailedError,
    StoreFullError,
)
from turret_adapters.sources.filesystems import hub_url
from turret_adapters.sources.policy import Policy
from turret_server.errors import PermissionDeniedError
from turret_server.tenancy.tenants import Tenant

_STORE_ERRORS = (NamesCorruptError, RevisionCorruptError, StoreBusyError, StoreFailedError, StoreFullError)


def check_use(tenant: Tenant, names: Iterable[str]) -> None:
    """Check that a tenant may use adapters.

    Raises:
        AdapterNotFoundError: it may not, whether they exist or not.
    """
    for name in names:
        if not tenant.may_use(name):
            raise AdapterNotFoundError(
                f"no adapter is loaded under the name {name!r}; load it, or list those that are"
            )


def check_change(tenant: Tenant, name: str) -> None:
    """Check that a tenant may load, replace, split and roll back an adapter.

    Raises:
        PermissionDeniedError: it may only use it.
        AdapterNotFoundError: it may not even use it.
    """
    if not tenant.may_load(name):
        check_use(tenant, [name])
        raise _denied(tenant, "load", name)


def check_unload(tenant: Tenant, name: str) -> None:
    """Check that a tenant may unload an adapter.

    Raises:
        PermissionDeniedError: it may only use it.
        AdapterNotFoundError: it may not even use it.
    """
    if not tenant.may_unload(name):
        check_use(tenant, [name])
        raise _denied(tenant, "unload", name)


@contextmanager
def errors_visible_to(tenant: Tenant) -> Iterator[None]:
    """Removes from errors in the block what may contain paths and URLs of the operator: why an adapter could
    not be loaded, unless the tenant may load it, and what failed in the store, unless it is an administrator.
    """
    try:
        yield
    except AdapterNotFoundError as error:
        if not tenant.may_load(error.name):
            raise AdapterNotFoundError(error.message) from error
        raise
    except _STORE_ERRORS as error:
        if tenant.admin:
            raise
        raise type(error)("the adapter's files could not be read; ask the server's operator") from error


def check_source(tenant: Tenant, source: str) -> None:
    """Check that a tenant may load from a source, besides the server's own policy: otherwise it could load
    another tenant's files under a name of its own. Reads the disk.

    Raises:
        SourceForbiddenError: it may not, whatever is there.
        AdapterSourceError: the source is malformed.
    """
    if tenant.admin:
        return
    policy = Policy(
        roots=tuple(Path(each) for each in tenant.sources if "://" not in each),
        urls=tuple(each for each in tenant.sources if "://" in each),
    )
    url = hub_url(source) or source
    if "://" not in url:
        _check_written(source, policy.roots)
        policy.folder(source)
    else:
        # As it is fetched: the revision of a hub follows an @.
        policy.url(url.partition("@")[0] if url.startswith("hf://") else url)


def _check_written(source: str, roots: Iterable[Path]) -> None:
    """Refuse a path that is not written as one below a root, before the disk is read: neither the answer
    nor its time shows what exists elsewhere.
    """
    path = Path(os.path.normpath(source))
    allowed = [folder for root in roots for folder in (root, Path(os.path.realpath(root)))]
    if ".." in Path(source).parts or not any(path.is_relative_to(folder) for folder in allowed):
        raise SourceForbiddenError(
            f"path must be a folder below {', '.join(map(str, roots)) or 'none'} for this tenant; found "
            f"{source[:200]!r}; ask the server's operator for access"
        )


def _denied(tenant: Tenant, what: str, name: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"tenant {tenant.name!r} may use adapter {name!r}, but not {what} it; ask the server's operator",
        tenant=tenant.name,
    )
