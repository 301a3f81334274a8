"""What is measured: by group, which systems do which work. In a round a group's works take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.layout import MIXED, PREFIX, RANK_16, SMALL_LLAMA, TINY_LLAMA, Shape
from bench.work import Batch

TURRET, PEFT, LLAMA_CPP, VLLM = "Turret", "HF + peft", "llama.cpp", "vLLM"
SYSTEMS = (TURRET, PEFT, LLAMA_CPP, VLLM)

_PROMPT_TOKENS = 128
_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One kind of batch, and who runs it."""

    adapters: Sequence[str | None]
    systems: Sequence[str] = (TURRET,)
    prompt_tokens: int = _PROMPT_TOKENS
    max_tokens: int = _MAX_TOKENS

    def batch(self, seed: int) -> Batch:
        return Batch(
            adapters=self.adapters, prompt_tokens=self.prompt_tokens, max_tokens=self.max_tokens, seed=seed
        )

    def warm_up(self, seed: int) -> Batch:
        """The same adapters with little to do: what is made or brought in at first use is so afterwards."""
        return Batch(adapters=self.adapters, prompt_tokens=16, max_tokens=3, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    shape: Shape
    works: dict[str, Work]


_PEERS = (TURRET, PEFT, LLAMA_CPP)

GROUPS: dict[str, Group] = {
    "batch-8": Group(
        shape=TINY_LLAMA,
        works={
            "base": Work(adapters=(None,) * 8),
            "lora": Work(adapters=RANK_16[:8], systems=SYSTEMS),
            "mixed": Work(adapters=MIXED),
            "prefix": Work(adapters=(PREFIX,) * 8),
        },
    ),
    "batch-1": Group(shape=TINY_LLAMA, works={"lora": Work(adapters=RANK_16[:1], systems=_PEERS)}),
    "batch-32": Group(shape=TINY_LLAMA, works={"lora": Work(adapters=RANK_16, systems=_PEERS)}),
    "prefill": Group(
        shape=TINY_LLAMA,
        works={"lora": Work(adapters=RANK_16[:8], systems=_PEERS, prompt_tokens=512, max_tokens=1)},
    ),
    "small": Group(shape=SMALL_LLAMA, works={"lora": Work(adapters=RANK_16[:8], systems=_PEERS)}),
}
# Starts servers of its own instead of giving work to those that run.
START = "start"
GROUP_NAMES = (*GROUPS, START)
