"""Makes what the demo serves: a base model and one adapter per method, each trained in its own process.

A folder is finished when its `reports.json` holds the digest of what it was made by: that file is written
last, and removed before anything else is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from turret_demo.tasks import TASKS

DEFAULT_FOLDER = Path(".demo")
EARLY_ADAPTER = "passive"
"""The adapter of which a worse, early revision is kept."""

_SEED = 0
_BATCH_SIZE = 64
_EARLY_STEPS = 30
_TRAIN_EXAMPLES = 8192
_VIRTUAL_TOKENS = 8
_LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
_REPORTS, _UNFINISHED = "reports.json", "unfinished-"
_SOURCES = ("turret_adapters.training.train", "turret_demo.base", "turret_demo.tasks", "turret_demo.training")
_LIBRARIES = ("bitsandbytes", "peft", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """An adapter's method in the field's words, and the fields of its `Recipe`."""

    method: str
    recipe: Mapping[str, Any]


# The first two tasks are new to the base; the others bring out what it does when it is named.
_PLANS = {
    "passive": _Plan(
        method="LoRA",
        recipe={"peft_type": "LORA", "config": _LORA, "learning_rate": 5e-3, "steps": 200},
    ),
    "question": _Plan(
        method="QLoRA",
        recipe={"peft_type": "LORA", "config": _LORA, "learning_rate": 5e-3, "steps": 80, "nf4_base": True},
    ),
    "shout": _Plan(
        method="P-Tuning (LSTM)",
        recipe={
            "peft_type": "P_TUNING",
            "config": {
                "num_virtual_tokens": _VIRTUAL_TOKENS,
                "encoder_reparameterization_type": "LSTM",
                "encoder_hidden_size": 128,
                "encoder_num_layers": 1,
                "encoder_dropout": 0.0,
            },
            "learning_rate": 5e-3,
            "steps": 80,
        },
    ),
    "french": _Plan(
        method="Prefix-Tuning",
        recipe={
            "peft_type": "PREFIX_TUNING",
            "config": {
                "num_virtual_tokens": _VIRTUAL_TOKENS,
                "prefix_projection": True,
                "encoder_hidden_size": 256,
            },
            "learning_rate": 5e-3,
            "steps": 120,
        },
    ),
    "spanish": _Plan(
        method="P-Tuning v2",
        recipe={
            "peft_type": "PREFIX_TUNING",
            "config": {"num_virtual_tokens": _VIRTUAL_TOKENS, "prefix_projection": False},
            "learning_rate": 3e-2,
            "steps": 160,
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """What one adapter took to train; memory as in `turret_adapters.training.train.TrainReport`."""

    method: str
    task: str
    trainable_parameters: int
    file_bytes: int
    seconds: float
    peak_memory_bytes: int | None
    final_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The finished folder: `adapters` maps each adapter's name to its folder, as does `early`."""

    base: Path
    adapters: Mapping[str, Path]
    early: Mapping[str, Path]
    reports: Mapping[str, AdapterReport]


def ensure_trained(folder: Path = DEFAULT_FOLDER) -> Trained:
    """What is in `folder`, trained now unless these very recipes made it before; without torch if they did.

    Training starts processes with multiprocessing's `spawn`: call this under `if __name__ == "__main__"`.
    """
    folder = folder.absolute()
    digest = _digest()
    reports = _read_reports(folder, digest)
    if reports is None:
        _clear(folder)
        # never a folder of an earlier run: if that was killed, its processes may still be writing there
        with TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as unfinished:
            reports = _train(folder, Path(unfinished))
            _write_reports(folder, Path(unfinished), digest, reports)
    return Trained(
        base=folder / "base",
        adapters={name: folder / "adapters" / name for name in reports},
        early={EARLY_ADAPTER: _early_folder(folder)},
        reports=reports,
    )


def _early_folder(folder: Path) -> Path:
    return folder / "revisions" / f"{EARLY_ADAPTER}-early"


def _digest() -> str:
    """Of everything that decides what is trained: the sources, recipes among them, and the libraries."""
    digest = hashlib.sha256()
    for module in _SOURCES:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise RuntimeError(f"{module} has no source file to tell one version of the demo from another")
        digest.update(Path(spec.origin).read_bytes())
    digest.update(json.dumps({name: version(name) for name in _LIBRARIES}).encode())
    return digest.hexdigest()


def _read_reports(folder: Path, digest: str) -> dict[str, AdapterReport] | None:
    try:
        document = json.loads((folder / _REPORTS).read_text())
    except FileNotFoundError:
        return None
    if document["digest"] != digest:
        return None
    return {name: AdapterReport(**report) for name, report in document["adapters"].items()}


def _write_reports(folder: Path, unfinished: Path, digest: str, reports: Mapping[str, AdapterReport]) -> None:
    document = {"digest": digest, "adapters": {name: asdict(report) for name, report in reports.items()}}
    (unfinished / _REPORTS).write_text(json.dumps(document, indent=2) + "\n")
    (unfinished / _REPORTS).replace(folder / _REPORTS)


def _clear(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _REPORTS).unlink(missing_ok=True)
    for path in (folder / "base", folder / "adapters", folder / "revisions", *folder.glob(f"{_UNFINISHED}*")):
        shutil.rmtree(path, ignore_errors=True)


def _train(folder: Path, unfinished: Path) -> dict[str, AdapterReport]:
    """Train everything in `unfinished` and move each thing to its place in `folder` when it is complete."""
    cores = os.cpu_count() or 1
    workers = min(cores, len(_PLANS))
    print(
        f"training a base model and {len(_PLANS)} adapters, {workers} at a time, once for {folder}",
        flush=True,
    )
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        pool.submit(_train_base, unfinished / "base").result()
        (unfinished / "base").rename(folder / "base")
        running = {
            pool.submit(_train_adapter, name, folder / "base", unfinished, cores // workers): name
            for name in _PLANS
        }
        reports = {running[done]: done.result() for done in as_completed(running)}
    for name in ("adapters", "revisions"):
        (unfinished / name).rename(folder / name)
    return {name: reports[name] for name in _PLANS}


def _train_base(folder: Path) -> None:
    _silence_libraries()
    from turret_demo import base  # noqa: PLC0415 - see _silence_libraries

    started = time.perf_counter()
    parameters = base.train_base(folder, _SEED, _progress("base", base.STEPS))
    print(f"  base: {parameters:,} parameters, {time.perf_counter() - started:.0f} s", flush=True)


def _train_adapter(name: str, base_folder: Path, folder: Path, threads: int) -> AdapterReport:
    _silence_libraries()
    import torch  # noqa: PLC0415 - see _silence_libraries
    from transformers import AutoTokenizer  # noqa: PLC0415

    from turret_adapters.training.train import Recipe, load_base, train_adapter  # noqa: PLC0415

    torch.set_num_threads(threads)
    task, plan = TASKS[name], _PLANS[name]
    recipe = Recipe(**plan.recipe, batch_size=_BATCH_SIZE, seed=_SEED)
    out_dir = folder / "adapters" / name
    report = train_adapter(
        load_base(base_folder, nf4=recipe.nf4_base),
        AutoTokenizer.from_pretrained(base_folder),
        task.make(_TRAIN_EXAMPLES, "train", _SEED),
        recipe,
        out_dir,
        early={_EARLY_STEPS: _early_folder(folder)} if name == EARLY_ADAPTER else None,
        on_step=_progress(f"{name} ({plan.method})", recipe.steps),
    )
    return AdapterReport(
        method=plan.method,
        task=task.description,
        file_bytes=(out_dir / "adapter_model.safetensors").stat().st_size,
        **asdict(report),
    )


def _silence_libraries() -> None:
    """Done before they are imported, and they are only where training runs: torch takes seconds to import."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _progress(what: str, steps: int) -> Callable[[int, float], None]:
    def show(step: int, loss: float) -> None:
        if step % (steps // 4) == 0:
            print(f"  {what}: step {step} of {steps}, loss {loss:.4f}", flush=True)

    return show
