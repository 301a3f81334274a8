"""Makes the configs in this folder, each as the version of peft that it is named after writes it.

    for version in 0.13.2 0.14.0 0.15.2 0.16.0 0.17.1 0.18.1 0.19.1 0.20.0; do
      pip install --no-deps --target /tmp/pefts/$version peft==$version
    done
    python tests/adapters/formats/saved/make.py /tmp/pefts

Every kind of `support.adapters` that a version can make it makes and saves, for the small Llama, in a process
of its own. Of an adapter only its `adapter_config.json` is kept; where its tensors have other names or shapes
than today's, `tensors.json` says which.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
# As another kind, or as its dtype.
SKIPPED = {
    *("lora-attention", "lora-fp16", "lora-bf16", "p-tuning-mlp", "dora-embedding"),
    *("trainable-tokens-adapted-head", "embeddings-saved", "embeddings-trained", "embeddings-trained-lora"),
    *("embeddings-trained-whole", "embeddings-trained-tokens", "embeddings-trained-prompt"),
}


def main(pefts: Path) -> None:
    from support.models import save_model  # noqa: PLC0415 (the processes below import it on their own)

    with tempfile.TemporaryDirectory() as work:
        for family in ("llama", "qwen3"):
            save_model(family, Path(work, family))
        today = _make(Path(work), "today", [])
        for folder in sorted(pefts.iterdir()):
            made = _make(Path(work), folder.name, [folder])
            kept = HERE / f"peft-{folder.name}"
            kept.mkdir(exist_ok=True)
            for kind, (config, _) in made.items():
                (kept / f"{kind}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
            others = {kind: shapes for kind, (_, shapes) in made.items() if shapes != today[kind][1]}
            if others:
                (kept / "tensors.json").write_text(json.dumps(others, indent=1, sort_keys=True) + "\n")


def _make(work: Path, version: str, peft: list[Path]) -> dict[str, tuple[dict, dict]]:
    # The order of a set of names would differ from run to run.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [*peft, TESTS])),
        "PYTHONHASHSEED": "0",
    }
    command = [sys.executable, "-W", "ignore", __file__, "--make", version]
    subprocess.run(command, cwd=work, env=environment, check=True)  # noqa: S603
    return {folder.name: _read(folder) for folder in sorted((work / version).iterdir())}


def _read(folder: Path) -> tuple[dict, dict]:
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
    return json.loads((folder / "adapter_config.json").read_text()), shapes


def _make_here(version: str) -> None:
    """What the process of a version does, in a folder that has the base model as `llama`."""
    import peft  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    # peft 0.16 and 0.17 import it from transformers, of which 5 has it no more. The module itself may be made
    # anew while it is imported.
    type(transformers).HybridCache = transformers.DynamicCache
    if not hasattr(peft, "TrainableTokensConfig"):  # before 0.15
        peft.TrainableTokensConfig = int  # takes no fields: TypeError
    from support.adapters import KINDS, save_adapter  # noqa: PLC0415

    for kind in sorted(KINDS.keys() - SKIPPED):
        try:
            save_adapter(kind, "llama", Path("llama"), Path(version, kind))
        except TypeError as error:  # a field that came later
            sys.stderr.write(f"peft {version} makes no {kind}: {error}\n")
    # Its heads are wider than its hidden size says.
    save_adapter("p-tuning-v2", "qwen3", Path("qwen3"), Path(version, "p-tuning-v2-qwen3"))


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        _make_here(sys.argv[2])
    else:
        sys.path.insert(0, str(TESTS))
        main(Path(sys.argv[1]))
