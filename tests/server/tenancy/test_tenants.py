from __future__ import annotations

import pytest

from turret_adapters.store.names import Ownership
from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants import TenantTable, parse_tenants

DEFAULT = TenantLimits(weight=1.0, max_queued_requests=7, max_queued_tokens=700)
DIGEST = digest_of("turret_secret")


def parse(content: str | bytes) -> TenantTable:
    return parse_tenants("FILE", content if isinstance(content, bytes) else content.encode(), DEFAULT)


def test_a_table_says_what_is_different_for_its_tenant():
    limits = parse(
        """
        [tenants.acme]
        weight = 2.5
        max_queued_requests = 100
        max_queued_tokens = 200_000
        [tenants."small.one"]
        max_queued_requests = 1
        """
    ).limits
    assert limits("acme") == TenantLimits(weight=2.5, max_queued_requests=100, max_queued_tokens=200_000)
    assert limits("small.one") == TenantLimits(max_queued_requests=1, max_queued_tokens=700)
    assert limits("nobody") is DEFAULT


def test_a_whole_number_is_a_weight():
    assert parse("[tenants.acme]\nweight = 3").limits("acme").weight == 3


def test_an_empty_file_changes_nothing():
    table = parse("")
    assert table.is_open
    assert table.limits("acme") is DEFAULT


@pytest.mark.parametrize("known_by", [f'keys = ["{DIGEST}"]', 'identities = ["acme.example.com"]'])
def test_a_tenant_with_a_key_or_an_identity_closes_the_server(known_by):
    assert not parse(f"[tenants.acme]\n{known_by}\n[tenants.other]\nweight = 2").is_open


def test_a_tenant_is_found_by_any_of_its_keys_and_identities():
    other = digest_of("second")
    table = parse(f'[tenants.acme]\nkeys = ["{DIGEST}", "{other}"]\nidentities = ["a", "b"]\n[tenants.bolt]')
    found = [table.by_key("turret_secret"), table.by_key("second"), table.by_identities(["x", "b"])]
    assert [tenant and tenant.name for tenant in found] == ["acme"] * 3
    assert table.by_key("turret_other") is None
    assert table.by_key("") is None
    assert table.by_key(DIGEST) is None
    assert table.by_identities(["acme"]) is None


def test_a_tenant_may_do_what_its_patterns_say_and_nothing_else():
    [acme, bolt] = (
        parse(
            f"""
            [tenants.acme]
            keys = ["{DIGEST}"]
            use = ["acme-*", "shared"]
            load = ["acme-?"]
            unload = ["acme-[ab]"]
            [tenants.bolt]
            keys = ["{digest_of("bolt")}"]
            """
        ).by_key(key)
        for key in ("turret_secret", "bolt")
    )
    assert acme
    assert bolt
    names = ("acme-a", "acme-c", "acme-cc", "shared", "ACME-a", "xacme-a")
    assert [name for name in names if acme.may_use(name)] == ["acme-a", "acme-c", "acme-cc", "shared"]
    assert [name for name in names if acme.may_load(name)] == ["acme-a", "acme-c"]
    assert [name for name in names if acme.may_unload(name)] == ["acme-a"]
    assert not any(may(name) for name in names for may in (bolt.may_use, bolt.may_load, bolt.may_unload))


def test_an_admin_and_anybody_on_an_open_server_may_do_everything():
    admin = parse(f'[tenants.root]\nkeys = ["{DIGEST}"]\nadmin = true').by_key("turret_secret")
    anybody = parse("").unproven("anybody")
    for tenant in (admin, anybody):
        assert tenant
        assert tenant.may_use("x")
        assert tenant.may_load("x")
        assert tenant.may_unload("x")


def test_what_a_tenant_loads_is_its_own_within_its_limits():
    table = parse(
        f"""
        [tenants.acme]
        keys = ["{DIGEST}"]
        max_adapters = 3
        max_adapter_bytes = 4_000
        max_device_bytes = 5_000
        """
    )
    acme = table.by_key("turret_secret")
    assert acme
    assert acme.ownership == Ownership(owner="acme", max_names=3, max_bytes=4000)
    assert (table.max_device_bytes("acme"), table.max_device_bytes("nobody")) == (5000, None)
    assert table.by_name("bolt").ownership == Ownership(owner="bolt")


def test_with_a_hook_nobody_has_to_have_a_key_and_the_server_is_not_open():
    table = parse_tenants("FILE", b'[tenants.acme]\nuse = ["*"]', DEFAULT, hooked=True)
    assert not table.is_open
    assert table.by_name("acme").may_use("poet")
    assert not table.by_name("new").may_use("poet")


def test_tenants_share_cached_prompts_only_where_both_say_so():
    table = parse(
        "".join(
            f'[tenants.{name}]\nkeys = ["{digest_of(name)}"]\n{more}\n'
            for name, more in {"a": "", "b": "", "c": "share_cache = true", "d": "share_cache = true"}.items()
        )
    )
    a, b, c, d = (tenant.cache_domain for tenant in map(table.by_key, "abcd") if tenant)
    assert c == d
    assert len({a, b, c}) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[tenants.acme", "expected a TOML file"),
        (b"\xff\xfe", "expected a TOML file"),
        ("[acme]\nweight = 1", r"expected tables named \[tenants.NAME\]"),
        ("tenants = 3", r"expected tables named \[tenants.NAME\]"),
        ("[tenants]\nacme = 3", r"acme: expected a table \[tenants.NAME\], found 3"),
        ('[tenants."a/b"]', "'a/b': a tenant's name has"),
        ('[tenants."a\\u0000b"]', "a tenant's name has"),
        ("[tenants.acme]\nwait = 1", "acme: unknown setting 'wait'; known are admin, "),
        ("[tenants.acme]\nweight = 0", "acme: weight is a number above 0; found 0"),
        ("[tenants.acme]\nweight = -1.0", "weight is a number above 0"),
        ("[tenants.acme]\nweight = nan", "weight is a number above 0"),
        ("[tenants.acme]\nweight = inf", "weight is a number above 0"),
        ('[tenants.acme]\nweight = "2"', "weight is a number above 0; found '2'"),
        ("[tenants.acme]\nweight = true", "weight is a number above 0; found True"),
        ("[tenants.acme]\nmax_queued_requests = 0", "max_queued_requests is a whole number above 0"),
        (
            "[tenants.acme]\nmax_queued_requests = 1.5",
            "max_queued_requests is a whole number above 0; found 1.5",
        ),
        ("[tenants.acme]\nmax_queued_tokens = true", "max_queued_tokens is a whole number above 0"),
        *(
            (f"[tenants.acme]\n{limit} = {value}", f"acme: {limit} is a whole number above 0")
            for limit in (
                "max_adapters",
                "max_adapter_bytes",
                "max_device_bytes",
                "max_concurrent_loads",
                "max_pinned_tokens",
                "max_watches",
            )
            for value in ("0", "-1", "1.5", "true", '"1GiB"')
        ),
        ("[tenants.acme]\ntokens_per_minute = 0", "tokens_per_minute is a whole number above 0"),
        (
            "[tenants.acme]\nmax_concurrent_requests = 0.5",
            "max_concurrent_requests is a whole number above 0",
        ),
        ('[tenants.acme]\nkeys = ["secret"]', "keys is a list of digests"),
        (f'[tenants.acme]\nkeys = "{DIGEST}"', "keys is a list of digests"),
        (f'[tenants.acme]\nkeys = ["{DIGEST}", "secret"]', "keys is a list of digests"),
        (f'[tenants.acme]\nkeys = ["{DIGEST.upper()}"]', "keys is a list of digests"),
        ("[tenants.acme]\nkeys = [1]", "keys is a list of digests"),
        ('[tenants.acme]\nuse = "*"', "use is a list of non-empty strings"),
        ("[tenants.acme]\nidentities = [1]", "identities is a list of non-empty strings"),
        ('[tenants.acme]\nidentities = [""]', "identities is a list of non-empty strings"),
        ('[tenants.acme]\nsources = ["adapters"]', "sources is a list of absolute folders"),
        ('[tenants.acme]\nsources = "/"', "sources is a list of absolute folders"),
        ("[tenants.acme]\nsources = [1]", "sources is a list of absolute folders"),
        ('[tenants.acme]\nadmin = "yes"', "admin is true or false; found 'yes'"),
        (
            f'[tenants.a]\nkeys = ["{DIGEST}"]\n[tenants.b]\nkeys = ["{DIGEST}"]',
            "b: key .* also belongs to a",
        ),
        (
            '[tenants.a]\nidentities = ["x"]\n[tenants.b]\nidentities = ["x"]',
            "identity 'x' also belongs to a",
        ),
        ('[tenants.acme]\nuse = ["*"]', "acme: permissions have no effect on an open server"),
        ("[tenants.acme]\nadmin = false", "acme: permissions have no effect on an open server"),
    ],
)
def test_what_a_tenants_file_cannot_say_is_named(content, said):
    with pytest.raises(ConfigError, match=said) as refused:
        parse(content)
    assert str(refused.value).startswith("FILE: ")
