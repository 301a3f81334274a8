"""Whether a model computes with the server's attention what it computes with transformers' own.

The gate knows what goes wrong; this finds what nobody knew: attention that looks at later tokens, that a
layer calls twice, or that needs more than keys, values and positions; a state that is kept from one step to
the next. Part of every start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from turret_server.engine.step import DeviceLostError
from turret_server.errors import UnsupportedModelError
from turret_server.model import attention
from turret_server.model.classes import left_out

# The root mean square of the differences of logits, in standard deviations of all. One token that rounding
# sends to another expert must not count as much as what is wrong everywhere.
_TOLERANCES = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.05}


class Compute(Protocol):
    def __call__(
        self, prompts: Sequence[Sequence[int]], parts: Sequence[slice] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Computes a part of each prompt of a batch, after those before it, or all of it. Returns the logits
        of each token, [T, vocabulary], and the layer of each call of the server's attention.
        """


def check_model(
    model: PreTrainedModel, compute: Compute, *, num_layers: int, lengths: tuple[int, int]
) -> None:
    """Compares a short random prompt, in two steps beside another, with eager attention on the same weights.

    It costs the forward passes of three steps: as few as show what goes wrong.

    Args:
        model: a model whose modules are adapted.
        compute: computes batches with it.
        num_layers: its layers with attention.
        lengths: tokens of the prompt and of the other; 0 if there is no room for another.

    Raises:
        UnsupportedModelError: it computes something else, or fails.
    """
    prompt, other = _prompts(model.get_input_embeddings().weight.shape[0], *lengths)
    prompts = [each for each in (other, prompt) if each]  # what leaks, leaks to those behind
    halves = [len(each) // 2 for each in prompts]
    with _failure_refuses(model, "prompt"):
        first_TV, calls = compute(prompts, [slice(0, half) for half in halves])
        ends = [slice(half, len(each)) for half, each in zip(halves, prompts, strict=True)]
        second_TV, _ = compute(prompts, ends)
        with _eager_attention(model):
            eager_TV, _ = compute([prompt])
    _check_calls(model, calls, num_layers)
    _check_finite(model, eager_TV, "logits of a first prompt")
    expected = (eager_TV[: halves[-1]], eager_TV[halves[-1] :])
    for found_TV, expected_TV, step in zip((first_TV, second_TV), expected, ("first", "second"), strict=True):
        difference = _difference(found_TV[-len(expected_TV) :], expected_TV)
        if not difference <= _TOLERANCES[found_TV.dtype]:
            raise _refusal(
                model,
                f"the logits of a prompt's {step} step, beside another, differ from those with transformers' "
                f"eager attention by {difference:.2g} standard deviations; use a model of another type",
            )


def check_encoder(
    model: PreTrainedModel, compute: Compute, *, num_layers: int, lengths: tuple[int, int]
) -> None:
    """Compares a short random text, beside another, with transformers on the same weights, with eager
    attention and positions of its own.

    Args:
        model: an encoder whose modules are adapted.
        compute: computes batches with it; hidden states instead of logits.
        num_layers: its layers with attention.
        lengths: tokens of the text and of the other; 0 if there is no room for another.

    Raises:
        UnsupportedModelError: it computes something else, or fails.
    """
    text, other = _prompts(model.get_input_embeddings().weight.shape[0], *lengths)
    with _failure_refuses(model, "text"):
        found_TE, calls = compute([each for each in (other, text) if each])
        with _eager_attention(model), _own_positions(model):
            expected_TE, _ = compute([text])
    _check_calls(model, calls, num_layers)
    _check_finite(model, expected_TE, "hidden states of a first text")
    difference = _difference(found_TE[-len(text) :], expected_TE)
    if not difference <= _TOLERANCES[found_TE.dtype]:
        raise _refusal(
            model,
            f"the hidden states of a text, beside another, differ from those of transformers with eager "
            f"attention by {difference:.2g} standard deviations; use a model of another type",
        )


def _refusal(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    model_type = model.config.model_type
    return UnsupportedModelError(f"{model_type} models are not supported: {why}", model=model_type)


@contextmanager
def _failure_refuses(model: PreTrainedModel, what: str) -> Iterator[None]:
    """An error within the block becomes a refusal of the model, unless it is the machine's."""
    try:
        yield
    except (MemoryError, DeviceLostError):
        raise
    except Exception as error:
        raise _refusal(
            model, f"a first {what} failed with {type(error).__name__}: {error}; use a model of another type"
        ) from error


def _check_calls(model: PreTrainedModel, calls: Sequence[int], num_layers: int) -> None:
    if sorted(calls) != list(range(num_layers)):
        raise _refusal(
            model,
            f"of {num_layers} layers, {len(set(calls))} call the attention function, {len(calls)} times; use "
            "a model in which every layer does once",
        )


def _check_finite(model: PreTrainedModel, numbers: torch.Tensor, what: str) -> None:
    if not numbers.isfinite().all():
        raise _refusal(
            model,
            f"the {what} are not finite in {_name(numbers.dtype)}; use another --dtype, such as bfloat16, or "
            "a checkpoint whose weights are finite",
        )


@contextmanager
def _own_positions(model: PreTrainedModel) -> Iterator[None]:
    """The model numbers the positions of a text itself within the block."""

    def drop(_: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {name: each for name, each in options.items() if name != "position_ids"}

    hook = model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prompts(vocab_size: int, first: int, second: int) -> tuple[list[int], list[int]]:
    random = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocab_size, (first + second,), generator=random).tolist()
    return token_ids[:first], token_ids[first:]


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    # Transformers warns of the towers that were taken out.
    decoder = model.get_decoder() if left_out(model) else model
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(attention.NAME)


def _difference(found_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """The root mean square of the differences of logits, in standard deviations of the expected ones."""
    expected_TV = expected_TV.float()
    return ((found_TV.float() - expected_TV).square().mean().sqrt() / expected_TV.std()).item()
