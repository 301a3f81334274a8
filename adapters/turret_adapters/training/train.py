"""Training adapters with peft, one recipe for each method.

The loss is taken over the completion and the end-of-sequence token that follows it, never over the prompt.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import bitsandbytes
import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

Example: TypeAlias = tuple[str, str]
"""A prompt and its completion."""

_IGNORED_LABEL = -100  # transformers leaves these out of the loss
_WARMUP_PART = 0.05
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train one adapter: peft's type with the fields of its config, and the optimisation.

    `nf4_base` requires a base in NF4 with double quantisation (`load_base`), which turns LoRA into QLoRA, and
    an optimiser with paged state on devices that have one.
    """

    peft_type: Literal["LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"]
    config: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float
    steps: int
    batch_size: int
    nf4_base: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """The result of a training. `seconds` and memory are those of the optimisation, without loading the base.

    `peak_memory_bytes` is the growth during the optimisation: of the device's memory on CUDA, of the
    process's resident memory on Linux, None elsewhere.
    """

    trainable_parameters: int
    seconds: float
    peak_memory_bytes: int | None
    final_loss: float


def load_base(folder: Path, *, nf4: bool) -> PreTrainedModel:
    """Loads a saved model, on CUDA if available; with `nf4` every linear but `lm_head` is quantised."""
    has_cuda = torch.cuda.is_available()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if has_cuda else torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map="cuda:0" if has_cuda else "cpu",
        quantization_config=quantization if nf4 else None,
    )


def train_adapter(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    recipe: Recipe,
    out_dir: Path,
    *,
    early: Mapping[int, Path] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainReport:
    """Trains a new adapter on `base` and saves it to `out_dir` in peft's format.

    `base` is changed and not usable for another adapter. `early` maps numbers of steps to folders in which to
    save the adapter after that step; `on_step` is called with the number of each step, from 1, and its loss.

    Raises:
        ValueError: `recipe.nf4_base` contradicts `base`, or peft refuses the recipe's config.
    """
    if recipe.nf4_base != getattr(base, "is_loaded_in_4bit", False):
        raise ValueError(f"nf4_base: expected a base loaded with nf4={recipe.nf4_base}, found the other kind")
    torch.manual_seed(recipe.seed)
    model = _with_new_adapter(base, recipe)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trainable[0].device
    batches = _batches(tokenizer, examples, recipe)
    loss_value = float("nan")

    peak_memory = _PeakMemory(device)
    started = time.perf_counter()
    optimizer = _optimizer(trainable, recipe, device)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(recipe.steps * _WARMUP_PART), recipe.steps)
    model.train()
    for step, batch in enumerate(batches, start=1):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, _MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss_value = loss.item()
        if on_step:
            on_step(step, loss_value)
        if early and step in early:
            model.save_pretrained(early[step])
    seconds = time.perf_counter() - started
    peak_memory_bytes = peak_memory.growth()

    model.save_pretrained(out_dir)
    return TrainReport(
        trainable_parameters=sum(parameter.numel() for parameter in trainable),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes,
        final_loss=loss_value,
    )


def encode_batch(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each [examples, longest], padded on the right."""
    prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
    completions = tokenizer([completion for _, completion in examples], add_special_tokens=False)["input_ids"]
    rows = [
        (prompt, [*completion, tokenizer.eos_token_id])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    shape = (len(rows), max(len(prompt) + len(completion) for prompt, completion in rows))
    input_ids = torch.full(shape, tokenizer.eos_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, _IGNORED_LABEL)
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        labels[row, start:end] = torch.tensor(completion)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _with_new_adapter(base: PreTrainedModel, recipe: Recipe) -> peft.PeftModel:
    config = {"peft_type": recipe.peft_type, "task_type": "CAUSAL_LM", **recipe.config}
    with warnings.catch_warnings():
        # peft 0.21 uses a name that transformers 5 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if recipe.nf4_base:
            base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        return peft.get_peft_model(base, peft.get_peft_config(config))


def _optimizer(
    trainable: list[torch.nn.Parameter], recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    pages = recipe.nf4_base and device.type == "cuda"
    adamw = bitsandbytes.optim.PagedAdamW if pages else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = adamw(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    return optimizer


def _batches(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], recipe: Recipe
) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.steps):
        chosen = torch.randint(len(examples), (recipe.batch_size,), generator=generator)
        yield encode_batch(tokenizer, [examples[index] for index in chosen.tolist()])


class _PeakMemory:
    """Measures the largest growth of memory since its creation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _reset_peak_resident_bytes()

    def growth(self) -> int | None:
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        # The system counts resident pages in batches, so the peak may lag behind by a few.
        return max(_peak_resident_bytes() - self._before, 0)


def _reset_peak_resident_bytes() -> int | None:
    """Resets the peak and returns the resident bytes; None if the system has no such reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak becomes the current value
    except OSError:
        return None
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024
