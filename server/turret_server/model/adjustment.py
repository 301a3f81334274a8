"""Changes logits as requests want it, before a token is chosen: exclusions, biases, penalties, the form of an
answer.

Every element is computed alone, and counts are sums of ones, so neither the batch nor the device changes a
logit. Shape suffixes: D rows of logits, P those with penalties, M those of answers with a form, V vocabulary,
N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from turret_server.engine.step import SequenceStep
from turret_server.errors import TurretError


def adjust(logits_DV: torch.Tensor, sequences: Sequence[SequenceStep]) -> None:
    """Change the rows of sequences with an adjustment, in place. See `LogitAdjustment`."""
    found = [
        (row, each, each.sampling.adjustment)
        for row, each in enumerate(sequences)
        if each.sampling is not None and each.sampling.adjustment is not None
    ]
    if not found:
        return
    _exclude(logits_DV, [(row, each.excluded) for row, each, _ in found if each.excluded])
    biased = [(row, adjustment.logit_bias) for row, _, adjustment in found if adjustment.logit_bias]
    if biased:
        values = chain.from_iterable(bias.values() for _, bias in biased)
        bias_N = torch.tensor(list(values), dtype=logits_DV.dtype)
        where = _elements([(row, list(bias)) for row, bias in biased], logits_DV)
        logits_DV.view(-1).index_add_(0, where, to_device(bias_N, logits_DV.device))
    _penalise(logits_DV, [(row, each) for row, each, adjustment in found if adjustment.has_penalties])


def restrict(logits_DV: torch.Tensor, sequences: Sequence[SequenceStep]) -> dict[int, TurretError]:
    """Exclude the tokens that the forms of answers do not allow, in place. Returns the errors by sequence."""
    rows, forms, errors = [], [], dict[int, TurretError]()
    for row, each in enumerate(sequences):
        if each.allowed:
            try:
                forms.append(np.frombuffer(each.allowed(), np.uint8))
                rows.append(row)
            except TurretError as error:
                errors[each.sequence_id] = error
    if rows:
        size = logits_DV.shape[-1]
        excluded_MV = np.ones((len(rows), size), np.bool_)
        for index, form in enumerate(forms):
            bits = np.unpackbits(form, count=min(size, 8 * len(form)), bitorder="little")
            np.equal(bits, 0, out=excluded_MV[index, : len(bits)])
        where_M = to_device(torch.tensor(rows), logits_DV.device)
        mask_MV = to_device(torch.from_numpy(excluded_MV), logits_DV.device)
        logits_DV[where_M] = logits_DV[where_M].masked_fill_(mask_MV, -torch.inf)
    return errors


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, made asynchronously."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _exclude(logits_DV: torch.Tensor, excluded: Sequence[tuple[int, frozenset[int]]]) -> None:
    """A tokenizer may have a token that ends an answer and that the model does not have."""
    size = logits_DV.shape[-1]
    known = [(row, [each for each in token_ids if each < size]) for row, token_ids in excluded]
    if known:
        logits_DV.view(-1).index_fill_(0, _elements(known, logits_DV), -torch.inf)


def _elements(tokens: Sequence[tuple[int, Sequence[int]]], logits_DV: torch.Tensor) -> torch.Tensor:
    """The indices of rows and their tokens in the flat tensor."""
    size = logits_DV.shape[-1]
    flat = [row * size + token_id for row, token_ids in tokens for token_id in token_ids]
    return to_device(torch.tensor(flat, dtype=torch.int64), logits_DV.device)


def _penalise(logits_DV: torch.Tensor, penalised: Sequence[tuple[int, SequenceStep]]) -> None:
    """Divide positive logits of the tokens so far and multiply negative ones (arXiv 1909.05858), and subtract
    the other penalties of the answer's tokens. A token that comes again gets the same logit again.
    """
    if not penalised:
        return
    device, flat = logits_DV.device, logits_DV.view(-1)
    where, generated, penalties = _histories(penalised, logits_DV.shape[-1])
    where_N, generated_N = to_device(where, device), to_device(generated, device)
    repetition_N, frequency_N, presence_N = to_device(penalties, device).unbind()
    counts_N = torch.zeros_like(flat).index_add_(0, where_N, generated_N)[where_N]
    logits_N = flat[where_N]
    logits_N = torch.where(logits_N > 0, logits_N / repetition_N, logits_N * repetition_N)
    logits_N -= frequency_N * counts_N
    logits_N -= presence_N * (counts_N > 0)
    # A tiny repetition penalty must not make infinities.
    flat[where_N] = logits_N.clamp_(max=torch.finfo(logits_N.dtype).max)


def _histories(
    penalised: Sequence[tuple[int, SequenceStep]], size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the tokens of all rows: their indices in the flat tensor, 1 for each that is the answer's and 0 for
    the others, and their penalties, [3, N].
    """
    histories = [np.frombuffer(each.history or b"", np.int64) for _, each in penalised]
    lengths_P = np.array([len(history) for history in histories])
    prompts_P = lengths_P - np.array([each.num_generated for _, each in penalised])
    begins_P = lengths_P.cumsum() - lengths_P
    generated_N = np.arange(lengths_P.sum()) >= np.repeat(begins_P + prompts_P, lengths_P)
    rows_N = np.repeat([row for row, _ in penalised], lengths_P)
    settings = [
        (it.repetition_penalty, it.frequency_penalty, it.presence_penalty)
        for it in (each.sampling.adjustment for _, each in penalised if each.sampling)
        if it is not None
    ]
    penalties_3N = np.repeat(np.array(settings, np.float32).T, lengths_P, axis=1)
    where_N = np.concatenate(histories) + rows_N * size
    return (
        torch.from_numpy(where_N),
        torch.from_numpy(generated_N.astype(np.float32)),
        torch.from_numpy(penalties_3N),
    )
