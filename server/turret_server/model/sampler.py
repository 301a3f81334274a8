"""From logits to tokens. What one row gets depends on that row, its parameters, its seed and its position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from turret_server.engine.request import SamplingParams
from turret_server.engine.step import SequenceStep, StepResult


class Sampler:
    """Greedy at temperature 0; otherwise temperature, top-k and top-p, in the order of transformers."""

    def sample(self, logits_SV: torch.Tensor, sequences: Sequence[SequenceStep]) -> StepResult:
        """One token for each row; a row with a NaN or only infinities gets an error instead."""
        logits_SV = logits_SV.float()
        usable_S = torch.isfinite(logits_SV.amax(dim=-1)).tolist()
        greedy_S = logits_SV.argmax(dim=-1).tolist()
        token_ids, errors = {}, {}
        for index, sequence in enumerate(sequences):
            assert sequence.sampling is not None
            if not usable_S[index]:
                errors[sequence.sequence_id] = "the model's logits are not finite"
            elif sequence.sampling.temperature == 0:
                token_ids[sequence.sequence_id] = greedy_S[index]
            else:
                token_ids[sequence.sequence_id] = _draw(
                    logits_SV[index], sequence.sampling, sequence.num_generated
                )
        return StepResult(token_ids=token_ids, errors=errors)


def _draw(logits_V: torch.Tensor, sampling: SamplingParams, position: int) -> int:
    probabilities_V, token_ids_V = torch.sort(
        torch.softmax(logits_V / sampling.temperature, dim=-1), descending=True
    )
    if sampling.top_k:
        probabilities_V = probabilities_V[: sampling.top_k]
    # A token stays as long as those before it do not reach top_p, so that one always does.
    before_V = probabilities_V.cumsum(dim=-1) - probabilities_V
    kept_V = torch.where(before_V < sampling.top_p * probabilities_V.sum(), probabilities_V, 0.0)
    generator = torch.Generator().manual_seed(_seed(sampling.seed, position))
    chosen = torch.multinomial(kept_V.cpu(), 1, generator=generator)
    return int(token_ids_V[chosen.to(token_ids_V.device)].item())


def _seed(seed: int, position: int) -> int:
    """A seed of its own for every token, so that a request computed again draws the same ones."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
