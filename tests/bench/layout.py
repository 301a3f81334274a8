"""What the benchmark is run on, and where it keeps what it makes: under `.bench`, which git ignores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BENCH = REPOSITORY / ".bench"
PEERS = BENCH / "peers"
LLAMA_CPP = PEERS / "llama.cpp"
LLAMA_SERVER = LLAMA_CPP / "build" / "bin" / "llama-server"
LLAMA_QUANTIZE = LLAMA_CPP / "build" / "bin" / "llama-quantize"
# What its converters import beside what Turret's development environment has.
LLAMA_CONVERTER_NEEDS = LLAMA_CPP / "python"
VLLM = PEERS / "vllm"
# Made last, so that a half installed environment does not count as one.
VLLM_PYTHON = VLLM / "bin" / "python-of-vllm"

VOCAB_SIZE = 32000
MAX_CONTEXT = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama of random weights: how fast a model is does not depend on what it has learnt."""

    name: str
    title: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Of one layer: input and output features by name under the layer."""
        hidden, middle, kv = self.hidden_size, self.intermediate_size, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, middle),
            "mlp.up_proj": (hidden, middle),
            "mlp.down_proj": (middle, hidden),
        }

    @property
    def num_quantised(self) -> int:
        """Parameters of the linears: what NF4 holds. Embedding, head and norms stay as they are."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def num_unquantised(self) -> int:
        return 2 * VOCAB_SIZE * self.hidden_size + (2 * self.num_layers + 1) * self.hidden_size

    @property
    def folder(self) -> Path:
        return BENCH / self.name

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @property
    def gguf(self) -> Path:
        return self.folder / "gguf"


TINY_LLAMA = Shape(
    name="llama-1.1b",
    title="1.1 B",
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
)
SMALL_LLAMA = Shape(
    name="llama-160m",
    title="160 M",
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
)

# Adapters by name, and the ranks of those that are LoRAs of all linears.
RANK_16 = tuple(f"r16-{index:02}" for index in range(32))
RANKS = dict.fromkeys(RANK_16, 16) | dict.fromkeys(("r8-0", "r8-1", "r8-2"), 8) | {"r64-0": 64, "r64-1": 64}
MIXED = ("r8-0", "r8-1", "r8-2", *RANK_16[:3], "r64-0", "r64-1")
PREFIX = "prefix-64"
PREFIX_TOKENS = 64
