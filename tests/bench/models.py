"""Makes models and adapters, once: Llamas of random weights for Hugging Face's code, adapters for peft's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice, product
from pathlib import Path
from zlib import crc32

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, TaskType
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bench.layout import MAX_CONTEXT, PREFIX, PREFIX_TOKENS, RANKS, VOCAB_SIZE, Shape

_STD = 0.02


def make_model(shape: Shape) -> None:
    """Make the model, if it is not there. A folder gets its name when it is whole."""
    _ensure(shape.model, partial(_save_model, shape))


def make_models(shape: Shape) -> None:
    """Make the model and the adapters that are not there, a prefix last."""
    make_model(shape)
    for name, rank in RANKS.items():
        _ensure(shape.adapters / name, partial(_save_lora, shape, rank))
    _ensure(shape.adapters / PREFIX, partial(_save_prefix, shape))


def _ensure(folder: Path, make: Callable[[Path], None]) -> None:
    if folder.exists():
        return
    unfinished = folder.parent.parent / f"unfinished-{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # So that it is the same adapter whenever it is made, and unlike the others.
    torch.manual_seed(crc32(folder.name.encode()))
    make(unfinished)
    unfinished.rename(folder)


def _save_model(shape: Shape, folder: Path) -> None:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=MAX_CONTEXT,
        dtype="bfloat16",
        bos_token_id=0,
        # No text ends early: every system generates the same number of tokens.
        eos_token_id=None,
    )
    config.save_pretrained(folder)
    hidden = shape.hidden_size
    tensors = {
        "model.embed_tokens.weight": _random(VOCAB_SIZE, hidden),
        "lm_head.weight": _random(VOCAB_SIZE, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        for name, (inputs, outputs) in shape.linears.items():
            tensors[f"{at}.{name}.weight"] = _random(outputs, inputs)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    """Bytes, and pairs of bytes until the vocabulary is full: every token id can be decoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(product(alphabet, alphabet), VOCAB_SIZE - len(alphabet) - 1))
    words = ["<s>", *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)


def _save_lora(shape: Shape, rank: int, folder: Path) -> None:
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=rank,
        # Their names rather than "all-linear", which the converter of llama.cpp does not need to know.
        target_modules=sorted(name.rpartition(".")[2] for name in shape.linears),
    )
    tensors = {}
    for layer in range(shape.num_layers):
        for name, (inputs, outputs) in shape.linears.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = _random(rank, inputs)
            tensors[f"{at}.lora_B.weight"] = _random(outputs, rank)
    _save_adapter(shape, config, tensors, folder)


def _save_prefix(shape: Shape, folder: Path) -> None:
    width = shape.num_kv_heads * shape.head_dim
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=PREFIX_TOKENS,
        token_dim=width,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_kv_heads,
        num_transformer_submodules=1,
    )
    tensors = {"prompt_embeddings": _random(PREFIX_TOKENS, 2 * shape.num_layers * width)}
    _save_adapter(shape, config, tensors, folder)


def _save_adapter(shape: Shape, config: PeftConfig, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    config.base_model_name_or_path = str(shape.model)
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _random(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16).normal_(std=_STD)
