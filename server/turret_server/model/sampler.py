"""Samples tokens from logits. A row's token depends on the row, its parameters, its seed and its position.

A row is sampled with one number in [0, 1), which the host derives from seed and position. Weights are
integers, whose sums are exact in any order, so neither the batch nor the device changes a token. All of it
runs where the logits are; only the token ids are copied to the host, at once, and the log probabilities that
requests want.

Shape suffixes: S rows of logits, D those of one path, R those whose log probabilities are wanted, V
vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import Enum, auto

import torch

from turret_server.engine.request import SamplingParams
from turret_server.engine.step import SequenceStep, StepResult
from turret_server.errors import NonFiniteLogitsError, TurretError
from turret_server.model.adjustment import adjust, restrict, to_device
from turret_server.model.logprobs import score, unpack

# The weight of the best token, to which the others are relative. Vocabularies up to 2²² do not overflow.
_MAX_WEIGHT = 2.0**40
_NOT_FINITE = -1


class _Path(Enum):
    """How a token is chosen, other than as the likeliest of the logits as they are."""

    BEST = auto()  # the likeliest of adjusted logits
    DRAW = auto()
    CUT = auto()  # drawn from some of the likeliest, for which all must be sorted


class Sampler:
    """Greedy at temperature 0; otherwise temperature, min-p, top-k and top-p, in the order of vLLM."""

    def sample(self, logits_SV: torch.Tensor, sequences: Sequence[SequenceStep]) -> StepResult:
        """One token for each row. A row whose largest logit is not finite gets an error instead, and so does
        one whose answer cannot keep its form.
        """
        logits_SV = logits_SV.float()
        best_S, chosen_S = logits_SV.max(dim=-1)
        errors: dict[int, TurretError] = {}
        for path, indices in _by_path(sequences).items():
            where_D = to_device(torch.tensor(indices), logits_SV.device)
            of_path = [sequences[each] for each in indices]
            chosen_S[where_D] = _choose(logits_SV.index_select(0, where_D), of_path, path, errors)
        chosen_S.masked_fill_(~torch.isfinite(best_S), _NOT_FINITE)
        scored: dict[int | None, list[int]] = {}
        for index, each in enumerate(sequences):
            if _num_top(each) is not None:
                scored.setdefault(each.vocab_size, []).append(index)
        scores = [(indices, _score(logits_SV, chosen_S, sequences, indices)) for indices in scored.values()]
        token_ids: dict[int, int] = {}
        for token_id, sequence in zip(chosen_S.tolist(), sequences, strict=True):
            if token_id == _NOT_FINITE:
                errors[sequence.sequence_id] = not_finite(sequence)
            elif sequence.sequence_id not in errors:
                token_ids[sequence.sequence_id] = token_id
        logprobs = {
            each.sequence_id: unpack(row, token_ids[each.sequence_id], _num_top(each) or 0)
            for indices, scores_RX in scores
            for each, row in zip([sequences[at] for at in indices], scores_RX.tolist(), strict=True)
            if each.sequence_id in token_ids
        }
        return StepResult(token_ids=token_ids, errors=errors, logprobs=logprobs)


def _score(
    logits_SV: torch.Tensor, chosen_S: torch.Tensor, sequences: Sequence[SequenceStep], indices: list[int]
) -> torch.Tensor:
    """Scores of the chosen tokens of these rows, which have the same vocabulary. Sums of floats depend on how
    many there are, so those of others' vocabularies are left out.
    """
    where_R = to_device(torch.tensor(indices), logits_SV.device)
    with_top = any(_num_top(sequences[each]) for each in indices)
    own_RV = logits_SV.index_select(0, where_R)[:, : sequences[indices[0]].vocab_size]
    return score(own_RV, chosen_S[where_R].clamp(min=0), with_top=with_top)


def not_finite(sequence: SequenceStep) -> NonFiniteLogitsError:
    return NonFiniteLogitsError(
        f"Logits are not finite with these adapters, after {sequence.num_generated} generated tokens. "
        "Request smaller adapter weights, or serve the model in another dtype (--dtype)."
    )


def _num_top(sequence: SequenceStep) -> int | None:
    """How many likely tokens come with the log probability of a row's token; None if it is not wanted."""
    assert sequence.sampling is not None
    return sequence.sampling.logprobs


def _by_path(sequences: Sequence[SequenceStep]) -> dict[_Path, list[int]]:
    """The rows of each path that has some."""
    found: dict[_Path, list[int]] = {}
    for index, sequence in enumerate(sequences):
        assert sequence.sampling is not None
        if path := _path(sequence, sequence.sampling):
            found.setdefault(path, []).append(index)
    return found


def _path(sequence: SequenceStep, sampling: SamplingParams) -> _Path | None:
    if sampling.temperature == 0:
        return None if sampling.adjustment is None and sequence.allowed is None else _Path.BEST
    return _Path.CUT if sampling.top_k or sampling.top_p < 1 else _Path.DRAW


def _choose(
    logits_DV: torch.Tensor, sequences: Sequence[SequenceStep], path: _Path, errors: dict[int, TurretError]
) -> torch.Tensor:
    """A token id for each row, [D]. The logits are changed, errors of sequences are added."""
    adjust(logits_DV, sequences)
    errors |= restrict(logits_DV, sequences)
    return logits_DV.argmax(-1) if path is _Path.BEST else _draw(logits_DV, sequences, cut=path is _Path.CUT)


def _draw(logits_DV: torch.Tensor, sequences: Sequence[SequenceStep], *, cut: bool) -> torch.Tensor:
    """A token id for each row, [D]: that whose interval of the cumulated weights holds the row's number."""
    settings = [
        (
            each.temperature,
            each.top_k or logits_DV.shape[-1],
            each.top_p,
            each.min_p,
            _uniform(each.seed, generated),
        )
        for each, generated in ((it.sampling, it.num_generated) for it in sequences)
        if each is not None
    ]
    settings_D5 = to_device(torch.tensor(settings, dtype=torch.float64), logits_DV.device)
    temperature_D1, top_k_D1, top_p_D1, min_p_D1, uniform_D1 = settings_D5[..., None].unbind(dim=1)
    token_ids_DV = None
    if cut:
        logits_DV, token_ids_DV = logits_DV.sort(descending=True, stable=True)
    below_DV = logits_DV.double() - logits_DV.amax(dim=-1, keepdim=True)
    shares_DV = below_DV.div_(temperature_D1).exp_()
    if any(each.sampling.min_p for each in sequences if each.sampling):
        shares_DV.masked_fill_(shares_DV < min_p_D1, 0)
    weights_DV = (shares_DV * _MAX_WEIGHT).long()
    sums_DV = weights_DV.cumsum(dim=-1)
    if cut:
        rank_V = torch.arange(logits_DV.shape[-1], device=logits_DV.device)
        weights_DV.masked_fill_(rank_V >= top_k_D1, 0)
        # A token stays while those before it do not reach top_p, so at least one stays.
        before_DV = (sums_DV - weights_DV).double()
        weights_DV.masked_fill_(before_DV >= top_p_D1 * weights_DV.sum(dim=-1, keepdim=True), 0)
    total_D1 = weights_DV.sum(dim=-1, keepdim=True)
    # Less than the total, as the largest double below 1 times an integer rounds to less than it.
    target_D1 = (uniform_D1 * total_D1).long()
    index_D1 = torch.searchsorted(sums_DV, target_D1, right=True).clamp_(max=logits_DV.shape[-1] - 1)
    chosen_D1 = index_D1 if token_ids_DV is None else token_ids_DV.gather(-1, index_D1)
    return chosen_D1[:, 0]


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for a position, so that a preempted request samples the same tokens again."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
