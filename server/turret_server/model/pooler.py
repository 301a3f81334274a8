"""Makes the numbers of pooling requests of the hidden states that a step has computed."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from turret_adapters.spec import HeadTask
from turret_server.engine.pooling import Rows
from turret_server.engine.step import VIRTUAL_TOKEN, PoolingStep, SequenceStep
from turret_server.errors import NonFiniteLogitsError, TurretError
from turret_server.model.arena import Arena
from turret_server.model.deltas import ResidentDeltas
from turret_server.model.heads import Heads
from turret_server.model.load import LoadedModel

Pooled = Sequence[tuple[SequenceStep, slice]]


class Pooler:
    """Each sequence is pooled alone, so that its numbers do not depend on the others of its batch."""

    def __init__(self, loaded: LoadedModel, arena: Arena) -> None:
        self._loaded = loaded
        self._arena = arena

    @cached_property
    def _heads(self) -> Heads:
        return Heads(self._loaded.model.config)

    def pool(
        self, states_TE: torch.Tensor, pooled: Pooled, resident: Mapping[str, ResidentDeltas]
    ) -> tuple[dict[int, Rows], dict[int, TurretError]]:
        """The numbers of each sequence, or its error; `resident` are the adapters in the arena, by revision.
        Inside a `step_context` whose deltas are those of the first tokens of sequences for a SEQ_CLS head.
        """
        rows: dict[int, Rows] = {}
        errors: dict[int, TurretError] = {}
        parameters: dict[str | None, Mapping[str, torch.Tensor]] = {}
        first_of = self._first_states(states_TE, pooled)
        for sequence, tokens in pooled:
            pooling, states_nE = sequence.pooling, states_TE[tokens]
            assert pooling is not None
            if pooling.task is None:
                found_NX = _vector(states_nE, pooling.weights)
            else:
                if pooling.head not in parameters:
                    parameters[pooling.head] = self._parameters(pooling.head, resident)
                first_E = first_of.get(sequence.sequence_id)
                found_NX = self._logits(sequence, pooling, parameters[pooling.head], states_nE, first_E)
            rows[sequence.sequence_id] = Rows(
                found_NX.shape[1], array("d", found_NX.double().flatten().tolist())
            )
            if not found_NX.isfinite().all():
                errors[sequence.sequence_id] = NonFiniteLogitsError(
                    "The numbers of this text are not finite with these adapters. Request smaller adapter "
                    "weights, or serve the model in another dtype (--dtype)."
                )
        return rows, errors

    def _logits(
        self,
        sequence: SequenceStep,
        pooling: PoolingStep,
        parameters: Mapping[str, torch.Tensor],
        states_nE: torch.Tensor,
        pooled_E: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the head computes: of all states, or on a decoder of the last; of no virtual token."""
        assert pooling.task is not None
        if pooling.task is HeadTask.SEQ_CLS and self._loaded.encoder is None:
            states_nE = states_nE[-1:]
        found_NX = self._heads(pooling.task, parameters, states_nE, pooled_E)
        if pooling.task.by_token:
            num_virtual = sum(token == VIRTUAL_TOKEN for token in sequence.token_ids)
            return found_NX[num_virtual:]
        return found_NX

    def _parameters(
        self, revision: str | None, resident: Mapping[str, ResidentDeltas]
    ) -> Mapping[str, torch.Tensor]:
        of_base = self._loaded.head_weights
        if revision is None:
            return of_base
        own = {
            name: rows.gather(self._arena).view(shape)
            for name, (rows, shape) in resident[revision].head.items()
        }
        return {**of_base, **own}

    def _first_states(self, states_TE: torch.Tensor, pooled: Pooled) -> dict[int, torch.Tensor]:
        """What an encoder's pooler, if any, makes of the first state of each text for a SEQ_CLS head."""
        encoder = self._loaded.encoder
        wanted = [
            (sequence.sequence_id, tokens.start)
            for sequence, tokens in pooled
            if sequence.pooling and sequence.pooling.task is HeadTask.SEQ_CLS
        ]
        if encoder is None or encoder.pooler is None or not wanted:
            return {}
        ids, starts = zip(*wanted, strict=True)
        return dict(zip(ids, encoder.pool(states_TE[list(starts)]), strict=True))


def _vector(states_nE: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum in float64, [1, E], in which the order of tokens and chunks makes no difference."""
    weights_n = torch.tensor(weights, dtype=torch.float64, device=states_nE.device)
    own = weights_n.nonzero()[:, 0]
    return (weights_n[own, None] * states_nE[own].double()).sum(0, keepdim=True)
