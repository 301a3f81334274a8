"""Several adapters in one request: which can be, and what their prefixes are together.

LoRAs add up at run time, each with its weight (peft's `add_weighted_adapter(combination_type="cat")`), and
need nothing made. Prefixes stand one after another, so several of them make one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from turret_adapters.errors import AdapterCompositionError
from turret_adapters.host import HostAdapter
from turret_adapters.spec import AdapterSpec, Method, Part, PrefixKind, PrefixSpec

_LORA = {Part.LORA_A, Part.LORA_B}


def check_composition(named: Sequence[tuple[str, AdapterSpec, float]]) -> None:
    """See that adapters of these names, specs and weights can be in one request.

    Raises:
        AdapterCompositionError: names the one that cannot.
    """
    for name, spec, weight in named:
        additive = not spec.invocation_tokens and all(group.part in _LORA for group in spec.rows)
        if len(named) > 1 and not additive:
            raise AdapterCompositionError(
                f"adapter {name!r} ({spec.method.value}) does more than to add a LoRA; name it alone"
            )
        if weight != 1 and not (spec.rows and additive):
            raise AdapterCompositionError(
                f"adapter {name!r} ({spec.method.value}) has no weight; only LoRA can count more or less"
            )
    kinds = [spec.prefix.kind for _, spec, _ in named if spec.prefix]
    if len(set(kinds)) > 1:
        raise AdapterCompositionError(
            "prefixes of keys and values and prefixes of embeddings cannot be in one request"
        )


def joined_spec(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """One adapter whose virtual tokens are those of all, in order. They must be of one kind."""
    [kind] = {spec.prefix.kind for spec in specs if spec.prefix}
    digest = hashlib.sha256("+".join(spec.revision for spec in specs).encode()).hexdigest()
    return AdapterSpec(
        revision=f"joined-{digest[:32]}",
        method=Method.PREFIX_TUNING if kind is PrefixKind.KEY_VALUE else Method.PROMPT_TUNING,
        rows=(),
        prefix=PrefixSpec(num_virtual_tokens=sum(spec.num_virtual_tokens for spec in specs), kind=kind),
        max_rank=0,
        num_parameters=sum(spec.num_parameters for spec in specs),
        file_bytes=sum(spec.file_bytes for spec in specs),
    )


def join_prefixes(adapters: Sequence[HostAdapter]) -> HostAdapter:
    """The tensors of `joined_spec`.

    Keys in a prefix carry no rotary embedding, so keys and values keep their meaning wherever they stand;
    embeddings are computed to keys and values in their place.
    """
    spec = joined_spec([adapter.spec for adapter in adapters])
    keys_values = [adapter.prefix_kv.float() for adapter in adapters if adapter.prefix_kv is not None]
    if keys_values:
        return HostAdapter(spec=spec, deltas={}, prefix_kv=torch.cat(keys_values))
    prompts = [
        adapter.prompt_embeddings.float() for adapter in adapters if adapter.prompt_embeddings is not None
    ]
    return HostAdapter(spec=spec, deltas={}, prompt_embeddings=torch.cat(prompts))
