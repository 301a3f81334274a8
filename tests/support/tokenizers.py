"""Small tokenizers of the kinds that models have, by the way in which they decode."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 320
_WORDS = "the quick brown fox jumps over the lazy dog and the other fox there then these those other"
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """Like GPT-2's, Llama 3's and Qwen's: a token is bytes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*_SPECIAL.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS] * 4, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Llama 2's and Mistral's: words begin with ▁, characters without a token are byte tokens."""
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *_SPECIAL.values()]
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=special, show_progress=False)
    trained.train_from_iterator(_WORDS.split(), trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"] | {token: len(model["vocab"]) + index for index, token in enumerate(_BYTES)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Like T5's and ALBERT's: words begin with ▁, characters without a token are unknown."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", *_SPECIAL.values()],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS] * 4, trainer)
    return tokenizer


TOKENIZERS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "metaspace": metaspace}


def make_tokenizer(kind: str = "byte-level") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind](), **_SPECIAL)


def save_tokenizer(folder: Path, kind: str = "byte-level") -> None:
    make_tokenizer(kind).save_pretrained(folder)
