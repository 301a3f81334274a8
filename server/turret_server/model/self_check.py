"""Whether a model computes with the server's attention what it computes with transformers' own.

The gate knows what goes wrong; this finds what nobody knew: attention that looks at later tokens, that a
layer calls twice, or that needs more than keys, values and positions. Part of every start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedModel

from turret_server.engine.step import DeviceLostError
from turret_server.errors import UnsupportedModelError
from turret_server.model import attention

# The root mean square of the differences of logits, in standard deviations of all. One token that rounding
# sends to another expert must not count as much as what is wrong everywhere.
_TOLERANCES = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.05}


class Compute(Protocol):
    def __call__(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, set[int]]:
        """The logits of every token of a batch of prompts, [T, vocabulary], and the layers that called the
        server's attention.
        """


def check_model(
    model: PreTrainedModel, compute: Compute, *, num_layers: int, lengths: tuple[int, int]
) -> None:
    """Compares a short random prompt, alone and beside another, with eager attention on the same weights.

    Args:
        model: a model whose modules are adapted.
        compute: computes batches with it.
        num_layers: its layers with attention.
        lengths: tokens of the prompt and of the other; 0 if there is no room for another.

    Raises:
        UnsupportedModelError: it computes something else, or fails.
    """

    def refuse(why: str) -> UnsupportedModelError:
        model_type = model.config.model_type
        return UnsupportedModelError(f"{model_type} models are not supported: {why}", model=model_type)

    prompt, other = _prompts(model.get_input_embeddings().weight.shape[0], *lengths)
    try:
        alone_TV, layers = compute([prompt])
        beside_TV, _ = compute([other, prompt]) if other else (alone_TV, layers)
        with _eager_attention(model):
            eager_TV, _ = compute([prompt])
    except (MemoryError, DeviceLostError):
        raise
    except Exception as error:
        raise refuse(
            f"a first prompt failed with {type(error).__name__}: {error}; use a model of another type"
        ) from error
    if len(layers) != num_layers:
        raise refuse(
            f"{len(layers)} of {num_layers} layers call the attention function; use a model in which every "
            "layer does"
        )
    if not eager_TV.isfinite().all():
        raise refuse(
            f"the logits of a first prompt are not finite in {str(eager_TV.dtype).removeprefix('torch.')}; "
            "use another --dtype, such as bfloat16, or a checkpoint whose weights are finite"
        )
    for found_TV, where in ((alone_TV, "alone"), (beside_TV[len(other) :], "beside another")):
        difference = _difference(found_TV, eager_TV)
        if not difference <= _TOLERANCES[alone_TV.dtype]:
            raise refuse(
                f"the logits of a prompt {where} differ from those with transformers' eager attention by "
                f"{difference:.2g} standard deviations; use a model of another type"
            )


def _prompts(vocab_size: int, first: int, second: int) -> tuple[list[int], list[int]]:
    random = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocab_size, (first + second,), generator=random).tolist()
    return token_ids[:first], token_ids[first:]


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    decoder = model.get_decoder()  # the towers of a multimodal model have their own
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(attention.NAME)


def _difference(found_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """The root mean square of the differences of logits, in standard deviations of the expected ones."""
    expected_TV = expected_TV.float()
    return ((found_TV.float() - expected_TV).square().mean().sqrt() / expected_TV.std()).item()
