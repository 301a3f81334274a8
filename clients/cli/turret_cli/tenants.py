"""`turret tenants`: API keys for the tenants file. It talks to no server."""

from __future__ import annotations

import json

import click


@click.group(
    epilog="""\b
Examples:
  turret tenants key acme

\b
A tenants file:
  [tenants.acme]
  keys = ["sha256:..."]            # turret tenants key acme
  use = ["acme-*", "shared-*"]     # patterns of adapter names
  load = ["acme-*"]
  unload = ["acme-*"]
  sources = ["/srv/adapters/acme"]
  weight = 2.0
  max_queued_requests = 100
  max_queued_tokens = 200_000
  max_concurrent_requests = 20
  tokens_per_minute = 100_000
  max_adapters = 50
  max_adapter_bytes = 20_000_000_000
  max_device_bytes = 2_000_000_000
  max_concurrent_loads = 2
  max_pinned_tokens = 50_000
  max_watches = 4
  [tenants.operator]
  keys = ["sha256:..."]
  admin = true
  share_cache = true
""",
    short_help="Create API keys.",
)
def tenants() -> None:
    """Create API keys for the tenants of `turret serve --tenants FILE`.

    A tenant has the permissions that its table lists, and no others; limits that it does not list are the
    server's defaults. Without keys or identities in the file, callers need no authentication.
    """


@tenants.command(
    epilog="""\b
Examples:
  turret tenants key acme
  turret tenants key acme --json | jq -r .key
"""
)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def key(name: str, *, as_json: bool) -> None:
    """Create an API key for the tenant NAME, and its line of the file.

    The key is printed once and stored nowhere; the file contains only its digest. To rotate keys, give the
    tenant a second one before you remove the first.
    """
    # Imported only here, see `local`.
    from turret_server.config import NAME  # noqa: PLC0415
    from turret_server.tenancy.keys import digest_of, new_key  # noqa: PLC0415

    if not NAME.fullmatch(name):
        raise click.BadParameter(
            "expected 1 to 128 of the characters a-z A-Z 0-9 . _ -, the first a letter or a digit; found "
            f"{name!r}",
            param_hint="NAME",
        )
    made = new_key()
    if as_json:
        click.echo(json.dumps({"tenant": name, "key": made, "digest": digest_of(made)}))
    else:
        table = f'"{name}"' if "." in name else name
        click.echo(f"key, for the tenant alone:\n{made}\n\nfor the tenants file:\n[tenants.{table}]")
        click.echo(f'keys = ["{digest_of(made)}"]\n# Add what the tenant may do, such as: use = ["{name}-*"]')
