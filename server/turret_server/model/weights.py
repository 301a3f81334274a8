"""The base's weights as numbers, for what of an adapter can only be computed with them."""

from __future__ import annotations

import torch
from torch import nn

from turret_server.kernels import Ops
from turret_server.model.adapted import AdaptedLinear


class ModelWeights:
    """See `turret_adapters.host.BaseWeights`."""

    def __init__(self, model: nn.Module, ops: Ops) -> None:
        self._model = model
        self._ops = ops

    @torch.inference_mode()
    def weight(self, module: str) -> torch.Tensor:
        found = self._model.get_submodule(module)
        if not isinstance(found, AdaptedLinear):
            return found.get_parameter("weight").float().cpu()
        # Whatever the layout, the product with the identity is the weight that a step multiplies with.
        dtype = next(self._model.parameters()).dtype
        device = found.weight.data.device
        identity_II = torch.eye(found.shape.in_features, dtype=dtype, device=device)
        return self._ops.nf4_linear(identity_II, found.weight).T.float().cpu().contiguous()

    @torch.inference_mode()
    def bias(self, module: str) -> torch.Tensor | None:
        found = self._model.get_submodule(module)
        bias = found.bias if isinstance(found, AdaptedLinear) else getattr(found, "bias", None)
        return None if bias is None else bias.float().cpu()
