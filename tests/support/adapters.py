"""Adapters that real peft makes and saves, with random weights whose effect is plain."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

_ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_TASK = {"task_type": TaskType.CAUSAL_LM}

# Lengths of virtual tokens on both sides of a block of 16, and ranks that fill no page.
KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=5, lora_alpha=10, target_modules=_ALL_LINEAR, init_lora_weights=False, **_TASK),
    "lora-attention": LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **_TASK
    ),
    "rslora": LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 4},
        target_modules=_ALL_LINEAR,
        init_lora_weights=False,
        **_TASK,
    ),
    "prefix": PrefixTuningConfig(
        num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=32, **_TASK
    ),
    "p-tuning-v2": PrefixTuningConfig(num_virtual_tokens=20, **_TASK),
    "prompt": PromptTuningConfig(num_virtual_tokens=16, **_TASK),
    "p-tuning": PromptEncoderConfig(
        num_virtual_tokens=9,
        encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM,
        encoder_hidden_size=32,
        **_TASK,
    ),
}


def save_adapter(kind: str, base: Path, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(KINDS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
            elif "prompt_encoder" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder
