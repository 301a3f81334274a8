"""What peft says: the same NF4 base, one request at a time, Hugging Face's own attention."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, DynamicCache

from support.models import auto_class
from turret_server.model.load import quantization

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompts, each with what was generated after it."""


class Oracle:
    """`adapters` are folders by name; a composition is asked for with the names in it. `vocabularies` are the
    sizes of those that were trained with resized embeddings.
    """

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path],
        dtype: torch.dtype = torch.float32,
        vocabularies: Mapping[str, int] | None = None,
    ) -> None:
        self._base = base
        self._dtype = dtype
        self._adapters = adapters
        self._vocabularies = vocabularies or {}

    def logits(
        self, adapter: str | None, sequences: Sequences, *, task: int | None = None
    ) -> list[torch.Tensor]:
        """The logits before every generated token, [generated, vocabulary]."""
        model = self._load() if adapter is None else self._with(self._load(), adapter)
        return _run(self._exact(model), sequences, {} if task is None else {"task_ids": torch.tensor([task])})

    def composed(self, weights: Mapping[str, float], sequences: Sequences) -> list[torch.Tensor]:
        """Of LoRAs that peft concatenates, each with its weight."""
        first, *others = weights
        model = self._with(self._load(), first)
        for name in others:
            model.load_adapter(self._adapters[name], name)
        model.add_weighted_adapter(
            ["default", *others], list(weights.values()), "together", combination_type="cat"
        )
        model.set_adapter("together")
        return _run(self._exact(model), sequences, {})

    def prefixed(self, prefixes: Sequence[str], lora: str | None, sequences: Sequences) -> list[torch.Tensor]:
        """Of prefixes that stand before the prompt, one after another, perhaps with a LoRA: keys and values,
        or embeddings that the model computes after those before.
        """
        model = self._load()
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        files = [load_file(self._adapters[name] / "adapter_model.safetensors") for name in prefixes]
        prefixes_NX = [file["prompt_embeddings"].to(self._dtype) for file in files]
        if lora:
            model = self._with(model, lora)
        model = self._exact(model)
        found = []
        for sequence in sequences:
            cache = DynamicCache(config=config)
            for rows_NX in prefixes_NX:
                if rows_NX.shape[1] == config.hidden_size:
                    with torch.inference_mode():
                        model(inputs_embeds=rows_NX[None], past_key_values=cache)
                    continue
                kv = rows_NX.view(len(rows_NX), -1, 2, kv_heads, head_dim).permute(1, 2, 3, 0, 4)[:, :, None]
                for layer, (key, value) in enumerate(kv):
                    cache.update(key, value, layer)
            num_before = sum(map(len, prefixes_NX))
            found += _run(model, [sequence], {"past_key_values": cache}, num_before=num_before)
        return found

    def _load(self) -> torch.nn.Module:
        options = {"quantization_config": quantization(self._dtype)}
        config = AutoConfig.from_pretrained(self._base)
        if hasattr(config, "quantization_config"):
            options = {}
        model = auto_class(config).from_pretrained(
            self._base,
            **options,
            dtype=self._dtype,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        for module in model.modules():
            if isinstance(module, Linear4bit):  # a checkpoint in NF4 keeps the dtype in which it was saved
                module.compute_dtype = module.weight.quant_state.dtype = self._dtype
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self._dtype)
            if parameter.ndim == 3:  # stacked experts, which bitsandbytes leaves as they are
                for expert in parameter.data:
                    expert.copy_(_through_nf4(expert))
        return model

    def _with(self, model: torch.nn.Module, adapter: str) -> PeftModel:
        if vocab_size := self._vocabularies.get(adapter):
            model.resize_token_embeddings(vocab_size, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, self._adapters[adapter])

    def _exact(self, model: torch.nn.Module) -> torch.nn.Module:
        if self._dtype == torch.float32:
            # bitsandbytes would compute in bfloat16 on some CPUs even so.
            for module in model.modules():
                if isinstance(module, Linear4bit):
                    module.support_avx512bf16_for_cpu = False
        return model.eval()


def _through_nf4(weight: torch.Tensor) -> torch.Tensor:
    data, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(data, state)


def _run(
    model: torch.nn.Module, sequences: Sequences, inputs: dict[str, Any], num_before: int = 0
) -> list[torch.Tensor]:
    found = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for prompt, generated in sequences:
            token_ids = torch.tensor([[*prompt, *generated]])
            mask = torch.ones(1, num_before + token_ids.shape[1], dtype=torch.long)
            logits = model(input_ids=token_ids, attention_mask=mask, **inputs).logits[0]
            found.append(logits[-len(generated) - 1 : -1].float())
    return found
