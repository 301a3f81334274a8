"""The operator's own function says whose a call is; whatever it does, a client sees a clean status."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from turret_server.engine.admission import TenantLimits
from turret_server.errors import AuthUnavailableError, ConfigError, UnauthenticatedError
from turret_server.tenancy import auth_hook
from turret_server.tenancy.auth import tenant_of
from turret_server.tenancy.auth_hook import AuthHook, load_hook
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants import parse_tenants

HOOKED = parse_tenants(
    "FILE",
    f"""
    [tenants.acme]
    use = ["acme-*"]
    [tenants.bolt]
    keys = ["{digest_of("bolt-key")}"]
    """.encode(),
    TenantLimits(),
    hooked=True,
)


def by_token(metadata, identities):
    return dict(metadata).get("token") or (identities[0] if identities else None)


async def by_token_later(metadata, identities):
    await asyncio.sleep(0)
    return by_token(metadata, identities)


@pytest.mark.parametrize("function", [by_token, by_token_later])
async def test_it_is_asked_with_the_metadata_and_the_names_of_the_certificate(function):
    hook = AuthHook("x:y", function)
    assert await hook.ask([("token", "acme")], ["bolt"]) == "acme"
    assert await hook.ask([], ["bolt"]) == "bolt"
    assert await hook.ask([], []) is None


async def test_a_plain_function_holds_up_nobody():
    gate = threading.Event()
    hook = AuthHook("x:y", lambda *_: "acme" if gate.wait(60) else None)
    asking = asyncio.create_task(hook.ask([], []))
    await asyncio.sleep(0.01)
    assert not asking.done()
    gate.set()
    assert await asking == "acme"


async def test_a_refusal_of_the_hook_keeps_its_message():
    def refuse(*_):
        raise UnauthenticatedError("sign in again")

    with pytest.raises(UnauthenticatedError, match="sign in again"):
        await AuthHook("x:y", refuse).ask([], [])


def broken(*_):
    raise ZeroDivisionError("secret")


async def broken_later(*_):
    raise ZeroDivisionError("secret")


@pytest.mark.parametrize(
    "function",
    [
        broken,
        broken_later,
        lambda *_: sys.exit(1),
        lambda *_: 7,
        lambda *_: "a/b",
        lambda *_: "",
        lambda: "acme",
    ],
)
async def test_other_errors_of_the_hook_are_unavailable_and_logged(function, caplog):
    with pytest.raises(AuthUnavailableError) as refused:
        await AuthHook("x:y", function).ask([], [])
    assert "secret" not in str(refused.value)
    assert refused.value.retry_after
    assert "--auth-hook x:y" in caplog.text


async def sleep(*_):
    await asyncio.sleep(60)


@pytest.mark.parametrize("plain", [True, False])
async def test_one_that_takes_too_long_is_cut_off(monkeypatch, caplog, plain):
    monkeypatch.setattr(auth_hook, "HOOK_SECONDS", 0.02)
    monkeypatch.setattr(auth_hook, "MAX_THREADS", 1)
    over = threading.Event()
    hook = AuthHook("x:y", (lambda *_: over.wait(60)) if plain else sleep)
    # The second finds the only thread taken, and is cut off as well.
    for _ in range(2):
        with pytest.raises(AuthUnavailableError):
            await hook.ask([], [])
    assert "no answer in 0.02 s" in caplog.text
    over.set()


async def test_a_call_gives_its_thread_back_whatever_becomes_of_it(monkeypatch):
    monkeypatch.setattr(auth_hook, "MAX_THREADS", 1)
    outcomes = iter(["acme", UnauthenticatedError("no"), ZeroDivisionError("x"), "bolt"])

    def next_outcome(*_):
        found = next(outcomes)
        if isinstance(found, Exception):
            raise found
        return found

    hook = AuthHook("x:y", next_outcome)
    assert await hook.ask([], []) == "acme"
    with pytest.raises(UnauthenticatedError):
        await hook.ask([], [])
    with pytest.raises(AuthUnavailableError):
        await hook.ask([], [])
    assert await hook.ask([], []) == "bolt"


async def test_a_function_that_hangs_does_not_hold_up_the_end_of_the_process(monkeypatch):
    monkeypatch.setattr(auth_hook, "HOOK_SECONDS", 0.02)
    over = threading.Event()
    with pytest.raises(AuthUnavailableError):
        await AuthHook("x:y", lambda *_: over.wait(60)).ask([], [])
    threads = [thread for thread in threading.enumerate() if thread.name == "turret-auth-hook"]
    assert threads
    assert all(thread.daemon for thread in threads)
    over.set()


def test_a_tenant_of_the_file_has_its_rights_and_another_has_none():
    acme, new = (tenant_of(HOOKED, [], [], name) for name in ("acme", "new"))
    assert acme.may_use("acme-poet")
    assert not new.may_use("acme-poet")
    assert (new.name, new.proven, new.admin, new.limits) == ("new", True, False, TenantLimits())


def test_a_call_that_says_to_be_another_is_refused():
    assert tenant_of(HOOKED, [("turret-tenant", "acme")], [], "acme").name == "acme"
    with pytest.raises(UnauthenticatedError, match="turret-tenant"):
        tenant_of(HOOKED, [("turret-tenant", "bolt")], [], "acme")


def test_where_it_does_not_know_keys_decide_and_nothing_is_open():
    assert tenant_of(HOOKED, [("authorization", "Bearer bolt-key")]).name == "bolt"
    with pytest.raises(UnauthenticatedError):
        tenant_of(HOOKED, [])
    nobody = parse_tenants("FILE", b"", TenantLimits(), hooked=True)
    assert not nobody.is_open
    with pytest.raises(UnauthenticatedError):
        tenant_of(nobody, [("turret-tenant", "acme")])


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("tenant_of", "expected MODULE:FUNCTION"),
        (":tenant_of", "expected MODULE:FUNCTION"),
        ("hooks:", "expected MODULE:FUNCTION"),
        ("absent_module:tenant_of", "ModuleNotFoundError"),
        ("hooks:absent", "AttributeError"),
        ("hooks:number", "expected a function, found 7"),
        ("spoilt_hooks:tenant_of", "ZeroDivisionError"),
    ],
)
def test_what_names_no_function_is_refused_at_the_start(path, said, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hooks.py").write_text("number = 7\n")
    (tmp_path / "spoilt_hooks.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=said) as refused:
        load_hook(path)
    assert str(refused.value).startswith(f"--auth-hook {path}")
    for name in ("hooks", "spoilt_hooks"):
        sys.modules.pop(name, None)


async def test_a_function_is_found_by_its_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "found_hooks.py").write_text("def tenant_of(metadata, identities):\n    return 'acme'\n")
    assert await load_hook("found_hooks:tenant_of").ask([], []) == "acme"
    del sys.modules["found_hooks"]


def too_late(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize("outcome", [lambda *_: "acme", too_late])
async def test_an_answer_that_comes_too_late_is_dropped_and_the_thread_is_free_again(monkeypatch, outcome):
    monkeypatch.setattr(auth_hook, "HOOK_SECONDS", 0.02)
    monkeypatch.setattr(auth_hook, "MAX_THREADS", 1)
    faults, over, began, threads = [], threading.Event(), threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", faults.append)

    def late(*_):
        threads.append(threading.current_thread())
        began.set()
        over.wait(60)
        return outcome()

    hook = AuthHook("x:y", late)
    with pytest.raises(AuthUnavailableError):
        await hook.ask([], [])
    await asyncio.to_thread(began.wait)
    over.set()
    await asyncio.to_thread(threads[0].join)
    assert faults == []
    monkeypatch.setattr(auth_hook, "HOOK_SECONDS", 60)
    monkeypatch.setattr(hook, "_function", lambda *_: "bolt")
    assert await hook.ask([], []) == "bolt"


def test_an_answer_after_the_end_of_the_loop_is_dropped(monkeypatch):
    monkeypatch.setattr(auth_hook, "HOOK_SECONDS", 0.02)
    faults, over, began, threads = [], threading.Event(), threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", faults.append)

    def late(*_):
        threads.append(threading.current_thread())
        began.set()
        over.wait(60)

    async def ask():
        await AuthHook("x:y", late).ask([], [])

    with pytest.raises(AuthUnavailableError):
        asyncio.run(ask())
    assert began.wait(60)
    over.set()
    threads[0].join(60)
    assert faults == []
