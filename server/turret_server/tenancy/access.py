"""What who calls may do with which adapter.

An adapter that a tenant may not use does not exist for it: that is answered before anything is looked up, so
that neither words nor time tell whether it is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from turret.v1 import adapters_pb2
from turret_adapters.errors import AdapterNotFoundError, SourceForbiddenError
from turret_adapters.sources.filesystems import hub_url
from turret_adapters.sources.policy import Policy
from turret_server.errors import PermissionDeniedError
from turret_server.tenancy.tenants import Tenant


def check_use(tenant: Tenant, names: Iterable[str]) -> None:
    """See that a tenant may use the adapters of these names.

    Raises:
        AdapterNotFoundError: it may not, whether there are such or not.
    """
    for name in names:
        if not tenant.may_use(name):
            raise AdapterNotFoundError(f"no adapter is loaded under the name {name!r}")


def check_change(tenant: Tenant, name: str) -> None:
    """See that a tenant may load, replace and roll back an adapter of this name.

    Raises:
        PermissionDeniedError: it may use it, but not that.
        AdapterNotFoundError: for this tenant there is none such.
    """
    if not tenant.may_load(name):
        check_use(tenant, [name])
        raise _denied(tenant, "load", name)


def check_unload(tenant: Tenant, name: str) -> None:
    """See that a tenant may unload an adapter of this name.

    Raises:
        PermissionDeniedError: it may use it, but not that.
        AdapterNotFoundError: for this tenant there is none such.
    """
    if not tenant.may_unload(name):
        check_use(tenant, [name])
        raise _denied(tenant, "unload", name)


def seen_by(tenant: Tenant, adapter: adapters_pb2.Adapter) -> adapters_pb2.Adapter:
    """What a tenant is told of an adapter. Where its operator keeps it, and why it FAILED, which may name
    such places, is of no concern to those who only use it.
    """
    if tenant.may_load(adapter.name):
        return adapter
    seen = adapters_pb2.Adapter()
    seen.CopyFrom(adapter)
    for revision in seen.history:
        revision.ClearField("source")
    if seen.error:
        seen.error = "it could not be loaded; ask the server's operator why"
    return seen


@contextmanager
def told_to(tenant: Tenant) -> Iterator[None]:
    """Leaves out why an adapter is not there where the tenant may not load it, as `seen_by` does."""
    try:
        yield
    except AdapterNotFoundError as error:
        if error.why and not tenant.may_load(error.name):
            raise AdapterNotFoundError(error.message) from error
        raise


def check_source(tenant: Tenant, source: str) -> None:
    """See that a tenant may load from there, wherever the server itself may: or it could load the files of
    another's adapter under a name of its own.

    Raises:
        SourceForbiddenError: it may not; what is there is not told.
        AdapterSourceError: there cannot be anything.
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
        # As it is fetched: a hub's revision stands behind an @.
        policy.url(url.partition("@")[0] if url.startswith("hf://") else url)


def _check_written(source: str, roots: Iterable[Path]) -> None:
    """Refuse what is not written as a place below a root before the disk is looked at: there may be links
    everywhere, and whether they are there, and how long it takes to find out, is not told.
    """
    path = Path(os.path.normpath(source))
    places = [place for root in roots for place in (root, Path(os.path.realpath(root)))]
    if ".." in Path(source).parts or not any(path.is_relative_to(place) for place in places):
        raise SourceForbiddenError(
            f"{source[:200]!r}: expected a folder below {', '.join(map(str, roots)) or 'nowhere'}, found one "
            "elsewhere"
        )


def _denied(tenant: Tenant, what: str, name: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"tenant {tenant.name!r} may use adapter {name!r}, but not {what} it; ask the server's operator",
        tenant=tenant.name,
    )
