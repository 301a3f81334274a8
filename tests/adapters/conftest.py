"""Tiny random models, adapters that peft itself saves for them, and files written by hand to be broken."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from turret_adapters.host import BaseWeights, HostAdapter
from turret_adapters.spec import BaseSpec, ModuleKind, ModuleShape
from turret_adapters.store.store import AdapterStore

# No two widths are alike, so that a mistaken one is seen: hidden 32, query 48, key-value 24, MLP 40.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 12}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    # Biases in query, key and value, and scaled embeddings of whoever.
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": False}),
    # Biases everywhere but in the head.
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    # A bias in the head, too.
    "phi": ("PhiConfig", "PhiForCausalLM", SIZES),
    # Weights stored [in, out].
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}),
}


class Weights:
    """A model's weights, as the server hands them out."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def weight(self, module: str) -> torch.Tensor:
        found = self._model.get_submodule(module)
        weight = found.weight.detach().float()
        return weight.t() if type(found).__name__ == "Conv1D" else weight

    def bias(self, module: str) -> torch.Tensor | None:
        bias = getattr(self._model.get_submodule(module), "bias", None)
        return None if bias is None else bias.detach().float()


@dataclass(frozen=True)
class Saved:
    folder: Path
    model: Any


@dataclass(frozen=True)
class Files:
    """What stands in an adapter's two files; a test changes one thing and writes them."""

    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.fields))
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder


@contextmanager
def _warnings_of_peft() -> Iterator[None]:
    """peft 0.21 calls what transformers 5 deprecates, and warns of configs that we want to see saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a loaded machine, threads wait for one another longer than they compute on tiny matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _shape(model: Any, module: Any) -> ModuleShape | None:
    has_bias = getattr(module, "bias", None) is not None
    if module is model.get_output_embeddings():
        return ModuleShape(
            kind=ModuleKind.HEAD,
            in_features=module.in_features,
            out_features=module.out_features,
            has_bias=has_bias,
        )
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        conv = not isinstance(module, nn.Linear)
        return ModuleShape(
            kind=ModuleKind.LINEAR,
            in_features=module.nx if conv else module.in_features,
            out_features=module.nf if conv else module.out_features,
            has_bias=has_bias,
        )
    if module is model.get_input_embeddings():
        return ModuleShape(
            kind=ModuleKind.EMBEDDING, in_features=module.num_embeddings, out_features=module.embedding_dim
        )
    if "Norm" in type(module).__name__:
        (width,) = module.weight.shape
        return ModuleShape(kind=ModuleKind.NORM, in_features=width, out_features=width, has_bias=has_bias)
    return None


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], Any]:
    """A random model of a family, the same numbers each time, the test's own copy."""
    import transformers  # noqa: PLC0415 -- not for tests without it

    @functools.cache
    def made(family: str) -> Any:
        config_class, model_class, sizes = FAMILIES[family]
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name or "ln_" in name:
                    parameter.normal_()
        return model

    return lambda family: copy.deepcopy(made(family))


@pytest.fixture(scope="session")
def base_of_family(make_model: Callable[[str], Any]) -> Callable[[str], BaseSpec]:
    """As the server describes it."""

    @functools.cache
    def base(family: str) -> BaseSpec:
        model = make_model(family)
        config = model.config
        shapes = {name: _shape(model, module) for name, module in model.named_modules()}
        return BaseSpec(
            name_or_path=f"tiny-{family}",
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            modules={name: shape for name, shape in shapes.items() if shape is not None},
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    return base


@pytest.fixture(scope="session")
def base(base_of_family: Callable[[str], BaseSpec]) -> BaseSpec:
    return base_of_family("llama")


@pytest.fixture(scope="session")
def weights(make_model: Callable[[str], Any]) -> BaseWeights:
    return Weights(make_model("llama"))


@pytest.fixture(scope="session")
def weights_of_family(make_model: Callable[[str], Any]) -> Callable[[str], BaseWeights]:
    return functools.cache(lambda family: Weights(make_model(family)))


@pytest.fixture(scope="session")
def save(make_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """Saves an adapter as peft makes it or, with a seed, with every trained number random. With `embeddings`
    the embedding and the head are saved, too: those of the base ("saved"), or changed ones ("trained"). With
    `vocab_size` they are resized first.
    """
    from peft import get_peft_model  # noqa: PLC0415 -- not for tests without it

    def save(
        config: Any,
        *,
        dtype: torch.dtype = torch.float32,
        family: str = "llama",
        seed: int | None = None,
        embeddings: str = "",
        vocab_size: int | None = None,
    ) -> Saved:
        torch.manual_seed(1)
        with _warnings_of_peft():
            model = make_model(family).to(dtype)
            if vocab_size:
                model.resize_token_embeddings(vocab_size, mean_resizing=False)
            if embeddings == "trained":
                with torch.no_grad():
                    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                        for parameter in module.parameters():
                            parameter.add_(torch.randn_like(parameter))
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
            model = model.to(dtype).eval()
            if seed is not None:
                torch.manual_seed(seed)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        nn.init.normal_(parameter)
            folder = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(str(folder), save_embedding_layers=bool(embeddings) or "auto")
        return Saved(folder, model)

    return save


@pytest.fixture(scope="session")
def load(make_model: Callable[[str], Any]) -> Callable[..., Any]:
    """Loads an adapter as peft's users do."""
    from peft import PeftModel  # noqa: PLC0415 -- not for tests without it

    def load(folder: Path, *, family: str = "llama", vocab_size: int | None = None) -> Any:
        with _warnings_of_peft():
            model = make_model(family)
            if vocab_size:
                model.resize_token_embeddings(vocab_size, mean_resizing=False)
            return PeftModel.from_pretrained(model, str(folder)).eval()

    return load


@pytest.fixture(scope="session")
def read_as_peft(
    load: Callable[..., Any],
    make_model: Callable[[str], Any],
    base_of_family: Callable[[str], BaseSpec],
    weights_of_family: Callable[[str], BaseWeights],
) -> Callable[..., HostAdapter]:
    """Reads an adapter, and compares every module of the base with peft's."""
    from support.peft_modules import check  # noqa: PLC0415 -- not for tests without peft
    from turret_adapters.formats.peft import read_adapter  # noqa: PLC0415

    def read(folder: Path, family: str = "llama") -> HostAdapter:
        base, weights = base_of_family(family), weights_of_family(family)
        found = read_adapter(folder, base, weights)
        check(found, base, weights, make_model(family), load(folder, family=family))
        return found

    return read


def _files(saved: Saved) -> Files:
    return Files(
        json.loads((saved.folder / "adapter_config.json").read_text()),
        load_file(saved.folder / "adapter_model.safetensors"),
    )


@pytest.fixture(scope="session")
def _sound_files(save: Callable[..., Saved]) -> dict[str, Files]:
    from peft import (  # noqa: PLC0415 -- not for tests without it
        AdaLoraConfig,
        IA3Config,
        LNTuningConfig,
        LoraConfig,
        MultitaskPromptTuningConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        TrainableTokensConfig,
        VeraConfig,
    )

    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    targets = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    return {
        "LORA": _files(save(lora)),
        "PREFIX_TUNING": _files(save(PrefixTuningConfig(**virtual))),
        "PROMPT_TUNING": _files(save(PromptTuningConfig(**virtual))),
        "P_TUNING": _files(save(PromptEncoderConfig(**virtual))),
        "MULTITASK_PROMPT_TUNING": _files(
            save(MultitaskPromptTuningConfig(**virtual, num_tasks=3, num_ranks=2))
        ),
        "ADALORA": _files(save(AdaLoraConfig(**targets, init_r=4, total_step=10))),
        "VERA": _files(save(VeraConfig(**targets, r=4))),
        "IA3": _files(save(IA3Config(**targets, feedforward_modules=["down_proj"]))),
        "LN_TUNING": _files(save(LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]))),
        "TRAINABLE_TOKENS": _files(
            save(TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[7, 60], init_weights=False))
        ),
    }


@pytest.fixture
def sound(_sound_files: dict[str, Files]) -> dict[str, Files]:
    """For each method a sound adapter, the test's own copy."""
    return copy.deepcopy(_sound_files)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., AdapterStore]]:
    """Opens the test's store, and closes the one that was open: a server's restart."""
    opened: list[AdapterStore] = []

    def open_store(max_bytes: int | None = None) -> AdapterStore:
        if opened:
            opened.pop().close()
        opened.append(AdapterStore(tmp_path / "store", max_bytes))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., AdapterStore]) -> AdapterStore:
    return open_store()
