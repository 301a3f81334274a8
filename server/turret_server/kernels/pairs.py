"""Vectors of sixteen pairs of bfloat16, whose products AVX512-BF16 adds up in float32, for numba functions.

A vector holds two neighbouring in features of sixteen out features. Only CPUs with AVX512-BF16 run what is
compiled from these.
"""

# ruff: noqa: ARG001 (the signatures are numba's)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.types.containers import UniTuple
from numba.extending import intrinsic, register_model

from turret_server.kernels import lanes
from turret_server.kernels.lanes import LANES

PAIRS = 2 * LANES  # numbers in a vector
HAS_PAIRS = bool(binding.get_host_cpu_features().get("avx512bf16"))

_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_HALVES = ir.VectorType(_I16, PAIRS)
_WORDS = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


class _BFloat16(ir.Type):  # type: ignore[misc]
    """llvmlite has no word for it."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOATS = ir.VectorType(_BFloat16(), PAIRS)

_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic
_intrinsic_of_literals: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)


class _Pairs(types.Type):
    def __init__(self) -> None:
        super().__init__(name="bfloat16x32")


register_model(_Pairs)(lambda manager, kind: PrimitiveModel(manager, kind, _HALVES))
pairs = _Pairs()


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, to: Any) -> Any:
    base = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(base, [index]), to.as_pointer())


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@_intrinsic_of_literals
def load_pairs(_: Any, array: Any, index: Any, count: Any) -> Any:
    """`count` vectors that follow each other, of an array of uint16."""
    result = UniTuple(pairs, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, _ = arguments
        vectors = []
        for i in range(signature.return_type.count):
            at = builder.add(index, ir.Constant(index.type, i * PAIRS))
            pointer = _pointer(context, builder, signature.args[0], array, at, _HALVES)
            vectors.append(builder.load(pointer, align=2))
        return context.make_tuple(builder, signature.return_type, vectors)

    return result(array, types.intp, count), generate


@_intrinsic
def store_pairs(_: Any, array: Any, index: Any, vectors: Any) -> Any:
    """Write vectors one after another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, values = arguments
        for i, value in enumerate(cgutils.unpack_tuple(builder, values)):
            at = builder.add(index, ir.Constant(index.type, i * PAIRS))
            pointer = _pointer(context, builder, signature.args[0], array, at, _HALVES)
            builder.store(value, pointer, align=2)
        return context.get_dummy_value()

    return types.none(array, types.intp, vectors), generate


@_intrinsic_of_literals
def look_up(_: Any, table: Any, codes: Any, place: Any) -> Any:
    """The entries of a table of 32 numbers by bits 4 · place to 4 · place + 4 of every lane.

    The bit above them counts too: the table has everything twice.
    """
    shift = 4 * place.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        [table] = cgutils.unpack_tuple(builder, arguments[0])
        found = []
        for code in cgutils.unpack_tuple(builder, arguments[1]):
            shifted = builder.lshr(code, ir.Constant(_HALVES, [shift] * PAIRS)) if shift else code
            found.append(_call(builder, "llvm.x86.avx512.permvar.hi.512", _HALVES, table, shifted))
        return context.make_tuple(builder, signature.return_type, found)

    return codes(UniTuple(pairs, 1), codes, place), generate


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

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, x, starts, index, weights = arguments
        columns = [builder.bitcast(weight, _BFLOATS) for weight in cgutils.unpack_tuple(builder, weights)]
        rows = []
        for start in cgutils.unpack_tuple(builder, starts):
            at = builder.add(start, index)
            pair = builder.load(_pointer(context, builder, signature.args[1], x, at, _I32), align=2)
            one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), pair, ir.Constant(_I32, 0))
            everywhere = builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))
            rows.append(builder.bitcast(everywhere, _BFLOATS))
        return _add_outer(builder, result, rows, columns)

    return sums(sums, x, UniTuple(types.intp, starts.count), types.intp, weights), generate
