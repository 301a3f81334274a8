"""Every decoder and encoder of transformers, small and random: computed right, or refused by name.

Types whose configuration does not become small with the usual names of sizes are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from support.encoders import TaskOracle
from support.oracle import Oracle
from support.tokenizers import VOCAB_SIZE, save_tokenizer
from turret_server.errors import UnsupportedModelError
from turret_server.kernels import ReferenceOps
from turret_server.model.arena import Arena
from turret_server.model.classes import is_encoder
from turret_server.model.load import load_model
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

CPU = torch.device("cpu")
MAX_PARAMETERS = 30_000_000
# Under all the names that configurations have for them.
SIZES: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FEW = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")


def candidates(model_type: str) -> Iterator[dict[str, Any]]:
    known = AutoConfig.for_model(model_type).to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    yield sizes
    yield {name: value for name, value in sizes.items() if name != "head_dim"}
    yield {name: sizes[name] for name in FEW if name in sizes}
    yield {"num_hidden_layers": 2}


def small(model_type: str, auto: Any) -> PreTrainedConfig:
    try:
        tries = [*candidates(model_type)]
    except StrictDataclassError as error:
        pytest.skip(f"its default configuration is invalid: {error}")
    why = ""
    for sizes in tries:
        try:
            config = AutoConfig.for_model(model_type, **sizes)
            with torch.device("meta"):
                model = auto.from_config(config)
        except Exception as error:  # noqa: BLE001 -- each type has its own
            why = f"{type(error).__name__}: {error}"
            continue
        number = sum(parameter.numel() for parameter in model.parameters())
        if number <= MAX_PARAMETERS:
            return config
        why = f"{number} parameters"
    pytest.skip(f"not small: {why}")


def save(config: PreTrainedConfig, auto: Any, folder: Path) -> None:
    torch.manual_seed(0)
    model = auto.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(12.0 if VOCAB_SIZE in parameter.shape else 3.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def check(config: PreTrainedConfig, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
    refusal = None
    try:
        found, expected = compute()
    except UnsupportedModelError as error:
        refusal = error
    if refusal is None:
        assert (found - expected).abs().max() < 1e-3 * expected.std()
    else:
        assert str(refusal).startswith(f"{config.model_type} models are not supported: ")
        assert refusal.metadata == {"model": config.model_type}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_type_is_computed_as_by_transformers_or_refused_by_name(model_type, tmp_path):
    config = small(model_type, AutoModelForCausalLM)
    if is_encoder(config):
        pytest.skip("it is computed as an encoder")
    save(config, AutoModelForCausalLM, tmp_path / "model")
    check(config, lambda: logits(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_FOR_MASKED_LM_MAPPING_NAMES)
def test_an_encoder_is_computed_as_by_transformers_or_refused_by_name(model_type, tmp_path):
    config = small(model_type, AutoModel)
    if not is_encoder(config):
        pytest.skip("it is no encoder")
    save(config, AutoModel, tmp_path / "model")
    check(config, lambda: states(tmp_path))


def running(folder: Path) -> ModelRunner:
    loaded = load_model(
        str(folder / "model"), device=CPU, dtype=torch.float32, cache=folder / "cache", ops=ReferenceOps()
    )
    page = Arena(loaded.base, 1, dtype=loaded.dtype, device=CPU).page_bytes
    runner = ModelRunner(
        loaded, Arena(loaded.base, 16 * page, dtype=loaded.dtype, device=CPU), None, Sampler()
    )
    runner.check()
    return runner


def prompt_of(runner: ModelRunner) -> list[int]:
    random = torch.Generator().manual_seed(1)
    return torch.randint(3, min(300, runner._loaded.vocab_size), (45,), generator=random).tolist()


def logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a prompt's second half, computed in a second step, and those of transformers."""
    runner = running(folder)
    prompt = prompt_of(runner)
    runner._all_logits([prompt], [slice(0, 25)])
    found_TV, _ = runner._all_logits([prompt], [slice(25, 45)])
    [expected_TV] = Oracle(folder / "model", {}).logits(None, [(prompt[:26], prompt[26:])])
    return found_TV[:-1], expected_TV


def states(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states of a text, computed after another, and those of transformers."""
    runner = running(folder)
    text = prompt_of(runner)
    found_TE, _ = runner._all_logits([text[:9], text])
    [expected_TE] = TaskOracle(folder / "model").numbers("FEATURE_EXTRACTION", None, [text])
    return found_TE[9:], expected_TE
