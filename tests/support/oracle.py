"""What peft says: the same NF4 base, one request at a time, Hugging Face's own attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

from turret_server.model.load import quantization


class Oracle:
    def __init__(self, base: Path, adapters: Mapping[str, Path], dtype: torch.dtype = torch.float32) -> None:
        self._base = base
        self._dtype = dtype
        self._adapters = adapters

    def _model(self, adapter: str | None) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(
            self._base,
            quantization_config=quantization(self._dtype),
            dtype=self._dtype,
            attn_implementation="eager",
        )
        if adapter is not None:
            model = PeftModel.from_pretrained(model, self._adapters[adapter])
        if self._dtype == torch.float32:
            # bitsandbytes would compute in bfloat16 on some CPUs even so.
            for module in model.modules():
                if isinstance(module, Linear4bit):
                    module.support_avx512bf16_for_cpu = False
        return model.eval()

    def logits(
        self, adapter: str | None, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[torch.Tensor]:
        """For each (prompt, generated): the logits before every generated token, [generated, vocabulary]."""
        model = self._model(adapter)
        found = []
        with torch.inference_mode():
            for prompt, generated in sequences:
                token_ids = torch.tensor([[*prompt, *generated]])
                logits = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).logits[0]
                found.append(logits[-len(generated) - 1 : -1].float())
        return found
