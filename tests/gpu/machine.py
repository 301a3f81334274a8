"""What a run on a GPU was measured on: chip, driver, compiler and versions.

cd tests && python -m gpu.machine
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version


def main() -> None:
    for command in (["nvidia-smi"], ["gcc", "--version"]):
        if shutil.which(command[0]):
            subprocess.run(command, check=False)  # noqa: S603 (none of it is from outside)
        else:
            say(f"no {command[0]}")
    say(f"Python {sys.version}")
    for name in ("torch", "triton", "transformers", "bitsandbytes", "grpcio"):
        try:
            say(f"{name} {version(name)}")
        except PackageNotFoundError:
            say(f"no {name}")
    import torch  # noqa: PLC0415 -- the rest is known if it fails

    if torch.cuda.is_available():
        say(str(torch.cuda.get_device_properties(0)))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
