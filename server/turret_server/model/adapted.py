"""Replacements of the base's modules, which apply to each token the changes of its adapters.

Each computes the base's output for the whole batch, and then the changes of the adapters in the step, if any.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from turret_adapters.spec import ModuleKind, ModuleShape, Part
from turret_server.kernels import LoraRows, NF4Weight, Ops, PackedNF4Weight, ReferenceOps
from turret_server.model.context import StepContext, current_step
from turret_server.model.deltas import DeltaBatch


class Adapted(nn.Module):
    """A replacement; `name` is the path of the module that it replaces."""

    def __init__(self, name: str, shape: ModuleShape) -> None:
        super().__init__()
        self.name = name
        self.shape = shape


class AdaptedLinear(Adapted):
    """A linear, quantised or, where the checkpoint keeps it so, in the model's dtype; x [1, T, in_features].
    See `Part` for what it computes.
    """

    def __init__(
        self, name: str, weight: NF4Weight | PackedNF4Weight | torch.Tensor, bias: nn.Parameter | None
    ) -> None:
        if isinstance(weight, torch.Tensor):
            out_features, in_features = weight.shape
        else:
            out_features, in_features = weight.out_features, weight.in_features
        super().__init__(name, _shape(ModuleKind.LINEAR, in_features, out_features, bias))
        self.weight = weight
        self.bias = bias
        self.group: LinearGroup | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = current_step()
        x_TI = x.reshape(-1, self.shape.in_features)
        grouped = None if self.group is None else self.group.output(self, x, step)
        if grouped is not None:
            y_TO = grouped if self.bias is None else grouped + self.bias
        elif step.deltas is None:
            y_TO = _product(x_TI, self.weight, step)
            if self.bias is not None:
                y_TO += self.bias
        else:
            y_TO = self._adapted(x_TI, step, step.deltas)
        return y_TO.view(*x.shape[:-1], self.shape.out_features)

    def _adapted(self, x_TI: torch.Tensor, step: StepContext, deltas: DeltaBatch) -> torch.Tensor:
        changes = deltas.changes(self.name)
        if changes:
            x_TI = _scale(x_TI, self.name, Part.INPUT_GAIN, step, deltas)
        y_TO = _product(x_TI, self.weight, step, deltas.lora(self.name))
        if not changes:
            return y_TO if self.bias is None else y_TO + self.bias
        y_TO = _scale(y_TO, self.name, Part.GAIN, step, deltas)
        return _add_bias(y_TO, self.name, self.bias, step, deltas)


class LinearGroup:
    """Quantised linears that the model calls one after another with the same input: the first computes the
    product of all.
    """

    def __init__(self, linears: Sequence[AdaptedLinear], weight: PackedNF4Weight) -> None:
        self._linears = linears
        self._names = tuple(each.name for each in linears)
        self._weight = weight
        self._sizes = [each.shape.out_features for each in linears]
        self._columns = tuple(pairwise(accumulate(self._sizes, initial=0)))
        # The input, and the outputs of linears that are still to be called.
        self._computed: tuple[torch.Tensor, dict[AdaptedLinear, torch.Tensor]] | None = None
        for each in linears:
            each.group = self

    def output(self, linear: AdaptedLinear, x: torch.Tensor, step: StepContext) -> torch.Tensor | None:
        """A linear's output without its bias, [T, O]; None if it must compute it itself."""
        deltas = step.deltas
        if deltas is not None and any(map(deltas.changes, self._names)):
            return None
        if linear is self._linears[0]:
            self._computed = x, self._compute(x, step)
        if self._computed is None or self._computed[0] is not x:
            self._dissolve()
            return None
        outputs = self._computed[1]
        y_TO = outputs.pop(linear)
        if not outputs:
            self._computed = None
        return y_TO

    def _compute(self, x: torch.Tensor, step: StepContext) -> dict[AdaptedLinear, torch.Tensor]:
        rows = None if step.deltas is None else step.deltas.grouped_lora(self._names, self._columns)
        y_TO = _product(x.reshape(-1, x.shape[-1]), self._weight, step, rows)
        return dict(zip(self._linears, torch.split(y_TO, self._sizes, dim=1), strict=True))

    def _dissolve(self) -> None:
        """The model calls them with other inputs: each computes its own from now on."""
        self._computed = None
        for each in self._linears:
            each.group = None


class AdaptedHead(Adapted):
    """The linear from hidden states to logits, unquantised; x [1, S, hidden], only of tokens that sample.

    If an adapter of the step has a larger vocabulary than the base, all rows have its number of logits.
    """

    def __init__(self, name: str, module: nn.Linear) -> None:
        super().__init__(name, _shape(ModuleKind.HEAD, module.in_features, module.out_features, module.bias))
        self.module = module
        self.weight = module.weight
        self.bias = module.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = current_step()
        x_SE, deltas = x[0], step.head_deltas
        y_SV = step.ops.linear(x_SE, self.weight)
        if deltas is None:
            return (y_SV if self.bias is None else y_SV + self.bias)[None]
        found = list(deltas.with_parts(self.name, Part.WEIGHT, Part.TOKENS, Part.LORA_A))
        largest = max((delta.vocab_size for _, delta, _ in found), default=0)
        if largest > self.shape.out_features:
            y_SV = functional.pad(y_SV, (0, largest - self.shape.out_features))
        for segment, delta, weight in found:
            own_x, own_y = x_SE[segment.rows], y_SV[segment.rows]
            if Part.WEIGHT in delta.parts:
                weight_VE = delta.parts[Part.WEIGHT].gather(step.arena)
                own_y[:, : len(weight_VE)] = own_x @ weight_VE.T
            if Part.TOKENS in delta.parts:
                own_y[:, delta.token_ids] = own_x @ delta.parts[Part.TOKENS].gather(step.arena).T
            if Part.LORA_A in delta.parts:
                a_RE = delta.parts[Part.LORA_A].gather(step.arena).float()
                b_VR = delta.parts[Part.LORA_B].gather(step.arena).float()
                shrunk_SR = own_x.float() @ a_RE.T * (weight * delta.scaling)
                own_y[:, : len(b_VR)] += (shrunk_SR @ b_VR.T).to(y_SV.dtype)
        y_SV = _scale(y_SV, self.name, Part.GAIN, step, deltas)
        return _add_bias(y_SV, self.name, self.bias, step, deltas)[None]


class AdaptedEmbedding(Adapted):
    """The input embedding; token ids [1, T]. What its class does with a row, such as scaling it, still
    applies.
    """

    def __init__(self, name: str, module: nn.Embedding) -> None:
        super().__init__(
            name, _shape(ModuleKind.EMBEDDING, module.num_embeddings, module.embedding_dim, None)
        )
        # It affects gradients only, and would be out of range for the few rows that `_embed` passes.
        module.padding_idx = None
        self.module = module
        self.weight = module.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        step = current_step()
        if step.deltas is None:
            y: torch.Tensor = self.module(token_ids)
            return y
        # Tokens beyond the base's are those of adapters that have rows for them.
        of_base = token_ids.clamp(max=self.shape.in_features - 1)
        y = self.module(of_base)
        for segment, delta, weight in step.deltas.with_parts(
            self.name, Part.WEIGHT, Part.TOKENS, Part.LORA_A
        ):
            rows, parts = segment.rows, delta.parts
            own_T = token_ids[0, rows]
            if Part.WEIGHT in parts:
                y[0, rows] = self._embed(parts[Part.WEIGHT].gather(step.arena, own_T))
            if Part.TOKENS in parts:
                rows_TE = self.weight[of_base[0, rows]]
                index_T = torch.searchsorted(delta.token_ids, own_T).clamp_(max=len(delta.token_ids) - 1)
                is_replaced_T = delta.token_ids[index_T] == own_T
                rows_TE[is_replaced_T] = parts[Part.TOKENS].gather(step.arena, index_T[is_replaced_T])
                y[0, rows] = self._embed(rows_TE)
            if Part.LORA_A in parts:
                a_TR = parts[Part.LORA_A].gather(step.arena, own_T).float()
                b_RE = parts[Part.LORA_B].gather(step.arena).float()
                scale = weight * delta.scaling * getattr(self.module, "embed_scale", 1.0)
                y[0, rows] += (a_TR @ b_RE * scale).to(y.dtype)
        return _scale(y[0], self.name, Part.GAIN, step, step.deltas)[None]

    def _embed(self, rows_TE: torch.Tensor) -> torch.Tensor:
        """The module's output for these rows of its weight."""
        indices = torch.arange(len(rows_TE), device=rows_TE.device)
        embedded: torch.Tensor = functional_call(self.module, {"weight": rows_TE}, (indices,))
        return embedded


class AdaptedNorm(Adapted):
    """Any module whose only parameters are a weight, and perhaps a bias, per feature; x [1, T, …]."""

    def __init__(self, name: str, module: nn.Module) -> None:
        weight = module.get_parameter("weight")
        width = weight.shape[0]
        super().__init__(name, _shape(ModuleKind.NORM, width, width, getattr(module, "bias", None)))
        self.module = module
        self.weight = weight
        self.epsilon = rms_epsilon(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = current_step()
        y: torch.Tensor
        if self.epsilon is None or x.dtype != self.weight.dtype:
            y = self.module(x)
        else:
            y = step.ops.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.epsilon).view(x.shape)
        if step.deltas is None or not step.deltas.changes(self.name):
            return y
        for segment, delta, _ in step.deltas.with_parts(self.name, Part.WEIGHT, Part.BIAS):
            own = {
                name: delta.parts[part].vector(step.arena)
                for name, part in (("weight", Part.WEIGHT), ("bias", Part.BIAS))
                if part in delta.parts
            }
            y[:, segment.rows] = functional_call(self.module, own, (x[:, segment.rows],))
        return y


def _shape(kind: ModuleKind, in_features: int, out_features: int, bias: torch.Tensor | None) -> ModuleShape:
    return ModuleShape(
        kind=kind, in_features=in_features, out_features=out_features, has_bias=bias is not None
    )


def _product(
    x_TI: torch.Tensor,
    weight: NF4Weight | PackedNF4Weight | torch.Tensor,
    step: StepContext,
    rows: LoraRows | None = None,
) -> torch.Tensor:
    """The weight's product, and what the LoRA rows add to it."""
    if isinstance(weight, torch.Tensor):
        y_TO = step.ops.linear(x_TI, weight)
        if rows is not None:
            step.ops.lora_add(y_TO, x_TI, step.arena.flat, rows)
        return y_TO
    if rows is None:
        return step.ops.nf4_linear(x_TI, weight)
    return step.ops.adapted_linear(x_TI, weight, step.arena.flat, rows)


def _scale(x_TX: torch.Tensor, name: str, part: Part, step: StepContext, deltas: DeltaBatch) -> torch.Tensor:
    """Multiplies by the gains of adapters; the input itself is left alone, others read it too."""
    found = list(deltas.with_parts(name, part))
    if found:
        x_TX = x_TX.clone()
    for segment, delta, _ in found:
        gain_X = delta.parts[part].vector(step.arena)
        x_TX[segment.rows, : len(gain_X)] *= gain_X
    return x_TX


def _add_bias(
    y_TO: torch.Tensor, name: str, bias: torch.Tensor | None, step: StepContext, deltas: DeltaBatch
) -> torch.Tensor:
    """Adds the bias, or the adapter's own where it has one."""
    own = list(deltas.with_parts(name, Part.BIAS))
    if not own and (bias is None or len(bias) == y_TO.shape[1]):
        return y_TO if bias is None else y_TO + bias
    # A head may have more logits than biases, see `AdaptedHead`.
    bias_TO = torch.zeros_like(y_TO)
    if bias is not None:
        bias_TO[:, : len(bias)] = bias
    for segment, delta, _ in own:
        bias_O = delta.parts[Part.BIAS].vector(step.arena)
        bias_TO[segment.rows, : len(bias_O)] = bias_O
    return y_TO + bias_TO


def pack(linear: Linear4bit, ops: Ops) -> NF4Weight | PackedNF4Weight:
    """The weight of a linear, in the layout of `ops`."""
    state = linear.weight.quant_state
    out_features, in_features = state.shape
    # In whatever dtype they are stored (bnb_4bit_quant_storage), a byte has two codes.
    codes = linear.weight.data.view(torch.uint8).reshape(-1, 1)
    return ops.pack_nf4(NF4Weight(codes, state, in_features, out_features))


def adapt_modules(model: PreTrainedModel, ops: Ops) -> None:
    """Replaces every linear, the head, the input embedding and the norms."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        adapted: nn.Module | None = None
        if isinstance(module, Linear4bit):
            adapted = AdaptedLinear(name, pack(module, ops), module.bias)
        elif module is head:
            adapted = AdaptedHead(name, module)
        elif module is embedding:
            adapted = AdaptedEmbedding(name, module)
        elif isinstance(module, nn.Linear):
            adapted = AdaptedLinear(name, module.weight, module.bias)
        elif _is_norm(module):
            adapted = AdaptedNorm(name, module)
        if adapted is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapted)


def base_modules(model: nn.Module) -> dict[str, ModuleShape]:
    """The modules that adapters can change, by path, in the model's order."""
    return {module.name: module.shape for module in model.modules() if isinstance(module, Adapted)}


def rms_epsilon(module: nn.Module) -> float | None:
    """The epsilon with which a module computes `Ops.rms_norm`; None if it computes anything else.

    Decided by running it in the dtype of its weight, with a random weight, on rows whose scales reach from
    those where epsilon dominates to those where it vanishes. It must return the bits of the reference with
    one of the module's float attributes as epsilon. So a norm that multiplies by 1 + weight, rounds
    elsewhere, ignores epsilon or subtracts the mean is not fused.
    """
    weight_I = module.get_parameter("weight")
    if _parameter_names(module) != {"weight"}:
        return None
    # A meta tensor has no numbers; the formula is the same on any device.
    device = "cpu" if weight_I.is_meta else weight_I.device
    random = torch.Generator().manual_seed(0)
    scales_T1 = torch.logspace(-5, 3, 32)[:, None]
    x_TI = torch.randn(len(scales_T1), len(weight_I), generator=random) * scales_T1
    probe_I = torch.randn(len(weight_I), generator=random)
    x_TI, probe_I = (each.to(device, weight_I.dtype) for each in (x_TI, probe_I))
    found_1TI = functional_call(module, {"weight": probe_I}, (x_TI[None],))
    for epsilon in (value for value in vars(module).values() if isinstance(value, float)):
        if torch.equal(found_1TI[0], ReferenceOps().rms_norm(x_TI, probe_I, epsilon)):
            return epsilon
    return None


def _is_norm(module: nn.Module) -> bool:
    names = _parameter_names(module)
    return "weight" in names and names <= {"weight", "bias"} and module.get_parameter("weight").ndim == 1


def _parameter_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}
