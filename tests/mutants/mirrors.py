"""Which modules are mutated, and which tests run on their mutants.

The tests of a module run in stages, nearest first: the files that mirror its name, the other tests of its
folder, and the tests of the whole server that cover its package. Where it is known which tests run the
mutated lines, these take the place of the first two. A mutant that one stage kills does not reach the next.
"""

from __future__ import annotations

import os
import random
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mutants.sites import DEVICE, Mutant, find_sites, is_generated

PACKAGES = {"server/turret_server": "tests/server", "adapters/turret_adapters": "tests/adapters"}
# Code that only a GPU runs is a class of its own: without one, kernels run in Triton's interpreter and CUDA
# graphs on a stand-in.
_GPU = ("server/turret_server/kernels/gpu/", "server/turret_server/model/decode_")
# The last stage, by the longest prefix of a module's path.
_WHOLE = {
    "server/turret_server": ("tests/service", "tests/security", "tests/clients/cli"),
    "server/turret_server/engine": (
        "tests/simulation",
        "tests/parity/test_engine_equality.py",
        "tests/service",
    ),
    "server/turret_server/kernels": ("tests/parity",),
    "server/turret_server/model": ("tests/parity", "tests/service"),
    "adapters/turret_adapters": ("tests/service", "tests/security"),
    "adapters/turret_adapters/formats": ("tests/parity", "tests/security", "tests/clients/cli"),
    "adapters/turret_adapters/training": ("tests/demo",),
}


def modules(root: Path, paths: Sequence[str], *, gpu: bool) -> list[str]:
    """The modules at or under `paths`, sorted: those that only a GPU runs, or all others."""
    found = set[str]()
    for path in map(Path, paths or PACKAGES):
        files = [root / path] if path.suffix == ".py" else (root / path).rglob("*.py")
        found |= {file.relative_to(root).as_posix() for file in files if not is_generated(file)}
    return sorted(path for path in found if path.startswith(_GPU) == gpu)


def import_path(root: Path) -> str:
    """The `PYTHONPATH` that imports the packages of the tree at `root`."""
    build = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    return os.pathsep.join(str(root / path) for path in build["dev-mode-dirs"])


def draw(root: Path, paths: Sequence[str], *, count: int, seed: int, gpu: bool) -> tuple[list[Mutant], int]:
    """`count` mutants and the number of sites that they were drawn from: uniformly over all sites of the
    modules, without replacement, then uniformly over the variants of each site. With `gpu`, those of code
    that only a GPU runs and of the devices of tensors; without, all others.
    """
    sites = [
        (path, site)
        for only_gpu in (False, True)
        for path in modules(root, paths, gpu=only_gpu)
        for site in find_sites((root / path).read_bytes())
        if (only_gpu or site.kind == DEVICE) == gpu
    ]
    chance = random.Random(seed)
    drawn = chance.sample(sites, min(count, len(sites)))
    return [Mutant(path, site, chance.randrange(len(site.variants))) for path, site in drawn], len(sites)


def stages(root: Path, module: str) -> Iterator[list[str]]:
    """The test files of each stage. A folder without tests uses those of the folder above."""
    package = next(package for package in PACKAGES if module.startswith(f"{package}/"))
    inner = Path(module).relative_to(package)
    folder = root / PACKAGES[package] / inner.parent
    while not list(folder.glob("test_*.py")) and folder != root / "tests":
        folder = folder.parent
    stem = inner.stem.strip("_") if inner.stem != "__init__" else inner.parent.name
    seen = set[str]()
    nearest = [*folder.glob(f"test_{stem}.py"), *folder.glob(f"test_{stem}_*.py")]
    whole = _WHOLE[max((prefix for prefix in _WHOLE if module.startswith(prefix)), key=len)]
    for files in (sorted(nearest), sorted(folder.glob("test_*.py")), _named_first(root, whole, inner)):
        stage = [name for file in files if (name := file.relative_to(root).as_posix()) not in seen]
        seen.update(stage)
        yield stage


def _named_first(root: Path, tests: Sequence[str], module: Path) -> list[Path]:
    """Files that share a word with the module's path come first: they most probably test it."""
    words = {word[:5] for part in module.with_suffix("").parts for word in part.split("_") if len(word) > 3}
    files = [
        file
        for path in map(root.joinpath, tests)
        for file in ([path] if path.is_file() else sorted(path.rglob("test_*.py")))
    ]
    return sorted(files, key=lambda file: not any(word in file.stem for word in words))
