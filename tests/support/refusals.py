"""What every refusal of an adapter has in common."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turret_adapters.errors import AdapterError
from turret_adapters.formats.peft import read_adapter
from turret_adapters.host import BaseWeights
from turret_adapters.spec import BaseSpec


class NoWeights:
    """The base's weights are asked for only where nothing else is wrong."""

    def weight(self, module: str) -> torch.Tensor:
        raise AssertionError(module)

    def bias(self, module: str) -> torch.Tensor | None:
        raise AssertionError(module)


NO_WEIGHTS = NoWeights()


def refused(
    path: Path, base: BaseSpec, error: type[AdapterError], *parts: str, weights: BaseWeights = NO_WEIGHTS
) -> str:
    with pytest.raises(AdapterError) as refusal:
        read_adapter(path, base, weights)
    assert refusal.type is error
    message = str(refusal.value)
    for part in parts:
        assert part in message
    assert "expected" in message
    assert "found" in message
    assert "\n" not in message
    assert len(message) < 1000
    return message
