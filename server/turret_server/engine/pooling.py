"""What is computed of a prompt instead of an answer: a vector, or the numbers of a head.

The numbers are opaque to the engine. A prompt that is computed in several steps gets some of them from each:
the parts of a vector are added, the rows of tokens follow each other.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from turret_adapters.spec import HeadTask


class Pooling(Enum):
    """How the hidden states of a prompt's tokens become a vector. The values are sentence-transformers'
    names.
    """

    CLS = "cls"
    MEAN = "mean"
    WEIGHTED_MEAN = "weightedmean"  # by position, from 1 (SGPT, arXiv 2202.08904)
    LAST = "lasttoken"

    def weight(self, index: int, num_tokens: int) -> float:
        """The weight of a token of the prompt; 0 for virtual tokens, whose index is negative."""
        if index < 0:
            return 0.0
        match self:
            case Pooling.CLS:
                return float(index == 0)
            case Pooling.MEAN:
                return 1 / num_tokens
            case Pooling.WEIGHTED_MEAN:
                return (index + 1) * 2 / (num_tokens * (num_tokens + 1))
            case Pooling.LAST:
                return float(index == num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What a head computes, or if `task` is None a vector by `pooling`."""

    task: HeadTask | None = None
    pooling: Pooling = Pooling.LAST

    @property
    def needs_every_token(self) -> bool:
        """Whether a decoder must compute the hidden states of more tokens than the last."""
        return self.pooling is not Pooling.LAST if self.task is None else self.task.by_token


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of `width` numbers, one after another, in float64."""

    width: int
    values: array[float]


def combine(params: PoolingParams, parts: Sequence[Rows]) -> Rows:
    """The numbers of a prompt from those of its steps, in order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if params.task is not None:
        return Rows(first.width, array("d", (value for part in parts for value in part.values)))
    return Rows(first.width, array("d", map(sum, zip(*(part.values for part in parts), strict=True))))
