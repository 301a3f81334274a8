"""Adapters that real peft makes and saves, with random weights whose effect is plain."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    TaskType,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from support.models import MIXTURES, MULTIMODAL, VOCAB_SIZE, Names, auto_class, names_of

# The sizes of vocabularies that adapters were trained with.
VOCABULARIES = {
    **{f"vocabulary-{what}": VOCAB_SIZE + 3 for what in ("added", "trained", "lora", "tokens", "prompt")},
    "vocabulary-removed": VOCAB_SIZE - 10,
}
INVOCATION = (40, 41, 42)
NUM_TASKS = 3

_TASK = {"task_type": TaskType.CAUSAL_LM}


def _lora(names: Names, **options: Any) -> LoraConfig:
    targets = [*names.attention, *names.mlp_in, *names.mlp_out]
    defaults = {"r": 5, "lora_alpha": 10, "target_modules": targets, "init_lora_weights": False}
    return LoraConfig(**{**defaults, **_TASK, **options})


def _p_tuning(kind: str) -> PeftConfig:
    return PromptEncoderConfig(
        num_virtual_tokens=9,
        encoder_reparameterization_type=PromptEncoderReparameterizationType[kind],
        encoder_hidden_size=32,
        **_TASK,
    )


# Lengths of virtual tokens on both sides of a block of 16, and ranks that fill no page.
KINDS: dict[str, Callable[[Names], PeftConfig]] = {
    "lora": _lora,
    "lora-attention": lambda n: _lora(n, r=3, target_modules=list(n.attention)),
    "lora-all-linear": lambda n: _lora(n, target_modules="all-linear"),
    "lora-regex": lambda n: _lora(n, target_modules=rf".*\.1\..*({'|'.join(n.attention)})"),
    "lora-layers": lambda n: _lora(n, layers_to_transform=[0, 2]),
    "lora-fp16": _lora,
    "lora-bf16": _lora,
    "rslora": lambda n: _lora(
        n,
        r=8,
        use_rslora=True,
        rank_pattern={n.attention[0]: 2},
        alpha_pattern={(n.mlp_out or n.attention)[0]: 4},
    ),
    "dora": lambda n: _lora(n, use_dora=True),
    "dora-embedding": lambda n: _lora(n, use_dora=True, target_modules=[n.attention[0], n.embedding]),
    "lora-bias": lambda n: _lora(n, lora_bias=True),
    # "all" would be also those of the towers.
    "lora-trains-biases": lambda n: _lora(n, bias="lora_only" if n.excluded else "all"),
    "lora-embedding-head": lambda n: _lora(n, target_modules=[n.attention[0], n.embedding, n.head]),
    "modules-to-save": lambda n: _lora(n, modules_to_save=[n.embedding, n.head, *n.norms]),
    "trainable-tokens": lambda n: _lora(n, trainable_token_indices={n.embedding: [5, 50, 100]}),
    "trainable-tokens-adapted-head": lambda n: _lora(
        n, trainable_token_indices={n.embedding: [5, 50, 100]}, target_modules=[n.attention[0], n.head]
    ),
    "embeddings-saved": _lora,
    "embeddings-trained": _lora,
    "embeddings-trained-lora": lambda n: _lora(n, target_modules=[n.attention[0], n.embedding, n.head]),
    "embeddings-trained-whole": lambda n: _lora(n, modules_to_save=[n.embedding, n.norms[0]]),
    "embeddings-trained-tokens": lambda n: _lora(n, trainable_token_indices={n.embedding: [5, 50, 100]}),
    **{
        f"vocabulary-{what}": make
        for what, make in {
            "added": lambda n: _lora(n, target_modules=list(n.attention)),
            "trained": lambda n: _lora(
                n, target_modules=list(n.attention), modules_to_save=[n.embedding, n.head]
            ),
            "lora": lambda n: _lora(n, target_modules=[n.attention[0], n.embedding, n.head]),
            "tokens": lambda n: _lora(n, trainable_token_indices={n.embedding: [5, VOCAB_SIZE + 1]}),
            "prompt": lambda _: PromptTuningConfig(num_virtual_tokens=3, **_TASK),
            "removed": lambda n: _lora(n, target_modules=list(n.attention)),
        }.items()
    },
    "alora": lambda n: _lora(n, alora_invocation_tokens=list(INVOCATION)),
    "adalora": lambda n: AdaLoraConfig(
        init_r=6, target_r=4, total_step=10, target_modules=[*n.attention, *n.mlp_out], **_TASK
    ),
    "vera": lambda n: VeraConfig(
        r=16,
        target_modules=rf".*language_model.*({'|'.join(n.attention)})" if n.excluded else list(n.attention),
        **_TASK,
    ),
    "ia3": lambda n: IA3Config(
        target_modules=[*n.attention, *n.mlp_out], feedforward_modules=list(n.mlp_out), **_TASK
    ),
    "ln-tuning": lambda n: LNTuningConfig(target_modules=list(n.norms), **_TASK),
    "trainable-tokens-alone": lambda n: TrainableTokensConfig(
        token_indices=[*range(60, 160)], target_modules=[n.embedding], **_TASK
    ),
    "prefix": lambda _: PrefixTuningConfig(
        num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=32, **_TASK
    ),
    "p-tuning-v2": lambda _: PrefixTuningConfig(num_virtual_tokens=20, **_TASK),
    "prompt": lambda _: PromptTuningConfig(num_virtual_tokens=16, **_TASK),
    "embeddings-trained-prompt": lambda _: PromptTuningConfig(num_virtual_tokens=3, **_TASK),
    "p-tuning": lambda _: _p_tuning("LSTM"),
    "p-tuning-mlp": lambda _: _p_tuning("MLP"),
    "multitask": lambda _: MultitaskPromptTuningConfig(
        num_virtual_tokens=6, num_tasks=NUM_TASKS, num_ranks=2, **_TASK
    ),
}
MIXTURE_KINDS: dict[str, Callable[[Names], PeftConfig]] = {
    "lora-experts": lambda n: _lora(
        n, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "lora-experts-down": lambda n: _lora(
        n, r=3, target_modules=[], target_parameters=["down_proj"], use_rslora=True
    ),
    "lora-experts-apart": _lora,
    "lora-experts-ranks": lambda n: _lora(
        n,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"gate_up_proj": 7},
        alpha_pattern={r"layers\.1\..*down_proj": 20},
    ),
}
# As transformers 4 names experts, each of whose linears has a pair: the first two, the last, and where.
APART = {
    "mixtral": ("w1", "w3", "w2", "block_sparse_moe"),
    "qwen3-moe": ("gate_proj", "up_proj", "down_proj", "mlp"),
}
_DTYPES = {"lora-fp16": torch.float16, "lora-bf16": torch.bfloat16}


def kinds_of(family: str) -> dict[str, Callable[[Names], PeftConfig]]:
    if family in MULTIMODAL:  # where peft does not notice that embeddings were resized, and leaves them out
        unsaved = {f"vocabulary-{what}" for what in ("added", "tokens", "prompt", "removed")}
        return {kind: make for kind, make in KINDS.items() if kind not in unsaved}
    return KINDS | MIXTURE_KINDS if family in MIXTURES else KINDS


def save_adapter(kind: str, family: str, base: Path, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    if kind == "lora-experts-apart":
        return save_apart(family, base, folder)
    with warnings.catch_warnings():
        # peft says that embeddings are saved, that biases are trained, that DoRA is slow.
        warnings.simplefilter("ignore")
        config = kinds_of(family)[kind](names_of(family))
        if names_of(family).excluded and hasattr(config, "exclude_modules"):
            config.exclude_modules = names_of(family).excluded
        base_model = auto_class(AutoConfig.from_pretrained(base)).from_pretrained(base)
        if "-trained" in kind:
            _train_embeddings(base_model)
        if kind in VOCABULARIES:
            base_model.resize_token_embeddings(VOCABULARIES[kind], mean_resizing=False)
        model = get_peft_model(base_model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    _randomise(name, parameter)
        if kind in _DTYPES:
            model.to(_DTYPES[kind])
        model.save_pretrained(folder, save_embedding_layers=kind.startswith("embeddings-") or "auto")
    return folder


def save_apart(family: str, base: Path, folder: Path, without: Collection[str] = (), **fields: Any) -> Path:
    """A LoRA as peft with transformers 4 saves it, which stacks no experts: of all linears but `without`."""
    config = AutoConfig.from_pretrained(base)
    *linears, block = APART[family]
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    hidden, experts, rank = config.hidden_size, range(config.num_local_experts), 4
    shapes = dict.fromkeys(linears[:2], (hidden, inner)) | {linears[2]: (inner, hidden)}
    shapes = {f"experts.{expert}.{name}": shapes[name] for expert in experts for name in linears} | {
        "gate": (hidden, len(experts))
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (in_features, out_features) in shapes.items():
            if name.rpartition(".")[2] not in without:
                key = f"base_model.model.model.layers.{layer}.{block}.{name}"
                tensors[f"{key}.lora_A.weight"] = 0.2 * torch.randn(rank, in_features)
                tensors[f"{key}.lora_B.weight"] = 0.2 * torch.randn(out_features, rank)
    targets = sorted({*linears, "gate"} - set(without))
    saved = LoraConfig(r=rank, lora_alpha=8, target_modules=targets, **_TASK).to_dict()
    saved |= {"target_modules": targets, **fields}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(saved, default=str))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _train_embeddings(model: PreTrainedModel) -> None:
    """Changes the embedding and the head, as a training of the whole model before the adapter's does."""
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.add_(0.3 * module.weight.std() * torch.randn_like(module.weight))


def _randomise(name: str, parameter: torch.nn.Parameter) -> None:
    if "prompt_encoder" in name:
        parameter.normal_(std=0.5)
    elif any(part in name for part in ("lora_A", "lora_B", "lora_embedding", "lora_E", "vera_lambda")):
        parameter.normal_(std=0.2)
    elif "ia3_l" in name or "magnitude" in name:
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    else:  # copies of the base's own parameters
        parameter.add_(0.3 * max(float(parameter.std()), 0.3) * torch.randn_like(parameter))
