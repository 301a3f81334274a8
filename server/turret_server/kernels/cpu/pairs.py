"""Vectors of sixteen pairs of numbers, whose products are added up in float32, for numba functions.

A vector holds two neighbouring in features of sixteen out features. With AVX512-BF16 the numbers are
bfloat16, each pair in a lane, and the CPU multiplies pairs; else they are float32, of all pairs the first
number before any second.
"""

# ruff: noqa: ARG001 (the signatures are numba's)
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.types.containers import UniTuple
from numba.extending import intrinsic, register_model

from turret_server.kernels.cpu import lanes
from turret_server.kernels.cpu.lanes import LANES

PAIRS = 2 * LANES  # numbers in a vector


def _features() -> frozenset[str]:
    """What the CPU that numba compiles for can do."""
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


_FEATURES = _features()
HAS_PAIRS = "avx512bf16" in _FEATURES
CAN_LOOK_UP = bool(_FEATURES & {"avx2", "avx512f"})

_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_HALVES = ir.VectorType(_I16, PAIRS)
_WORDS = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


class _BFloat16(ir.Type):  # type: ignore[misc]
    """llvmlite has no word for it."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOATS = ir.VectorType(_BFloat16(), PAIRS)
_FLOAT_PAIRS = ir.VectorType(ir.FloatType(), PAIRS)
_FLOAT_PAIRS_BITS = ir.VectorType(_I32, PAIRS)
_EIGHT = ir.VectorType(ir.FloatType(), LANES // 2)
_HALF_LANES = list(range(LANES // 2)), list(range(LANES // 2, LANES))
_FIRSTS, _SECONDS = list(range(LANES)), list(range(LANES, PAIRS))

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


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, to: Any) -> Any:
    base = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(base, [index]), to.as_pointer())


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@_intrinsic_of_literals
def load_pairs(_: Any, array: Any, index: Any, count: Any) -> Any:
    """`count` vectors that follow each other, of an array of uint16 or float32."""
    is_half = array.dtype == types.uint16
    result = UniTuple(pairs if is_half else float_pairs, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, _ = arguments
        vectors = []
        for i in range(signature.return_type.count):
            at = builder.add(index, ir.Constant(index.type, i * PAIRS))
            kind = _HALVES if is_half else _FLOAT_PAIRS
            pointer = _pointer(context, builder, signature.args[0], array, at, kind)
            vectors.append(builder.load(pointer, align=2 if is_half else 4))
        return context.make_tuple(builder, signature.return_type, vectors)

    return result(array, types.intp, count), generate


@_intrinsic
def store_pairs(_: Any, array: Any, index: Any, vectors: Any) -> Any:
    """Write vectors one after another to an array of their numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, values = arguments
        for i, value in enumerate(cgutils.unpack_tuple(builder, values)):
            at = builder.add(index, ir.Constant(index.type, i * PAIRS))
            pointer = _pointer(context, builder, signature.args[0], array, at, value.type)
            builder.store(value, pointer, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, vectors), generate


@_intrinsic_of_literals
def look_up(_: Any, table: Any, codes: Any, place: Any) -> Any:
    """The entries of a table of 32 numbers by bits 4 · place to 4 · place + 4 of both halves of every lane.

    The bit above them may count too: the table has everything twice.
    """
    shift = 4 * place.literal_value
    find = _found_pairs if table.dtype == pairs else _found_floats

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        [table] = cgutils.unpack_tuple(builder, arguments[0])
        found = [find(builder, table, each, shift) for each in cgutils.unpack_tuple(builder, arguments[1])]
        return context.make_tuple(builder, signature.return_type, found)

    return UniTuple(table.dtype, codes.count)(UniTuple(table.dtype, 1), codes, place), generate


def _found_pairs(builder: Any, table: Any, codes: Any, shift: int) -> Any:
    shifted = builder.lshr(codes, ir.Constant(_HALVES, [shift] * PAIRS)) if shift else codes
    return _call(builder, "llvm.x86.avx512.permvar.hi.512", _HALVES, table, shifted)


def _found_floats(builder: Any, table: Any, codes: Any, shift: int) -> Any:
    table, words = _part(builder, table, _FIRSTS), builder.bitcast(codes, _WORDS)
    sides = []
    for each in (shift, LANES + shift):
        shifted = builder.lshr(words, ir.Constant(_WORDS, [each] * LANES)) if each else words
        sides.append(_entries(builder, table, shifted))
    return builder.shuffle_vector(*sides, ir.Constant(_FLOAT_PAIRS_BITS, _FIRSTS + _SECONDS))


def _entries(builder: Any, table: Any, indices: Any) -> Any:
    """The entries of a table of sixteen float32 by the last four bits of every lane."""
    if "avx512f" in _FEATURES:
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", _FLOATS, table, indices)
    halves = []
    for lanes_of_it in _HALF_LANES:
        own = _part(builder, indices, lanes_of_it)
        # AVX2 finds one of eight entries by the last three bits.
        lower, upper = (
            _call(builder, "llvm.x86.avx2.permps", _EIGHT, _part(builder, table, entries), own)
            for entries in _HALF_LANES
        )
        fourth_bit = builder.and_(own, ir.Constant(own.type, [8] * 8))
        is_lower = builder.icmp_unsigned("==", fourth_bit, ir.Constant(own.type, [0] * 8))
        halves.append(builder.select(is_lower, lower, upper))
    return builder.shuffle_vector(*halves, ir.Constant(_WORDS, _FIRSTS))


def _part(builder: Any, value: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


@_intrinsic
def turn(
    _: Any, into: Any, at: Any, step: Any, array: Any, starts: Any, first: Any, index: Any, count: Any
) -> Any:
    """Of sixteen rows, the numbers from starts[first + i] + index on, thirty-two of each, or as many as
    `count` leaves: pair p of all of them becomes the vector at into[at + p · step].
    """
    in_pairs = HAS_PAIRS and array.dtype == types.uint16
    places = (types.intp,) * 2

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        into, at, step, array, starts, first, index, count = arguments
        rows = []
        for i in range(LANES):
            own = builder.add(first, ir.Constant(first.type, i))
            start = builder.load(_pointer(context, builder, signature.args[4], starts, own, _I64))
            rows.append(builder.add(start, index))
        read = _turned_pairs if in_pairs else _turned_floats
        for pair, value in enumerate(read(context, builder, signature.args[3], array, rows, count)):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(count.type, 2 * pair), count)):
                pointer = _pointer(context, builder, signature.args[0], into, at, value.type)
                builder.store(value, pointer, align=signature.args[0].dtype.bitwidth // 8)
            at = builder.add(at, step)
        return context.get_dummy_value()

    return types.none(into, *places, array, starts, *places, types.intp), generate


def _turned_pairs(
    context: Any, builder: Any, kind: Any, array: Any, places: list[Any], count: Any
) -> Iterator[Any]:
    mask = lanes.first_lanes(builder, builder.ashr(count, ir.Constant(count.type, 1)))
    rows = []
    for place in places:
        pointer = _pointer(context, builder, kind, array, place, _WORDS)
        operands = pointer, ir.Constant(_I32, 2), mask, ir.Constant(_WORDS, None)
        rows.append(_call(builder, "llvm.masked.load.v16i32.p0", _WORDS, *operands))
    for column in _transposed(builder, rows):
        yield builder.bitcast(column, _HALVES)


def _turned_floats(
    context: Any, builder: Any, kind: Any, array: Any, places: list[Any], count: Any
) -> Iterator[Any]:
    for half in (0, LANES):
        starts = [builder.add(place, ir.Constant(place.type, half)) for place in places]
        rest = builder.sub(count, ir.Constant(count.type, half))
        columns = _transposed(builder, lanes.rows_at(context, builder, kind, array, starts, rest))
        for one, other in zip(columns[::2], columns[1::2], strict=True):
            yield builder.shuffle_vector(one, other, ir.Constant(_FLOAT_PAIRS_BITS, _FIRSTS + _SECONDS))


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen lanes: lane j of i becomes lane i of j, by exchanging ever larger squares.

    The vectors are changed in their list.
    """
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


def _add_outer(builder: Any, result: Any, rows: list[Any], columns: list[Any]) -> Any:
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = i * len(columns) + j
            before = builder.extract_value(result, at)
            after = _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, before, row, column)
            result = builder.insert_value(result, after, at)
    return result


@_intrinsic
def add_dots(_: Any, sums: Any, a: Any, a_starts: Any, b: Any, b_starts: Any, index: Any) -> Any:
    """sums[i · len(b_starts) + j] + the products of a's row i with b's row j from `index` on: of 32 features,
    those of one lane being two that lie together or sixteen apart, as the CPU has it.
    """
    in_pairs = HAS_PAIRS and a.dtype == b.dtype == types.uint16
    starts = UniTuple(types.intp, a_starts.count), UniTuple(types.intp, b_starts.count)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, a, a_starts, b, b_starts, index = arguments
        sides = ((signature.args[1], a, a_starts), (signature.args[3], b, b_starts))
        if in_pairs:
            return _add_outer(builder, result, *(_rows(context, builder, *side, index) for side in sides))
        for half in (0, LANES):
            at = builder.add(index, ir.Constant(index.type, half))
            rows = (lanes.rows(context, builder, *side, at) for side in sides)
            result = lanes.add_each(builder, result, *rows)
        return result

    return sums(sums, a, starts[0], b, starts[1], types.intp), generate


def _rows(context: Any, builder: Any, kind: Any, array: Any, starts: Any, index: Any) -> list[Any]:
    places = (builder.add(start, index) for start in cgutils.unpack_tuple(builder, starts))
    pointers = (_pointer(context, builder, kind, array, place, _HALVES) for place in places)
    return [builder.bitcast(builder.load(pointer, align=2), _BFLOATS) for pointer in pointers]


@_intrinsic
def add_products(_: Any, sums: Any, x: Any, starts: Any, index: Any, weights: Any) -> Any:
    """sums[i · len(weights) + j] + the products of the pair at x[starts[i] + index] with weights[j]."""
    add = _add_pairs if weights.dtype == pairs else _add_floats

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, x, starts, index, weights = arguments
        places = [builder.add(start, index) for start in cgutils.unpack_tuple(builder, starts)]
        columns = cgutils.unpack_tuple(builder, weights)
        return add(context, builder, result, signature.args[1], x, places, columns)

    return sums(sums, x, UniTuple(types.intp, starts.count), types.intp, weights), generate


def _add_pairs(
    context: Any, builder: Any, result: Any, kind: Any, x: Any, places: list[Any], columns: list[Any]
) -> Any:
    rows = []
    for place in places:
        pair = builder.load(_pointer(context, builder, kind, x, place, _I32), align=2)
        rows.append(builder.bitcast(_everywhere(builder, pair, _WORDS), _BFLOATS))
    return _add_outer(builder, result, rows, [builder.bitcast(column, _BFLOATS) for column in columns])


def _add_floats(
    context: Any, builder: Any, result: Any, kind: Any, x: Any, places: list[Any], columns: list[Any]
) -> Any:
    for which, lanes_of_it in enumerate((_FIRSTS, _SECONDS)):
        rows = []
        for place in places:
            at = builder.add(place, ir.Constant(place.type, which))
            rows.append(_everywhere(builder, _float_at(context, builder, kind, x, at), _FLOATS))
        own = [_part(builder, column, lanes_of_it) for column in columns]
        result = lanes.add_each(builder, result, rows, own)
    return result


def _float_at(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    if kind.dtype != types.uint16:
        return builder.load(_pointer(context, builder, kind, array, place, ir.FloatType()), align=4)
    bits = builder.load(_pointer(context, builder, kind, array, place, _I16), align=2)
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), ir.Constant(_I32, 16)), ir.FloatType())


def _everywhere(builder: Any, value: Any, kind: Any) -> Any:
    """The value in every lane."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))
