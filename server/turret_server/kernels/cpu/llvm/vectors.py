"""Intrinsics on vectors of 16 float32 for numba functions, which have no vector type of their own.

They fix the order of every sum in the source instead of leaving it to the vectoriser; LLVM splits them into
the CPU's registers. Memory is a flat index into a contiguous array of float32, or of bfloat16 viewed as
uint16, which is converted on load and store. Indices are not checked.
"""

# ruff: noqa: ARG001 (numba fixes the signatures)
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.types.containers import UniTuple
from numba.extending import intrinsic, register_model

from turret_server.kernels.cpu.llvm.jit import compiled

LANES = 16
SPAN = 4 * LANES

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_BITS = ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_FIRST_LANE = ir.Constant(_I32, 0)

_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic
_intrinsic_of_literals: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)


class _Float32x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


register_model(_Float32x16)(lambda manager, kind: PrimitiveModel(manager, kind, _VECTOR))
vector = _Float32x16()


def _constant(kind: ir.VectorType, value: float) -> Any:
    return ir.Constant(kind, [value] * LANES)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def lane_mask(builder: Any, count: Any) -> Any:
    """Emits the mask of the first `count` lanes."""
    lanes = ir.VectorType(_I64, LANES)
    counts = builder.insert_element(ir.Constant(lanes, ir.Undefined), count, _FIRST_LANE)
    counts = builder.shuffle_vector(counts, counts, _constant(_BITS, 0))
    return builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), counts)


class Memory:
    """Emits loads and stores of an array of float32 or uint16 (bfloat16), 16 elements at a time."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        assert kind.layout == "C"
        self.builder = builder
        self.is_bf16 = kind.dtype == types.uint16
        self.alignment = kind.dtype.bitwidth // 8
        self._base = context.make_array(kind)(context, builder, array).data
        self._type = _HALVES if self.is_bf16 else _VECTOR
        self._name = f"v{LANES}{'i16' if self.is_bf16 else 'f32'}.p0"

    def pointer(self, index: Any, kind: Any) -> Any:
        """To an element, as a pointer to the LLVM type `kind`."""
        return self.builder.bitcast(self.builder.gep(self._base, [index]), kind.as_pointer())

    def load(self, index: Any, count: Any | None = None) -> Any:
        """The vector at `index`, or its first `count` elements and zeros."""
        pointer = self.pointer(index, self._type)
        if count is None:
            return self._to_float32(self.builder.load(pointer, align=self.alignment))
        zeros = ir.Constant(self._type, None)
        operands = (ir.Constant(_I32, self.alignment), lane_mask(self.builder, count), zeros)
        name = f"llvm.masked.load.{self._name}"
        return self._to_float32(call(self.builder, name, self._type, pointer, *operands))

    def load_each(self, starts: Any, index: Any) -> list[Any]:
        """The vectors at start + index, for each of a tuple of starts."""
        unpacked = cgutils.unpack_tuple(self.builder, starts)
        return [self.load(self.builder.add(start, index)) for start in unpacked]

    def store(self, value: Any, index: Any, count: Any | None = None) -> None:
        value, pointer = self._from_float32(value), self.pointer(index, self._type)
        if count is None:
            self.builder.store(value, pointer, align=self.alignment)
        else:
            operands = (pointer, ir.Constant(_I32, self.alignment), lane_mask(self.builder, count))
            call(self.builder, f"llvm.masked.store.{self._name}", ir.VoidType(), value, *operands)

    def rounded(self, value: Any) -> Any:
        return self._to_float32(self._from_float32(value))

    def _to_float32(self, value: Any) -> Any:
        if not self.is_bf16:
            return value
        bits = self.builder.shl(self.builder.zext(value, _BITS), _constant(_BITS, 16))
        return self.builder.bitcast(bits, _VECTOR)

    def _from_float32(self, value: Any) -> Any:
        """Rounds to the nearest bfloat16, ties to even, as torch does; NaN stays NaN."""
        if not self.is_bf16:
            return value
        builder = self.builder
        bits = builder.bitcast(value, _BITS)
        odd = builder.and_(builder.lshr(bits, _constant(_BITS, 16)), _constant(_BITS, 1))
        rounded = builder.add(bits, builder.add(odd, _constant(_BITS, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(is_nan, _constant(_BITS, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(chosen, _constant(_BITS, 16)), _HALVES)


def _load(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, starts, index, *count = arguments
    memory = Memory(context, builder, signature.args[0], array)
    unpacked = cgutils.unpack_tuple(builder, starts)
    vectors = [memory.load(builder.add(start, index), *count) for start in unpacked]
    return context.make_tuple(builder, signature.return_type, vectors)


def _store(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, value, *count = arguments
    Memory(context, builder, signature.args[0], array).store(value, index, *count)
    return context.get_dummy_value()


@_intrinsic
def load(_: Any, array: Any, starts: Any, index: Any) -> Any:
    """A vector of the 16 elements at start + index, for each of a tuple of starts."""
    result = UniTuple(vector, starts.count)
    return result(array, UniTuple(types.intp, starts.count), types.intp), _load


@_intrinsic
def load_masked(_: Any, array: Any, starts: Any, index: Any, count: Any) -> Any:
    """Like `load`, but reads only the first `count` elements; the other lanes are zero."""
    result = UniTuple(vector, starts.count)
    return result(array, UniTuple(types.intp, starts.count), types.intp, types.intp), _load


@_intrinsic
def prefetch_line(_: Any, array: Any, starts: Any, index: Any) -> Any:
    """Prefetches the cache line at start + index, for each of a tuple of starts."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = Memory(context, builder, signature.args[0], arguments[0])
        for start in cgutils.unpack_tuple(builder, arguments[1]):
            line = memory.pointer(builder.add(start, arguments[2]), ir.IntType(8))
            flags = (ir.Constant(_I32, flag) for flag in (0, 3, 1))  # read, keep in all caches, data
            call(builder, "llvm.prefetch.p0", ir.VoidType(), line, *flags)
        return context.get_dummy_value()

    return types.none(array, UniTuple(types.intp, starts.count), types.intp), generate


@_intrinsic
def store(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes 16 elements at `index`."""
    return types.none(array, types.intp, value), _store


@_intrinsic
def store_masked(_: Any, array: Any, index: Any, value: Any, count: Any) -> Any:
    """Like `store`, but writes only the first `count` elements."""
    return types.none(array, types.intp, value, types.intp), _store


@_intrinsic
def rounded(_: Any, array: Any, value: Any) -> Any:
    """The lanes, rounded to the elements of the array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = Memory(context, builder, signature.args[0], arguments[0])
        return memory.rounded(arguments[1])

    return vector(array, value), generate


@_intrinsic
def broadcast(_: Any, value: Any) -> Any:
    """A vector with the number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], _FIRST_LANE)
        return builder.shuffle_vector(one, one, _constant(_BITS, 0))

    return vector(types.float32), generate


@_intrinsic_of_literals
def zeros(_: Any, count: Any) -> Any:
    """A tuple of `count` zero vectors: the accumulators of a tile."""
    result = UniTuple(vector, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant_null(signature.return_type)

    return result(count), generate


@_intrinsic_of_literals
def strided(_: Any, start: Any, stride: Any, last: Any, count: Any) -> Any:
    """Where `count` rows begin, the first at `start`; from the index `last` on, that one is repeated."""
    result = UniTuple(types.intp, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, stride, last, _ = arguments
        starts = []
        for i in range(signature.return_type.count):
            index = ir.Constant(last.type, i)
            index = builder.select(builder.icmp_signed("<", index, last), index, last)
            starts.append(builder.add(start, builder.mul(index, stride)))
        return context.make_tuple(builder, signature.return_type, starts)

    return result(types.intp, types.intp, types.intp, count), generate


def emit_fma_outer(builder: Any, sums: Any, rows: list[Any], columns: list[Any]) -> Any:
    """Emits what `fma_outer` does."""
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = i * len(columns) + j
            before = builder.extract_value(sums, at)
            after = call(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, row, column, before)
            sums = builder.insert_value(sums, after, at)
    return sums


@_intrinsic
def fma_outer(_: Any, sums: Any, rows: Any, columns: Any) -> Any:
    """sums[i · len(columns) + j] + rows[i] · columns[j], lane by lane, as a tuple of vectors."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, *factors = arguments
        return emit_fma_outer(builder, result, *(cgutils.unpack_tuple(builder, factor) for factor in factors))

    return sums(sums, rows, columns), generate


@_intrinsic
def accumulate_scaled(_: Any, array: Any, starts: Any, vectors: Any, scales: Any) -> Any:
    """Adds vectors[i · len(scales) + j] · scales[j] to the j-th vector of the array at starts[i].

    The last starts may be equal: everything is read before anything is written.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, starts, vectors, scales = arguments
        memory = Memory(context, builder, signature.args[0], array)
        columns, rows = cgutils.unpack_tuple(builder, scales), cgutils.unpack_tuple(builder, vectors)
        results = []
        for i, start in enumerate(cgutils.unpack_tuple(builder, starts)):
            for j, column in enumerate(columns):
                at = builder.add(start, ir.Constant(start.type, j * LANES))
                factors = rows[i * len(columns) + j], column, memory.load(at)
                results.append((at, call(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, *factors)))
        for at, value in results:
            memory.store(value, at)
        return context.get_dummy_value()

    return types.none(array, UniTuple(types.intp, starts.count), vectors, scales), generate


@_intrinsic
def reduce_add(_: Any, vectors: Any) -> Any:
    """The sum of the lanes of each vector of a tuple, whose length is a power of two.

    Lanes i and i + 8 are added first, then i + 4, i + 2, i + 1. Two vectors share an addition while there
    are two.
    """
    result = UniTuple(types.float32, vectors.count)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums = _add_lanes(builder, cgutils.unpack_tuple(builder, arguments[0]))
        # With fewer vectors than lanes, the sums repeat.
        totals = [builder.extract_element(sums, ir.Constant(_I32, i)) for i in range(vectors.count)]
        return context.make_tuple(builder, signature.return_type, totals)

    return result(vectors), generate


def _add_lanes(builder: Any, values: list[Any]) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        pairs = zip(values[::2], values[1::2], strict=True) if len(values) > 1 else ((values[0], values[0]),)
        values = [builder.fadd(*_split_runs(builder, *pair, width)) for pair in pairs]
    return values[0]


def _split_runs(builder: Any, a: Any, b: Any, width: int) -> tuple[Any, Any]:
    """Of every run of 2 · width lanes of two vectors, the lower halves and the upper halves."""
    starts = [lane for lane in range(2 * LANES) if lane % (2 * width) < width]
    low, high = (ir.Constant(_BITS, [lane + shift for lane in starts]) for shift in (0, width))
    return builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)


@_intrinsic
def reduce_max(_: Any, value: Any) -> Any:
    """The largest lane of a vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _reduce(builder, arguments[0], lambda a, b: _maximum(builder, a, b))

    return types.float32(value), generate


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


def _reduce(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        low, high = (
            ir.Constant(ir.VectorType(_I32, width), list(range(start, start + width))) for start in (0, width)
        )
        value = combine(builder.shuffle_vector(value, value, low), builder.shuffle_vector(value, value, high))
    return builder.extract_element(value, _FIRST_LANE)


def _elementwise(emit: Callable[[Any, Any, Any], Any]) -> Any:
    @_intrinsic
    def operation(_: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return emit(builder, *arguments)

        return vector(a, b), generate

    return operation


add = _elementwise(lambda builder, a, b: builder.fadd(a, b))
subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b))
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b))
divide = _elementwise(lambda builder, a, b: builder.fdiv(a, b))
maximum = _elementwise(_maximum)


@_intrinsic
def ldexp(_: Any, value: Any, power: Any) -> Any:
    """Multiplies by 2^power, for integral powers whose result is a normal number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _BITS)
        shifted = builder.shl(builder.fptosi(arguments[1], _BITS), _constant(_BITS, 23))
        return builder.bitcast(builder.add(bits, shifted), _VECTOR)

    return vector(value, power), generate


@_intrinsic
def rint(_: Any, value: Any) -> Any:
    """Rounds every lane to the nearest integer, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, f"llvm.rint.v{LANES}f32", _VECTOR, arguments[0])

    return vector(value), generate


@_intrinsic
def zero_if_less(_: Any, value: Any, x: Any, limit: Any) -> Any:
    """`value` in the lanes where x ≥ limit, else zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(
            builder.fcmp_ordered("<", arguments[1], arguments[2]), _constant(_VECTOR, 0), arguments[0]
        )

    return vector(value, x, limit), generate


_MIN_EXP = np.float32(-87.0)
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few enough bits that integral multiples are exact
_LN2_LOW = np.float32(-2.12194440e-4)
_TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(7, -1, -1))


@compiled
def exp(x: Any) -> Any:
    """Lanewise exponential of numbers up to 88, with a relative error of 2e-7; zero below −87."""
    clamped = maximum(x, broadcast(_MIN_EXP))
    power = rint(multiply(clamped, broadcast(_LOG2E)))
    high, low = broadcast(_LN2_HIGH), broadcast(_LN2_LOW)
    rest = subtract(subtract(clamped, multiply(power, high)), multiply(power, low))
    value = broadcast(_TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        value = add(multiply(value, rest), broadcast(coefficient))
    return zero_if_less(ldexp(value, power), x, broadcast(_MIN_EXP))


@compiled
def load_span(array: Any, start: int, count: int) -> Any:
    """Four consecutive vectors, of which the first `count` elements are read."""
    starts = (start, start + LANES, start + 2 * LANES, start + 3 * LANES)
    if count >= SPAN:
        return load(array, starts, 0)
    return (
        load_masked(array, starts[0:1], 0, count)
        + load_masked(array, starts[1:2], 0, count - LANES)
        + load_masked(array, starts[2:3], 0, count - 2 * LANES)
        + load_masked(array, starts[3:4], 0, count - 3 * LANES)
    )


@compiled
def store_span(array: Any, start: int, vectors: Any, count: int) -> None:
    """Writes the first `count` elements of four consecutive vectors."""
    if count >= SPAN:
        for i in range(4):
            store(array, start + i * LANES, vectors[i])
    else:
        for i in range(4):
            store_masked(array, start + i * LANES, vectors[i], count - i * LANES)
