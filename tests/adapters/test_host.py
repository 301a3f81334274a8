from __future__ import annotations

import torch

from support.fake_device import make_spec
from turret_adapters.host import HostAdapter, join_prefixes
from turret_adapters.spec import PrefixKind


def prompt(revision: str, rows_NE: torch.Tensor) -> HostAdapter:
    spec = make_spec(revision, num_virtual=len(rows_NE), kind=PrefixKind.EMBEDDING)
    return HostAdapter(spec=spec, deltas={}, prompt_embeddings=rows_NE)


def test_prompts_of_embeddings_stand_in_their_order():
    first, second = prompt("1", torch.randn(3, 4)), prompt("2", torch.randn(2, 4))
    joined = join_prefixes([second, first])
    assert joined.spec.prefix == make_spec("", num_virtual=5, kind=PrefixKind.EMBEDDING).prefix
    assert torch.equal(
        joined.prompt_embeddings, torch.cat([second.prompt_embeddings, first.prompt_embeddings])
    )
    assert joined.prefix_kv is None
    assert joined.spec.revision != join_prefixes([first, second]).spec.revision
