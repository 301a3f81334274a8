"""The supported kinds of adapter, by `peft_type`. A new kind is a module here and a line in `KINDS`."""

from __future__ import annotations

from collections.abc import Mapping

from turret_adapters.formats.kind import Kind
from turret_adapters.formats.kinds import adalora, ia3, ln_tuning, lora, prompts, trainable_tokens, vera

KINDS: Mapping[str, Kind] = {
    "LORA": lora.KIND,
    "PREFIX_TUNING": prompts.PREFIX_TUNING,
    "PROMPT_TUNING": prompts.PROMPT_TUNING,
    "P_TUNING": prompts.P_TUNING,
    "MULTITASK_PROMPT_TUNING": prompts.MULTITASK_PROMPT_TUNING,
    "ADALORA": adalora.KIND,
    "VERA": vera.KIND,
    "IA3": ia3.KIND,
    "LN_TUNING": ln_tuning.KIND,
    "TRAINABLE_TOKENS": trainable_tokens.KIND,
}

# peft converts these to LORA.
CONVERTIBLE = frozenset({"LOHA", "LOKR"})
