from __future__ import annotations

from pathlib import Path

import pytest

from turret_adapters.errors import SourceTooLargeError
from turret_adapters.formats.files import no_progress
from turret_adapters.sources.intake import Intake


def test_a_file_that_is_announced_as_too_large_is_not_read(tmp_path: Path) -> None:
    chunks = iter([b"x"])
    with pytest.raises(SourceTooLargeError, match="at most 10 bytes, found 11"):
        Intake(tmp_path, 10, no_progress).take("adapter_config.json", chunks, 11)
    assert next(chunks) == b"x"
    assert not (tmp_path / "adapter_config.json").exists()
