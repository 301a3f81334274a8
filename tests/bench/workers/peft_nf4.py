"""HF + peft on bitsandbytes' NF4: one batch of several adapters through `adapter_names`.

python peft_nf4.py MODEL ADAPTERS NAME...
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StoppingCriteria

from bench.workers.protocol import Generate, serve

_BASE = "__base__"  # peft's word for no adapter


class _Clock(StoppingCriteria):
    """Is asked after every token whether to stop; never does, and notes when it was."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        self.seconds.append(time.perf_counter() - self.began)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load() -> Generate:
    model_folder, adapters, *names = sys.argv[1:]
    base = AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model: PeftModel | None = None
    for name in names:
        folder = Path(adapters) / name
        # Without the cast to float32 that is meant for training: bfloat16 is the faster of the two.
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, name, autocast_adapter_dtype=False)
    assert model is not None
    model.eval()

    def generate(prompts: list[list[int]], wanted: list[str | None], max_tokens: int) -> list[list[float]]:
        input_ids = torch.tensor(prompts)
        clock = _Clock()
        with torch.inference_mode():
            model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                adapter_names=[name or _BASE for name in wanted],
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[clock],
            )
        return [clock.seconds] * len(prompts)

    return generate


if __name__ == "__main__":
    serve(load)
