"""Intrinsics on vectors of 16 pairs of numbers, whose products accumulate in float32, for numba functions.

A pair is two neighbouring in features; its lane is the out feature, or the row. In bfloat16 on a CPU with
AVX512-BF16, a lane holds one pair, and `vdpbf16ps` multiplies two vectors and adds both products of a lane.
Otherwise the numbers are float32: 16 lanes with the first number of each pair, then 16 with the second.
"""

# ruff: noqa: ARG001 (numba fixes the signatures)
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.types.containers import Tuple, UniTuple
from numba.extending import intrinsic, register_model

from turret_server.kernels.cpu.llvm import vectors
from turret_server.kernels.cpu.llvm.vectors import LANES, Memory, call

PAIR_WIDTH = 2 * LANES  # numbers in a vector of pairs


def _features() -> frozenset[str]:
    """The instruction sets of the CPU that numba compiles for, by LLVM's names."""
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


_FEATURES = _features()
HAS_BF16_DOT = "avx512bf16" in _FEATURES
HAS_PERMUTE = bool(_FEATURES & {"avx2", "avx512f"})
HAS_WIDE_REGISTERS = "avx512f" in _FEATURES  # 32 of 16 lanes, otherwise at most 16 of 8

_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_HALVES = ir.VectorType(_I16, PAIR_WIDTH)
_WORDS = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


class _BFloat16(ir.Type):  # type: ignore[misc]  # llvmlite is not typed
    """llvmlite has no class for LLVM's bfloat."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOATS = ir.VectorType(_BFloat16(), PAIR_WIDTH)
_FLOAT_PAIRS = ir.VectorType(ir.FloatType(), PAIR_WIDTH)
_FLOAT_PAIRS_BITS = ir.VectorType(_I32, PAIR_WIDTH)
# Of AVX2's registers.
_BYTES, _SIXTEEN, _EIGHT = ir.VectorType(_I8, 32), ir.VectorType(_I16, 16), ir.VectorType(ir.FloatType(), 8)
_FIRSTS, _SECONDS = list(range(LANES)), list(range(LANES, PAIR_WIDTH))

_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic
_intrinsic_of_literals: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)


class _Pairs(types.Type):
    def __init__(self) -> None:
        super().__init__(name="bfloat16x32")


class _FloatPairs(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x32")


register_model(_Pairs)(lambda manager, kind: PrimitiveModel(manager, kind, _HALVES))
register_model(_FloatPairs)(lambda manager, kind: PrimitiveModel(manager, kind, _FLOAT_PAIRS))
pairs, float_pairs = _Pairs(), _FloatPairs()


@_intrinsic_of_literals
def load_pairs(_: Any, array: Any, index: Any, count: Any) -> Any:
    """`count` consecutive vectors of an array of uint16 (bfloat16) or float32."""
    result = UniTuple(pairs if array.dtype == types.uint16 else float_pairs, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory, index = Memory(context, builder, signature.args[0], arguments[0]), arguments[1]
        loaded = []
        for i in range(signature.return_type.count):
            at = builder.add(index, ir.Constant(index.type, i * PAIR_WIDTH))
            pointer = memory.pointer(at, _HALVES if memory.is_bf16 else _FLOAT_PAIRS)
            loaded.append(builder.load(pointer, align=memory.alignment))
        return context.make_tuple(builder, signature.return_type, loaded)

    return result(array, types.intp, count), generate


@_intrinsic
def store_pairs(_: Any, array: Any, index: Any, vectors: Any) -> Any:
    """Writes vectors one after another to an array of their element type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory, index = Memory(context, builder, signature.args[0], arguments[0]), arguments[1]
        for i, value in enumerate(cgutils.unpack_tuple(builder, arguments[2])):
            at = builder.add(index, ir.Constant(index.type, i * PAIR_WIDTH))
            builder.store(value, memory.pointer(at, value.type), align=memory.alignment)
        return context.get_dummy_value()

    return types.none(array, types.intp, vectors), generate


@_intrinsic_of_literals
def lookup_nf4(_: Any, table: Any, codes: Any, nibble: Any) -> Any:
    """The values of the 4-bit codes in bits 4 · nibble … 4 · nibble + 3 of both 16-bit halves of every lane.

    `vpermw` reads five bits, so the table holds the 16 values twice. Without AVX512, the codes are ordered
    otherwise, see `_bytes` in `nf4.py`.
    """
    shift = 4 * nibble.literal_value
    permute = _permute_bf16 if table.dtype == pairs else _permute_float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        [table] = cgutils.unpack_tuple(builder, arguments[0])
        found = [permute(builder, table, each, shift) for each in cgutils.unpack_tuple(builder, arguments[1])]
        return context.make_tuple(builder, signature.return_type, found)

    return UniTuple(table.dtype, codes.count)(UniTuple(table.dtype, 1), codes, nibble), generate


def _permute_bf16(builder: Any, table: Any, codes: Any, shift: int) -> Any:
    shifted = builder.lshr(codes, ir.Constant(_HALVES, [shift] * PAIR_WIDTH)) if shift else codes
    return call(builder, "llvm.x86.avx512.permvar.hi.512", _HALVES, table, shifted)


def _permute_float32(builder: Any, table: Any, codes: Any, shift: int) -> Any:
    if not HAS_WIDE_REGISTERS:
        return _permute_bytes(builder, table, codes, shift)
    table, words = _select_lanes(builder, table, _FIRSTS), builder.bitcast(codes, _WORDS)
    firsts_and_seconds = []
    for each in (shift, LANES + shift):
        shifted = builder.lshr(words, ir.Constant(_WORDS, [each] * LANES)) if each else words
        firsts_and_seconds.append(call(builder, "llvm.x86.avx512.permvar.sf.512", _FLOATS, table, shifted))
    return builder.shuffle_vector(*firsts_and_seconds, ir.Constant(_FLOAT_PAIRS_BITS, _FIRSTS + _SECONDS))


def _permute_bytes(builder: Any, table: Any, codes: Any, shift: int) -> Any:
    """Looks up each byte of the values with `vpshufb`, and interleaves them: in AVX2, 16 floats take several
    slow permutations.
    """
    half = list(range(32)) if shift < 8 else list(range(32, 64))
    own = _select_lanes(builder, builder.bitcast(codes, ir.VectorType(_I8, 64)), half)
    if shift % 8:
        own = builder.bitcast(own, ir.VectorType(_I32, 8))
        own = builder.bitcast(builder.lshr(own, ir.Constant(own.type, [4] * 8)), _BYTES)
    own = builder.and_(own, ir.Constant(_BYTES, [15] * 32))
    entries = builder.bitcast(_select_lanes(builder, table, _FIRSTS), ir.VectorType(_I8, 64))
    found = []
    for byte in range(4):
        of_byte = _select_lanes(builder, entries, [4 * i + byte for i in range(16)] * 2)
        found.append(call(builder, "llvm.x86.avx2.pshuf.b", _BYTES, of_byte, own))
    words = [
        [builder.bitcast(each, _SIXTEEN) for each in _interleave(builder, *found[i : i + 2])] for i in (0, 2)
    ]
    floats = []
    for low, high in zip(*words, strict=True):
        floats += _interleave(builder, low, high)
    floats = [builder.bitcast(each, _EIGHT) for each in floats]
    firsts, seconds = (
        builder.shuffle_vector(*two, ir.Constant(_WORDS, _FIRSTS)) for two in (floats[:2], floats[2:])
    )
    return builder.shuffle_vector(firsts, seconds, ir.Constant(_FLOAT_PAIRS_BITS, _FIRSTS + _SECONDS))


def _interleave(builder: Any, a: Any, b: Any) -> list[Any]:
    """The elements of a and b in turn, of the lower and of the upper halves of both 128-bit lanes."""
    count = a.type.count
    quarter = count // 4
    starts = (range(start, start + quarter) for start in (0, quarter, 2 * quarter, 3 * quarter))
    turns = [[i for each in own for i in (each, each + count)] for own in starts]
    kinds = (turns[0] + turns[2], turns[1] + turns[3])
    return [builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, count), each)) for each in kinds]


def _select_lanes(builder: Any, value: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


@_intrinsic
def transpose(_: Any, target: Any, source: Any, count: Any) -> Any:
    """Transposes up to 32 numbers of 16 rows into vectors of pairs, one lane a row.

    `source` is (array, starts, first, index): row i begins at starts[first + i] + index. `target` is (array,
    at, step): the vector of pair p is written at at + p · step, for as many pairs as `count` numbers have.
    """
    into, array = target[0], source[0]
    use_bf16 = HAS_BF16_DOT and array.dtype == types.uint16
    target_type = Tuple((into, types.intp, types.intp))
    source_type = Tuple((array, source[1], types.intp, types.intp))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        into, at, step = cgutils.unpack_tuple(builder, arguments[0])
        array, starts, first, index = cgutils.unpack_tuple(builder, arguments[1])
        written = Memory(context, builder, signature.args[0][0], into)
        read = Memory(context, builder, signature.args[1][0], array)
        table = Memory(context, builder, signature.args[1][1], starts)
        indices = []
        for i in range(LANES):
            own = builder.add(first, ir.Constant(first.type, i))
            indices.append(builder.add(builder.load(table.pointer(own, _I64)), index))
        columns = (_transposed_bf16 if use_bf16 else _transposed_float32)(read, indices, arguments[2])
        for pair, column in enumerate(columns):
            first_of_pair = ir.Constant(arguments[2].type, 2 * pair)
            with builder.if_then(builder.icmp_signed("<", first_of_pair, arguments[2])):
                builder.store(column, written.pointer(at, column.type), align=written.alignment)
            at = builder.add(at, step)
        return context.get_dummy_value()

    return types.none(target_type, source_type, types.intp), generate


def _transposed_bf16(memory: Memory, indices: list[Any], count: Any) -> Iterator[Any]:
    builder = memory.builder
    mask = vectors.lane_mask(builder, builder.ashr(count, ir.Constant(count.type, 1)))
    rows = []
    for index in indices:
        operands = memory.pointer(index, _WORDS), ir.Constant(_I32, 2), mask, ir.Constant(_WORDS, None)
        rows.append(call(builder, "llvm.masked.load.v16i32.p0", _WORDS, *operands))
    for column in _transpose_16x16(builder, rows):
        yield builder.bitcast(column, _HALVES)


def _transposed_float32(memory: Memory, indices: list[Any], count: Any) -> Iterator[Any]:
    builder = memory.builder
    for half in (0, LANES):
        starts = [builder.add(index, ir.Constant(index.type, half)) for index in indices]
        rest = builder.sub(count, ir.Constant(count.type, half))
        columns = _transpose_16x16(builder, [memory.load(start, rest) for start in starts])
        for first, second in zip(columns[::2], columns[1::2], strict=True):
            yield builder.shuffle_vector(first, second, ir.Constant(_FLOAT_PAIRS_BITS, _FIRSTS + _SECONDS))


def _transpose_16x16(builder: Any, rows: list[Any]) -> list[Any]:
    """Transposes 16 vectors of 16 lanes in place, by exchanging blocks of 1, 2, 4 and 8 lanes."""
    width = 1
    while width < LANES:
        for i in range(LANES):
            if i & width:
                continue
            one, other = rows[i], rows[i + width]
            kept = [lane + (LANES - width if lane & width else 0) for lane in range(LANES)]
            given = [lane + (LANES if lane & width else width) for lane in range(LANES)]
            rows[i] = builder.shuffle_vector(one, other, ir.Constant(_WORDS, kept))
            rows[i + width] = builder.shuffle_vector(one, other, ir.Constant(_WORDS, given))
        width *= 2
    return rows


def _dot_bf16_pairs(builder: Any, result: Any, rows: list[Any], columns: list[Any]) -> Any:
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = i * len(columns) + j
            before = builder.extract_value(result, at)
            after = call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, before, row, column)
            result = builder.insert_value(result, after, at)
    return result


@_intrinsic
def dot_rows(_: Any, sums: Any, a: Any, b: Any, index: Any) -> Any:
    """sums[i · len(b) + j] + the products of 32 features, from `index` on, of row i of a and row j of b.

    Rows are (array, tuple of starts). A lane adds two features: neighbours with `vdpbf16ps`, otherwise two
    that are 16 apart.
    """
    use_bf16 = HAS_BF16_DOT and a[0].dtype == b[0].dtype == types.uint16
    rows = (Tuple((each[0], UniTuple(types.intp, each[1].count))) for each in (a, b))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, a, b, index = arguments
        sides = []
        for kind, side in ((signature.args[1], a), (signature.args[2], b)):
            array, starts = cgutils.unpack_tuple(builder, side)
            sides.append((Memory(context, builder, kind[0], array), starts))
        if use_bf16:
            return _dot_bf16_pairs(builder, result, *(_load_bf16_rows(*side, index) for side in sides))
        for half in (0, LANES):
            at = builder.add(index, ir.Constant(index.type, half))
            rows_and_columns = (memory.load_each(starts, at) for memory, starts in sides)
            result = vectors.emit_fma_outer(builder, result, *rows_and_columns)
        return result

    return sums(sums, *rows, types.intp), generate


def _load_bf16_rows(memory: Memory, starts: Any, index: Any) -> list[Any]:
    builder = memory.builder
    indices = (builder.add(start, index) for start in cgutils.unpack_tuple(builder, starts))
    pointers = (memory.pointer(each, _HALVES) for each in indices)
    return [builder.bitcast(builder.load(pointer, align=2), _BFLOATS) for pointer in pointers]


@_intrinsic
def dot_broadcast(_: Any, sums: Any, x: Any, starts: Any, index: Any, weights: Any) -> Any:
    """sums[i · len(weights) + j] + weights[j] times the pair at x[starts[i] + index].

    The pair are two in features of a token; weights[j] holds the same two of 16 out features.
    """
    dot = _dot_bf16 if weights.dtype == pairs else _dot_float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, x, starts, index, weights = arguments
        memory = Memory(context, builder, signature.args[1], x)
        indices = [builder.add(start, index) for start in cgutils.unpack_tuple(builder, starts)]
        return dot(memory, result, indices, cgutils.unpack_tuple(builder, weights))

    return sums(sums, x, UniTuple(types.intp, starts.count), types.intp, weights), generate


def _dot_bf16(memory: Memory, result: Any, indices: list[Any], columns: list[Any]) -> Any:
    builder, rows = memory.builder, []
    for index in indices:
        pair = builder.load(memory.pointer(index, _I32), align=2)
        rows.append(builder.bitcast(_broadcast(builder, pair, _WORDS), _BFLOATS))
    return _dot_bf16_pairs(builder, result, rows, [builder.bitcast(column, _BFLOATS) for column in columns])


def _dot_float32(memory: Memory, result: Any, indices: list[Any], columns: list[Any]) -> Any:
    builder = memory.builder
    for which, lanes in enumerate((_FIRSTS, _SECONDS)):
        rows = []
        for index in indices:
            at = builder.add(index, ir.Constant(index.type, which))
            rows.append(_broadcast(builder, _load_float32(memory, at), _FLOATS))
        own = [_select_lanes(builder, column, lanes) for column in columns]
        result = vectors.emit_fma_outer(builder, result, rows, own)
    return result


def _load_float32(memory: Memory, index: Any) -> Any:
    builder = memory.builder
    if not memory.is_bf16:
        return builder.load(memory.pointer(index, ir.FloatType()), align=4)
    bits = builder.load(memory.pointer(index, _I16), align=2)
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), ir.Constant(_I32, 16)), ir.FloatType())


def _broadcast(builder: Any, value: Any, kind: Any) -> Any:
    """The value in every lane."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))
