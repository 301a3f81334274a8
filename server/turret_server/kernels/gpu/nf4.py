"""The NF4 product on a GPU: packed weights are dequantised on the way to the tensor cores.

A weight is packed into contiguous tiles of 64 out features by one quantisation block, in reading order; its
scales stay in rows. A byte holds two elements that are half a block apart.

The tile of the weight is the left matrix of the product and the tokens are its columns, so a token's sum runs
over the blocks in the same order for any number of tokens; how the sum is split depends on the weight's shape
and the GPU alone. This holds up to `MAX_FUSED_TOKENS` tokens. Above, the weight is dequantised to scratch
memory and multiplied by the matrix library, in the library's order: a token's bits are not those of a smaller
step, and may depend on the number of tokens.

Scales and codes are in float32. Up to `MAX_FUSED_TOKENS` the codes alone are rounded to the dtype, for the
tensor cores; above, the products of codes and scales.

For shape suffixes see `ops.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import dequantize_blockwise

from turret_server.kernels.gpu.jit import EXACT, dot_type, kernel, num_multiprocessors
from turret_server.kernels.ops import NF4Weight, PackedNF4Weight

MAX_FUSED_TOKENS = 64

_TILE = 64  # out features
_LARGEST_BLOCK = 128
_MIN_BLOCKS = 4  # of a program
_STAGES = 5  # tiles in flight while one is multiplied
_SUMMED = 1024  # outputs of a program that adds up splits


def is_packable(weight: NF4Weight) -> bool:
    """Whether the kernel takes the weight: rows of whole quantisation blocks of at most 128."""
    block: int = weight.state.blocksize
    return block <= _LARGEST_BLOCK and weight.in_features % block == 0


def pack(weight: NF4Weight) -> PackedNF4Weight:
    """Reorders bitsandbytes' rows of nibbles, whose first is in the higher four bits, into tiles."""
    state, block = weight.state, weight.state.blocksize
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    data = weight.data.reshape(weight.out_features, -1, block // 2)
    first, second = torch.stack((data >> 4, data & 15), dim=-1).flatten(-2).chunk(2, dim=-1)
    data = _padded(first | second << 4)
    return PackedNF4Weight(
        data=data.view(-1, _TILE, *data.shape[1:]).transpose(1, 2).contiguous(),
        absmax=_padded(absmax.view(weight.out_features, -1)),
        code=state.code.to(weight.data.device),
        block_size=block,
        in_features=weight.in_features,
        out_features=weight.out_features,
    )


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Padded with rows of zeros to a whole number of tiles."""
    missing = -len(rows) % _TILE
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows


def linear(x_TI: torch.Tensor, weight: PackedNF4Weight) -> torch.Tensor:
    """See `ops.Ops`."""
    x_TI = x_TI.contiguous()
    if len(x_TI) > MAX_FUSED_TOKENS:
        return torch.nn.functional.linear(x_TI, dequantize(weight, x_TI.dtype))
    num_tokens = len(x_TI)
    y_TO = torch.empty(num_tokens, weight.out_features, dtype=x_TI.dtype, device=x_TI.device)
    num_tiles, num_blocks = weight.data.shape[:2]
    num_splits = _num_splits(num_tiles, num_blocks, num_multiprocessors(x_TI.device))
    sums = y_TO
    if num_splits > 1:
        sums = torch.empty(num_splits, *y_TO.shape, dtype=torch.float32, device=x_TI.device)
    _multiply[(num_tiles, num_splits)](
        sums,
        x_TI,
        weight.data,
        weight.absmax,
        weight.code,
        num_tokens,
        weight.in_features,
        weight.out_features,
        num_splits,
        HALF=weight.block_size // 2,
        TILE=_TILE,
        TOKENS=max(16, triton.next_power_of_2(num_tokens)),
        STAGES=_STAGES,
        DOT=dot_type(x_TI.dtype),
        num_warps=4,
    )
    if num_splits > 1:
        grid = (triton.cdiv(y_TO.numel(), _SUMMED),)
        _sum_splits[grid](y_TO, sums, y_TO.numel(), num_splits, COUNT=_SUMMED)
    return y_TO


def dequantize(weight: PackedNF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight, [O, I], rounded once."""
    shape = (weight.out_features, weight.in_features)
    weight_OI = torch.empty(shape, dtype=dtype, device=weight.data.device)
    _dequantize[weight.data.shape[:2]](
        weight_OI,
        weight.data,
        weight.absmax,
        weight.code,
        *shape,
        HALF=weight.block_size // 2,
        TILE=_TILE,
    )
    return weight_OI


def _num_splits(num_tiles: int, num_blocks: int, num_multiprocessors: int) -> int:
    """Parts of a sum, for about two programs on each multiprocessor."""
    wanted = 2 * num_multiprocessors // num_tiles
    return max(1, min(wanted, num_blocks // _MIN_BLOCKS))


@kernel("num_tokens", "num_splits")
def _multiply(
    sums: tl.tensor,
    x_TI: tl.tensor,
    data: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    num_tokens: tl.tensor,
    num_in: tl.tensor,
    num_out: tl.tensor,
    num_splits: tl.tensor,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """One part of the sums for a tile of out features, [splits, T, O]."""
    tile, split = tl.program_id(0), tl.program_id(1)
    num_blocks = num_in // (2 * HALF)
    row, column, token = tl.arange(0, TILE), tl.arange(0, HALF), tl.arange(0, TOKENS)
    here = token[None, :] < num_tokens
    x_in = x_TI + token[None, :] * num_in + column[:, None]
    data += tile.to(tl.int64) * num_blocks * TILE * HALF
    absmax += (tile * TILE + row) * num_blocks
    total = tl.zeros((TILE, TOKENS), tl.float32)
    low, high = split * num_blocks // num_splits, (split + 1) * num_blocks // num_splits
    for block in tl.range(low, high, num_stages=STAGES):
        packed = tl.load(data + block * TILE * HALF + row[:, None] * HALF + column[None, :]).to(tl.int32)
        x_first = tl.load(x_in + block * 2 * HALF, here, 0.0).to(DOT)
        x_second = tl.load(x_in + block * 2 * HALF + HALF, here, 0.0).to(DOT)
        # Rounded to the dtype of the tokens also where DOT is float32, in the interpreter.
        first = tl.load(code + (packed & 15)).to(x_TI.dtype.element_ty).to(DOT)
        second = tl.load(code + (packed >> 4)).to(x_TI.dtype.element_ty).to(DOT)
        product = tl.dot(first, x_first, input_precision=EXACT)
        product = tl.dot(second, x_second, product, input_precision=EXACT)
        total += product * tl.load(absmax + block)[:, None]
    out = tile * TILE + row
    sums += (split * num_tokens + token[None, :]) * num_out + out[:, None]
    tl.store(sums, total, here & (out[:, None] < num_out))


@kernel("num_outputs", "num_splits")
def _sum_splits(
    y: tl.tensor, sums: tl.tensor, num_outputs: tl.tensor, num_splits: tl.tensor, COUNT: tl.constexpr
) -> None:
    index = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    here = index < num_outputs
    total = tl.zeros((COUNT,), tl.float32)
    for split in range(num_splits):
        total += tl.load(sums + split * num_outputs + index, here, 0.0)
    tl.store(y + index, total, here)


@kernel()
def _dequantize(
    weight_OI: tl.tensor,
    data: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    num_out: tl.tensor,
    num_in: tl.tensor,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    tile, block = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, TILE), tl.arange(0, HALF)
    place = (tile * tl.num_programs(1) + block).to(tl.int64) * TILE * HALF
    packed = tl.load(data + place + row[:, None] * HALF + column[None, :]).to(tl.int32)
    out = (tile * TILE + row).to(tl.int64)[:, None]
    scale = tl.load(absmax + out * tl.num_programs(1) + block)
    into = weight_OI + out * num_in + block * 2 * HALF + column[None, :]
    tl.store(into, tl.load(code + (packed & 15)) * scale, out < num_out)
    tl.store(into + HALF, tl.load(code + (packed >> 4)) * scale, out < num_out)
