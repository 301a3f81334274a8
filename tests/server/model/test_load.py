from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel, T5Config

from support.models import MIXTURES
from support.tokenizers import make_tokenizer
from turret_adapters.spec import ModuleKind
from turret_server.errors import ConfigError, UnsupportedModelError
from turret_server.kernels import PackedNF4Weight
from turret_server.kernels.gpu.ops import GpuOps
from turret_server.kernels.reference import ReferenceOps
from turret_server.model import load as load_module
from turret_server.model.arena import Arena
from turret_server.model.load import (
    LoadedModel,
    ModelWeights,
    load_model,
    quantization,
    select_device,
    select_dtype,
)
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler

CPU = torch.device("cpu")
PROJECTIONS = ("gate_up_proj", "down_proj")


def load(model: Path, cache: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(str(model), device=CPU, dtype=dtype, cache=cache, ops=ReferenceOps())


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    """Of a prompt, as the server computes it."""
    arena = Arena(loaded.base, 1 << 20, dtype=loaded.dtype, device=CPU)
    runner = ModelRunner(loaded, arena, None, Sampler())
    runner.check()
    logits_TV, _ = runner._all_logits([range(50, 80)])
    return logits_TV


def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Every expert's, dequantised."""
    modules = {name: loaded.model.get_submodule(name) for name in loaded.base.of_kind(ModuleKind.EXPERT)}
    return {name: dequantize_4bit(own.weight.data, own.weight.state) for name, own in modules.items()}


@pytest.fixture(params=sorted(MIXTURES))
def base(request, base_of) -> Path:
    return base_of(request.param)


@pytest.fixture
def stacked(base, tmp_path) -> Path:
    """The same weights as transformers 5 holds them."""
    folder = shutil.copytree(base, tmp_path / "stacked")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, save_original_format=False)
    assert any(tensor.ndim == 3 for tensor in load_file(folder / "model.safetensors").values())
    return folder


def test_experts_are_the_checkpoints_in_nf4_whatever_its_format(base, stacked, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base)
    found = weights_of(load(base, tmp_path / "cache"))
    others = weights_of(load(stacked, tmp_path / "cache"))
    assert len(found) == 3 * 2 * 4
    for name, weight in found.items():
        parameter, _, expert = name.rpartition(".")
        original = plain.get_parameter(parameter).data[int(expert)]
        data, state = quantize_4bit(original, quant_type="nf4", compress_statistics=True)
        assert torch.equal(weight, dequantize_4bit(data, state))
        assert torch.equal(weight, others[name])


def test_the_copy_that_is_kept_holds_the_same_quantised_weights(base, tmp_path):
    first = weights_of(load(base, tmp_path))
    [kept] = (tmp_path / "nf4").iterdir()
    tensors = load_file(kept / "model.safetensors")
    assert all(
        tensor.dtype == torch.uint8 for name, tensor in tensors.items() if name.endswith("_proj.0.weight")
    )
    assert json.loads((kept / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"]
    for file in base.glob("tokenizer*"):
        shutil.copy(file, kept)
    for again in (load(base, tmp_path), load(kept, tmp_path / "other")):
        second = weights_of(again)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "other").exists()


def test_what_only_training_needs_is_not_computed(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "asking")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    assert not load(folder, tmp_path / "cache").model.config.output_router_logits


def linears_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    weights = ModelWeights(loaded.model, loaded.ops)
    return {name: weights.weight(name) for name in loaded.base.of_kind(ModuleKind.LINEAR)}


def test_a_checkpoint_in_bitsandbytes_nf4_is_read_as_it_is(base_of, tmp_path):
    base, folder = base_of("llama"), tmp_path / "nf4-checkpoint"
    quantised = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization(torch.float32), dtype=torch.float32
    )
    quantised.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    first, second = linears_of(load(base, tmp_path / "cache")), linears_of(load(folder, tmp_path / "none"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_in_nf4_is_read_in_any_dtype_whatever_it_was_saved_in(base_of, tmp_path, dtype):
    loaded = load(base_of("llama-nf4"), tmp_path, dtype)
    assert {each.dtype for each in loaded.model.parameters() if each.is_floating_point()} == {dtype}
    logits_TV = logits_of(loaded)
    assert logits_TV.dtype == dtype
    exact_TV = logits_of(load(base_of("llama-nf4"), tmp_path))
    error = {torch.float32: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (logits_TV.float() - exact_TV).abs().max() < error * exact_TV.std()


def test_its_linears_are_not_rounded_to_the_dtype_that_it_was_saved_in(base_of, tmp_path):
    loaded = load(base_of("llama-nf4"), tmp_path)
    weight_OI = ModelWeights(loaded.model, loaded.ops).weight("model.layers.1.self_attn.k_proj")
    assert not torch.equal(weight_OI, weight_OI.bfloat16().float())
    packing = load_model(str(base_of("llama-nf4")), device=CPU, dtype=torch.float32, cache=tmp_path)
    packed_OI = ModelWeights(packing.model, packing.ops).weight("model.layers.1.self_attn.k_proj")
    torch.testing.assert_close(packed_OI, weight_OI, rtol=1e-6, atol=0)


def test_codes_may_be_stored_in_another_dtype(base_of, tmp_path):
    """As for training on several GPUs."""
    linears = []
    for storage in (torch.uint8, torch.bfloat16):
        config = quantization(torch.bfloat16)
        config.bnb_4bit_quant_storage = storage
        model = AutoModelForCausalLM.from_pretrained(
            base_of("llama"), quantization_config=config, dtype=torch.bfloat16
        )
        folder = tmp_path / str(storage)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        linears.append(linears_of(load(folder, tmp_path / "cache")))
    assert linears[0].keys() == linears[1].keys()
    assert all(torch.equal(linears[0][name], linears[1][name]) for name in linears[0])


def test_linears_that_a_checkpoint_keeps_in_16_bit_can_be_adapted(base_of, tmp_path):
    loaded = load(base_of("llama-nf4"), tmp_path)
    plain = load(base_of("llama"), tmp_path)
    assert loaded.base.modules == plain.base.modules
    weights = ModelWeights(loaded.model, loaded.ops)
    kept = load_file(base_of("llama-nf4") / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    assert kept.dtype == torch.bfloat16
    assert torch.equal(weights.weight("model.layers.1.self_attn.q_proj"), kept.float())


def test_only_weights_come_from_the_quantised_copy(base_of, tmp_path):
    folder = shutil.copytree(base_of("llama"), tmp_path / "model")
    first = load(folder, tmp_path / "cache")
    GenerationConfig(eos_token_id=[5, 6]).save_pretrained(folder)
    make_tokenizer("byte-fallback").save_pretrained(folder)
    second = load(folder, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "nf4").iterdir())) == 1
    assert (first.stop_token_ids, second.stop_token_ids) == ({1}, {5, 6, 2})
    assert second.tokenizer.live.get_vocab() == make_tokenizer("byte-fallback").get_vocab()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"--model {folder}: .*generation_config.json"):
        load(folder, tmp_path / "cache")
    (folder / "generation_config.json").unlink()
    assert load(folder, tmp_path / "cache").stop_token_ids == {1, 2}


def test_another_checkpoint_in_the_same_folder_is_quantised_anew(base_of, tmp_path):
    folder = shutil.copytree(base_of("llama"), tmp_path / "model")
    first = linears_of(load(folder, tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)
    model.save_pretrained(folder)
    second = linears_of(load(folder, tmp_path / "cache"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == [
        "model.layers.0.mlp.up_proj"
    ]


def test_the_cache_is_private_to_its_user_also_one_of_before(base_of, tmp_path):
    base = base_of("llama")
    copies = tmp_path / "cache" / "nf4"
    for _ in ("quantised", "read from its copy"):
        load(base, tmp_path / "cache")
        [copy] = copies.iterdir()
        assert {folder.stat().st_mode & 0o777 for folder in (copies, copy)} == {0o700}
        copies.chmod(0o755)


@pytest.fixture(scope="module")
def llama(base_of) -> Path:
    return base_of("llama")


def test_each_dtype_has_a_quantised_copy_of_its_own(llama, tmp_path):
    """What is not quantised is saved in the dtype; scales are computed from weights in it."""
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):
            loaded = load_model(str(llama), device=CPU, dtype=dtype, cache=tmp_path, ops=ReferenceOps())
            assert loaded.model.dtype == dtype
    first, second = (load_file(copy / "model.safetensors") for copy in (tmp_path / "nf4").iterdir())
    assert {tensors["model.norm.weight"].dtype for tensors in (first, second)} == {
        torch.float32,
        torch.bfloat16,
    }


def folder_with(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_text(content)
    return folder


def test_the_key_of_a_copy_holds_everything_that_its_weights_depend_on(tmp_path, monkeypatch):
    def key(name="model", config=None, dtype=torch.float32) -> str:
        return load_module._cache_key(str(tmp_path / name), config or LlamaConfig(), dtype)

    folder = folder_with(tmp_path / "model", a="12", b="3")
    keys = [key(), key(dtype=torch.bfloat16), key(config=LlamaConfig(hidden_size=64))]
    assert key() == keys[0]
    (folder / "b.safetensors").write_text("34")
    keys.append(key())
    (folder / "b.safetensors").rename(folder / "c.safetensors")
    keys.append(key())
    os.utime(folder / "c.safetensors", ns=(0, 0))
    keys.append(key())
    (folder / "d.bin").write_text("")
    keys.append(key())
    monkeypatch.setattr(load_module.bitsandbytes, "__version__", "another")
    keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_weight_stays_in_the_mapped_checkpoint(llama, tmp_path):
    """Else a file that is truncated would end the process, and what was read of it would stay in memory."""
    for _ in range(2):  # from the checkpoint, then from the quantised copy
        loaded = load(llama, tmp_path)
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
        places = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
        for name, parameter in loaded.model.named_parameters():
            assert not any(low <= parameter.data_ptr() < high for low, high in places), name


def test_a_loaded_model_computes_no_gradients_and_does_not_train(llama, tmp_path):
    model = load(llama, tmp_path).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_that_fails_leaves_nothing_and_the_model_is_served(llama, tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails)
    assert load(llama, tmp_path).base.num_layers == 3
    assert list((tmp_path / "nf4").iterdir()) == []
    assert "the next start quantises again: [Errno 28] No space left on device" in caplog.text


def test_a_cache_that_is_no_folder_does_not_stop_the_start(llama, tmp_path, caplog):
    (tmp_path / "nf4").write_text("")
    assert load(llama, tmp_path).base.num_layers == 3
    assert "the next start quantises again" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="glibc keeps freed memory")
def test_freed_memory_returns_to_the_system():
    class Node:
        pass

    node = Node()
    node.itself = node
    gone = weakref.ref(node)
    blocks = [bytearray(b"x") * 60_000 for _ in range(5_000)]  # 300 MB, each below malloc's limit for mmap
    last = blocks[-1]
    del node, blocks
    kept = psutil.Process().memory_info().rss
    load_module._return_freed_memory()
    assert gone() is None, "cycles are collected first"
    assert kept - psutil.Process().memory_info().rss > 150e6
    assert last


@pytest.mark.parametrize("failure", [OSError("no libc"), None], ids=["no libc", "another libc"])
def test_without_glibc_freed_memory_is_left_to_the_allocator(failure, monkeypatch):
    def open_library(_: None) -> object:
        if failure:
            raise failure
        return object()

    monkeypatch.setattr(load_module.ctypes, "CDLL", open_library)
    load_module._return_freed_memory()


def test_a_load_returns_the_memory_that_it_freed(llama, tmp_path, monkeypatch):
    returned = []
    monkeypatch.setattr(load_module, "_return_freed_memory", lambda: returned.append(True))
    load(llama, tmp_path)
    assert returned == [True]


@pytest.mark.parametrize(
    ("generation", "tokenizer", "expected"),
    [
        (5, 1, {5, 1}),
        ([5, 6], 1, {5, 6, 1}),
        (0, 1, {0, 1}),
        ([5, 1], 1, {5, 1}),
        (5, None, {5}),
        (None, 1, {1}),
        (None, 0, {0}),
        (None, None, set()),
    ],
)
def test_stop_tokens_are_the_generation_configs_and_the_tokenizers(generation, tokenizer, expected):
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=generation))
    found = load_module._stop_token_ids(model, SimpleNamespace(eos_token_id=tokenizer))
    assert found == expected
    if generation is None:
        model = SimpleNamespace(generation_config=None)
        assert load_module._stop_token_ids(model, SimpleNamespace(eos_token_id=tokenizer)) == expected


def test_a_gpu_is_selected_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = {name: str(select_device(name)) for name in ("cpu", "auto", "cuda", "cuda:0", "cuda:1")}
    assert found == {"cpu": "cpu", "auto": "cuda:0", "cuda": "cuda:0", "cuda:0": "cuda:0", "cuda:1": "cuda:1"}
    with pytest.raises(
        ConfigError, match=r"^--device cuda:2: expected a GPU that torch finds: cuda:0, cuda:1$"
    ):
        select_device("cuda:2")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "mixtral"])
def test_the_size_of_a_models_weights_is_known_before_they_are_read(family, base_of, quantised_cache):
    path, dtype = str(base_of(family)), torch.float32
    loaded = load_model(path, device=CPU, dtype=dtype, cache=quantised_cache, ops=GpuOps())
    meta = load_module.meta_model(path, load_module.read_config(path))
    found = sum(parameter.nbytes for parameter in loaded.model.parameters())
    for module in loaded.model.modules():
        if isinstance(getattr(module, "weight", None), PackedNF4Weight):
            found += module.weight.data.nbytes + module.weight.absmax.nbytes
    assert load_module.weight_bytes(meta, dtype) == pytest.approx(found, rel=0.1)


def test_a_model_that_is_too_large_for_the_gpu_is_refused_with_what_is_missing(monkeypatch):
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {device: (2**30, 2**31)}.__getitem__)
    load_module.check_fits("m", 2**30, device)
    with pytest.raises(ConfigError, match="--model m: its weights take 1536 MiB, 512 MiB more than is free"):
        load_module.check_fits("m", 3 * 2**29, device)


def test_weights_are_packed_and_read_on_the_models_device_whatever_the_threads_is(
    base_of, quantised_cache, monkeypatch
):
    """Triton launches kernels on the thread's."""
    current: list[torch.device] = []

    @contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    class Ops(ReferenceOps):
        def pack_nf4(self, weight):
            assert current == [CPU]
            return super().pack_nf4(weight)

        def nf4_linear(self, x_TI, weight):
            assert current == [CPU]
            return super().nf4_linear(x_TI, weight)

    monkeypatch.setattr(load_module, "on_device", on_device)
    loaded = load_model(
        str(base_of("llama")), device=CPU, dtype=torch.float32, cache=quantised_cache, ops=Ops()
    )
    ModelWeights(loaded.model, loaded.ops).weight("model.layers.1.self_attn.k_proj")


def test_without_a_gpu_one_cannot_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == select_device("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(
            ConfigError, match=f"--device {name}: torch finds no CUDA device; use --device cpu"
        ):
            select_device(name)


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_the_dtype_is_bfloat16_where_the_device_multiplies_in_it(has_bfloat16, monkeypatch):
    monkeypatch.setattr(load_module, "has_avx512bf16", lambda: has_bfloat16)
    assert select_dtype("auto", CPU) == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert select_dtype("auto", torch.device("cuda")) == torch.bfloat16
    for name in ("float32", "bfloat16", "float16"):
        assert select_dtype(name, CPU) == getattr(torch, name)


def test_a_gpu_without_bfloat16_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {device: (7, 5)}.__getitem__)
    said = (
        "--device cuda:1: Tesla T4 has compute capability 7.5, and 8.0 or newer is expected; use --device cpu"
    )
    with pytest.raises(ConfigError, match=said):
        load_model("none", device=device, dtype=torch.float32, cache=tmp_path)
    for newer in ((8, 0), (8, 9), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=newer: found)
        load_module.check_gpu(device)


def test_a_model_that_does_not_exist_is_named(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match=f"--model {missing}: no such folder; check the path"):
        load(missing, tmp_path)


def test_a_folder_that_holds_no_model_says_what_is_wrong_with_it(tmp_path):
    with pytest.raises(ConfigError, match=f"--model {tmp_path}: ") as failed:
        load(tmp_path, tmp_path / "cache")
    assert "no such folder" not in str(failed.value)


def test_a_model_of_another_kind_is_refused_by_name(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="t5 models are not supported") as failed:
        load_module.read_config(str(tmp_path))
    assert failed.value.metadata == {"model": "t5"}


def test_a_model_that_keeps_its_own_attention_is_refused():
    config = SimpleNamespace(model_type="odd", _attn_implementation="eager")
    said = "odd models are not supported: they keep the attention eager"
    with pytest.raises(UnsupportedModelError, match=said) as refused:
        load_module.check_attention(SimpleNamespace(config=config))
    assert refused.value.metadata == {"model": "odd"}
