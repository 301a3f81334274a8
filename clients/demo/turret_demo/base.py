"""The demo's base model: a small Llama with grouped-query attention and its own byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from turret_adapters.training.train import encode_batch
from turret_demo.tasks import make_base_examples

STEPS = 300

_BATCH_SIZE = 64
_MATRIX_LEARNING_RATE = 0.02
_LEARNING_RATE = 5e-3
_WARMUP_STEPS = 20
_DECAY_PART = 0.6
_PAD, _BEGIN, _END = _SPECIAL_TOKENS = "<pad>", "<s>", "</s>"
_MAX_VOCABULARY = 4096
_TOKENIZER_EXAMPLES = 8192


def train_base(folder: Path, seed: int, on_step: Callable[[int, float], None]) -> int:
    """Train for `STEPS` steps, save model and tokenizer to `folder`; returns the number of parameters."""
    torch.manual_seed(seed)
    examples = make_base_examples(STEPS * _BATCH_SIZE, seed)
    tokenizer = _tokenizer(prompt + completion for prompt, completion in examples[:_TOKENIZER_EXAMPLES])
    model = _model(tokenizer)
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_part) for optimizer in optimizers]
    model.train()
    for step in range(STEPS):
        batch = encode_batch(tokenizer, examples[step * _BATCH_SIZE : (step + 1) * _BATCH_SIZE])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        on_step(step + 1, loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, tokenizer.token_to_id(_BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, bos_token=_BEGIN, eos_token=_END, padding_side="left"
    )


def _model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices: with AdamW alone the base needs over three times as many steps."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=_MATRIX_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _rate_part(step: int) -> float:
    return min(1.0, (step + 1) / _WARMUP_STEPS, (STEPS - step) / (STEPS * _DECAY_PART))
