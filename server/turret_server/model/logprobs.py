"""Log probabilities of tokens by the logits as the model gives them, as vLLM's `raw_logprobs`.

A row is computed alone and with the same operations whatever the others ask for, so what it gets does not
depend on them. Shape suffixes: R rows of logits, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from turret_server.engine.request import Logprob

# The most that a request may ask for.
_NUM_TOP = 20


def score(logits_RV: torch.Tensor, token_ids_R: torch.Tensor, *, with_top: bool) -> torch.Tensor:
    """On the device, for `unpack` once it is on the host, [R, 2 + 2 K]: log probability and rank of a token
    of each row, the likeliest tokens and their log probabilities. float64, which has all token ids.

    The likeliest are so many whatever is asked for, as which of equal ones come first may depend on it.
    """
    scores_RV = logits_RV.float().log_softmax(dim=-1)
    own_R1 = scores_RV.gather(-1, token_ids_R[:, None])
    rank_R1 = (scores_RV > own_R1).sum(dim=-1, keepdim=True) + 1
    num_top = min(_NUM_TOP, scores_RV.shape[-1]) if with_top else 0
    top_RK, top_ids_RK = scores_RV.topk(num_top)
    return torch.cat([each.double() for each in (own_R1, rank_R1, top_ids_RK, top_RK)], dim=-1)


def unpack(row: Sequence[float], token_id: int, num_top: int) -> Logprob:
    """A row of `score`. A vocabulary may have fewer tokens than the request asks for."""
    own, rank, *top = row
    ids, scores = top[: len(top) // 2], top[len(top) // 2 :]
    pairs = zip(map(int, ids), scores, strict=True)
    likeliest = tuple((each, found) for each, found in list(pairs)[:num_top] if math.isfinite(found))
    return Logprob(token_id, own, int(rank), likeliest)
