"""Summary of a load generator's records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from turret_client.bench._run import Record


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which a fraction of the values lies, interpolated linearly (numpy's method "linear").

    `values` is sorted and not empty.
    """
    position = fraction * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Distribution of a latency in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latencies | None:
        """The distribution of these values; None without values."""
        if not seconds:
            return None
        ascending = sorted(seconds)
        return cls(
            mean=sum(ascending) / len(ascending),
            p50=percentile(ascending, 0.5),
            p90=percentile(ascending, 0.9),
            p99=percentile(ascending, 0.99),
            max=ascending[-1],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Results of a run.

    Attributes:
        seconds: Duration of the run.
        succeeded: Number of successful requests.
        failed: Number of failed requests.
        unfinished: Requests that were running when the run was interrupted.
        errors: Number of failed requests by reason.
        requests_per_second: Successful requests per second.
        prompt_tokens: Prompt tokens of successful requests.
        cached_tokens: Cached tokens of successful requests.
        generated_tokens: Generated tokens of all requests, including failed and unfinished ones.
        output_tokens_per_second: Generated tokens per second.
        first_token_seconds: From a request's due time to its first token.
        inter_token_seconds: Between consecutive tokens of a request.
        request_seconds: From a request's due time to its end, for successful requests.
        adapters: Number of successful requests by adapter; the base model is "".
    """

    seconds: float
    succeeded: int
    failed: int
    unfinished: int
    errors: dict[str, int]
    requests_per_second: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    output_tokens_per_second: float
    first_token_seconds: Latencies | None
    inter_token_seconds: Latencies | None
    request_seconds: Latencies | None
    adapters: dict[str, int]

    def as_json(self, records: Sequence[Record]) -> dict[str, Any]:
        """The results and the records."""
        return asdict(self) | {"records": [asdict(record) for record in records]}


def summarise(records: Sequence[Record], seconds: float) -> Summary:
    """Summarises the records of a run of that duration."""
    succeeded = [record for record in records if record.succeeded]
    errors = Counter(record.error for record in records if record.error)
    generated_tokens = sum(len(record.token_seconds) for record in records)
    return Summary(
        seconds=seconds,
        succeeded=len(succeeded),
        failed=errors.total(),
        unfinished=sum(record.ended is None for record in records),
        errors=dict(errors.most_common()),
        requests_per_second=len(succeeded) / seconds if seconds else 0.0,
        prompt_tokens=sum(record.prompt_tokens for record in succeeded),
        cached_tokens=sum(record.cached_tokens for record in succeeded),
        generated_tokens=generated_tokens,
        output_tokens_per_second=generated_tokens / seconds if seconds else 0.0,
        first_token_seconds=Latencies.of(
            [record.token_seconds[0] - record.due for record in records if record.token_seconds]
        ),
        inter_token_seconds=Latencies.of(
            [after - before for record in records for before, after in pairwise(record.token_seconds)]
        ),
        request_seconds=Latencies.of(
            [record.ended - record.due for record in succeeded if record.ended is not None]
        ),
        adapters=dict(Counter(record.adapter or "" for record in succeeded).most_common()),
    )
