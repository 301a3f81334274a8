"""Small random base models of several families, with a byte-level tokenizer, in Hugging Face format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
)

from support.tokenizers import VOCAB_SIZE, save_tokenizer
from turret_server.model.load import quantization

MAX_CONTEXT = 256

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
_TOWER = {"hidden_size": 32, "intermediate_size": 48}
_SIGLIP = {**_TOWER, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_QWEN_TOWER = {**_TOWER, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
_IMAGE_TOKENS = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}


def _mrope(*section: int) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "llama-nf4": LlamaConfig(**_GROUPED),
    "llama-tied": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**_GROUPED, sliding_window=24),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=32),
    # The window is shorter than the prompts, so that a wrong one shows.
    "gemma2": Gemma2Config(**_GROUPED, head_dim=32, query_pre_attn_scalar=32, sliding_window=24),
    "gemma3": Gemma3TextConfig(**_GROUPED, head_dim=32, query_pre_attn_scalar=32, sliding_window=24),
    "phi3": Phi3Config(**_GROUPED),
    # Its factors change at the length that is MAX_CONTEXT here.
    "phi3-longrope": Phi3Config(
        **_GROUPED | {"max_position_embeddings": 4 * MAX_CONTEXT},
        original_max_position_embeddings=MAX_CONTEXT,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.2, 2.7],
            "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0],
        },
    ),
    "gpt-neox": GPTNeoXConfig(**_SIZES),
    "mixtral": MixtralConfig(**_GROUPED | _EXPERTS | {"intermediate_size": 64}, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(
        **_GROUPED | _EXPERTS, num_experts=4, moe_intermediate_size=64, norm_topk_prob=True
    ),
}
# Checkpoints with a tower for images.
MULTIMODAL: dict[str, PreTrainedConfig] = {
    "gemma3-vision": Gemma3Config(
        text_config=FAMILIES["gemma3"].to_dict(),
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=300,
    ),
    "qwen2.5-vl": Qwen2_5_VLConfig(
        text_config={**_GROUPED, "rope_parameters": _mrope(2, 3, 3)},
        vision_config={**_QWEN_TOWER, "fullatt_block_indexes": [1]},
        **_IMAGE_TOKENS,
    ),
    "qwen3-vl": Qwen3VLConfig(
        text_config={**_GROUPED, "head_dim": 32, "rope_parameters": _mrope(4, 6, 6)},
        vision_config={**_QWEN_TOWER, "deepstack_visual_indexes": [1], "num_position_embeddings": 64},
        **_IMAGE_TOKENS,
    ),
    "mistral3": Mistral3Config(
        text_config=MistralConfig(**_GROUPED).to_dict(),
        vision_config={"model_type": "pixtral", **_SIGLIP, "head_dim": 16},
        image_token_index=300,
        tie_word_embeddings=False,
    ),
}
# Half of them suffice for every adapter: one with another attention, one with positions in three dimensions.
FAMILIES |= {family: MULTIMODAL[family] for family in ("gemma3-vision", "qwen2.5-vl")}
# Those whose checkpoint is in NF4 and bfloat16, with some linears in bfloat16.
QUANTISED = frozenset({"llama-nf4"})
# Those whose tokenizer is not byte-level.
TOKENIZER_KINDS = {"mistral": "byte-fallback"}
# The modules that they keep in bfloat16, beside the head.
KEPT = ("lm_head", "model.layers.0.mlp", "q_proj", "layers.2.self_attn.o_proj")
# Those whose experts are stacked parameters. Their only linears are those of the attention.
MIXTURES = frozenset({"mixtral", "qwen3-moe"})


@dataclass(frozen=True)
class Names:
    """How a family calls its modules. `excluded` matches those of the parts that do not read text."""

    attention: tuple[str, ...] = ("q_proj", "v_proj")
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: tuple[str, ...] = ("down_proj",)
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm", "model.norm")
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    excluded: str = ""


_VISION = Names(
    norms=("input_layernorm", "post_attention_layernorm", "language_model.norm"),
    excluded=".*(vision_tower|visual|multi_modal_projector).*",
)
NAMES: dict[str, Names] = {
    **dict.fromkeys(MIXTURES, Names(mlp_in=(), mlp_out=())),
    **dict.fromkeys(MULTIMODAL, _VISION),
    **dict.fromkeys(("phi3", "phi3-longrope"), Names(attention=("qkv_proj",), mlp_in=("gate_up_proj",))),
    "gpt-neox": Names(
        attention=("query_key_value",),
        mlp_in=("dense_h_to_4h",),
        mlp_out=("dense_4h_to_h",),
        norms=("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
        embedding="embed_in",
    ),
}


def names_of(family: str) -> Names:
    return NAMES.get(family, Names())


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM | AutoModelForMultimodalLM]:
    """With which transformers loads a checkpoint whole."""
    return AutoModelForMultimodalLM if "text_config" in config.sub_configs else AutoModelForCausalLM


def save_model(family: str, folder: Path) -> Path:
    """Random weights, large enough that greedy tokens vary and their margins are not all tiny."""
    torch.manual_seed(sum(family.encode()))
    config = (FAMILIES | MULTIMODAL)[family]
    model = auto_class(config).from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(12.0 if parameter.shape[0] == VOCAB_SIZE else 3.0)
            elif parameter.ndim == 3:
                parameter.mul_(3.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    if family in QUANTISED:
        quantise(folder, folder)
    save_tokenizer(folder, TOKENIZER_KINDS.get(family, "byte-level"))
    return folder


def quantise(
    source: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, kept: Sequence[str] = KEPT
) -> None:
    """Saves a model in NF4 as bitsandbytes does, with the modules `kept` in `dtype`."""
    config = quantization(dtype)
    config.llm_int8_skip_modules = [*kept]
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
    for file in source.glob("model*.safetensors") if source == folder else ():
        file.unlink()
    model.save_pretrained(folder)
