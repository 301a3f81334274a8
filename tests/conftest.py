from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Test processes share the cores with the servers they start: more threads than cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU its kernels run in Triton's interpreter; Triton asks when it is first imported.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="module")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Servers that are not told where to keep adapters keep them where no test finds another's."""
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a small random model of a family, made once."""
    from support.models import save_model  # noqa: PLC0415 (slow, and not for every test)

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture(scope="session")
def adapter_of(
    base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A folder with an adapter of a kind for a family's model, made by peft, once."""
    from support.adapters import save_adapter  # noqa: PLC0415

    made: dict[tuple[str, str, int], Path] = {}

    def make(family: str, kind: str, seed: int = 0) -> Path:
        key = (family, kind, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{kind}")
            made[key] = save_adapter(kind, family, base_of(family), folder, seed)
        return made[key]

    return make


@pytest.fixture(scope="session")
def quantised_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
