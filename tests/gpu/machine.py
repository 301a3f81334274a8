"""What a run on a GPU was measured on: chip, driver, compiler and versions.

cd tests && python -m gpu.machine
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import bitsandbytes
import torch
import transformers
import triton


def main() -> None:
    say(f"Python {sys.version}")
    for each in (torch, triton, transformers, bitsandbytes):
        say(f"{each.__name__} {each.__version__}")
    for command in (["nvidia-smi"], ["gcc", "--version"]):
        if shutil.which(command[0]):
            subprocess.run(command, check=False)  # noqa: S603 (none of it is from outside)
        else:
            say(f"no {command[0]}")
    if torch.cuda.is_available():
        say(str(torch.cuda.get_device_properties(0)))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
