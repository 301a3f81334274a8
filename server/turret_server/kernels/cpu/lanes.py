"""Vectors of sixteen float32 in numba functions, which numba itself has no words for.

With them the order of every sum is written down instead of being the compiler's choice; LLVM cuts them to
the width that the CPU has. Memory is a flat index into an array without gaps, of float32 or of bfloat16
seen as uint16; no index is checked.
"""

# ruff: noqa: ARG001 (the signatures are numba's)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.types.containers import UniTuple
from numba.extending import intrinsic, register_model

LANES = 16

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


def _same(kind: ir.VectorType, value: float) -> Any:
    return ir.Constant(kind, [value] * LANES)


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def first_lanes(builder: Any, count: Any) -> Any:
    """In an intrinsic: the mask of the first `count` lanes."""
    lanes = ir.VectorType(_I64, LANES)
    counts = builder.insert_element(ir.Constant(lanes, ir.Undefined), count, _FIRST_LANE)
    counts = builder.shuffle_vector(counts, counts, _same(_BITS, 0))
    return builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), counts)


class _Memory:
    """Reads and writes sixteen elements of an array, or the first `count` of them."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        assert kind.layout == "C"
        self._builder = builder
        self._base = context.make_array(kind)(context, builder, array).data
        self._is_half = kind.dtype == types.uint16
        self._type = _HALVES if self._is_half else _VECTOR
        self._name = f"v{LANES}{'i16' if self._is_half else 'f32'}.p0"
        self._alignment = kind.dtype.bitwidth // 8

    def load(self, index: Any, count: Any | None) -> Any:
        pointer = self._pointer(index)
        if count is None:
            return self._widened(self._builder.load(pointer, align=self._alignment))
        mask, nothing = first_lanes(self._builder, count), ir.Constant(self._type, None)
        operands = (ir.Constant(_I32, self._alignment), mask, nothing)
        name = f"llvm.masked.load.{self._name}"
        return self._widened(_call(self._builder, name, self._type, pointer, *operands))

    def store(self, value: Any, index: Any, count: Any | None) -> None:
        value, pointer = self._narrowed(value), self._pointer(index)
        if count is None:
            self._builder.store(value, pointer, align=self._alignment)
        else:
            operands = (pointer, ir.Constant(_I32, self._alignment), first_lanes(self._builder, count))
            _call(self._builder, f"llvm.masked.store.{self._name}", ir.VoidType(), value, *operands)

    def _pointer(self, index: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(self._base, [index]), self._type.as_pointer())

    def _widened(self, value: Any) -> Any:
        if not self._is_half:
            return value
        bits = self._builder.shl(self._builder.zext(value, _BITS), _same(_BITS, 16))
        return self._builder.bitcast(bits, _VECTOR)

    def _narrowed(self, value: Any) -> Any:
        """Round to the nearest bfloat16, ties to even, as torch does; what is not a number stays so."""
        if not self._is_half:
            return value
        builder = self._builder
        bits = builder.bitcast(value, _BITS)
        odd = builder.and_(builder.lshr(bits, _same(_BITS, 16)), _same(_BITS, 1))
        rounded = builder.add(bits, builder.add(odd, _same(_BITS, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(is_nan, _same(_BITS, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(chosen, _same(_BITS, 16)), _HALVES)


def _load(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, starts, index, *count = arguments
    memory = _Memory(context, builder, signature.args[0], array)
    places = [builder.add(start, index) for start in cgutils.unpack_tuple(builder, starts)]
    vectors = [memory.load(place, count[0] if count else None) for place in places]
    return context.make_tuple(builder, signature.return_type, vectors)


def _store(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, value, *count = arguments
    _Memory(context, builder, signature.args[0], array).store(value, index, count[0] if count else None)
    return context.get_dummy_value()


@_intrinsic
def load(_: Any, array: Any, starts: Any, index: Any) -> Any:
    """For each of a tuple of starts, the sixteen elements from start + index on."""
    result = UniTuple(vector, starts.count)
    return result(array, UniTuple(types.intp, starts.count), types.intp), _load


@_intrinsic
def load_first(_: Any, array: Any, starts: Any, index: Any, count: Any) -> Any:
    """As `load`, but no more than `count` elements: the other lanes are zero, and not read."""
    result = UniTuple(vector, starts.count)
    return result(array, UniTuple(types.intp, starts.count), types.intp, types.intp), _load


@_intrinsic
def prefetch(_: Any, array: Any, starts: Any, index: Any) -> Any:
    """Ask for the cache lines at start + index of a tuple of starts: they are read soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte = ir.IntType(8).as_pointer()
        for start in cgutils.unpack_tuple(builder, arguments[1]):
            line = builder.bitcast(builder.gep(base, [builder.add(start, arguments[2])]), byte)
            flags = (ir.Constant(_I32, flag) for flag in (0, 3, 1))  # to read, to keep, data
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), line, *flags)
        return context.get_dummy_value()

    return types.none(array, UniTuple(types.intp, starts.count), types.intp), generate


@_intrinsic
def store(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Write sixteen elements from `index` on."""
    return types.none(array, types.intp, value), _store


@_intrinsic
def store_first(_: Any, array: Any, index: Any, value: Any, count: Any) -> Any:
    """As `store`, but no more than `count` elements."""
    return types.none(array, types.intp, value, types.intp), _store


@_intrinsic
def splat(_: Any, value: Any) -> Any:
    """The same number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], _FIRST_LANE)
        return builder.shuffle_vector(one, one, _same(_BITS, 0))

    return vector(types.float32), generate


@_intrinsic_of_literals
def zeros(_: Any, count: Any) -> Any:
    """A tuple of `count` vectors of zeros."""
    result = UniTuple(vector, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant_null(signature.return_type)

    return result(count), generate


def rows(context: Any, builder: Any, kind: Any, array: Any, starts: Any, index: Any) -> list[Any]:
    """In an intrinsic: for each of a tuple of starts, the sixteen elements from start + index on."""
    places = [builder.add(start, index) for start in cgutils.unpack_tuple(builder, starts)]
    return rows_at(context, builder, kind, array, places, None)


def rows_at(
    context: Any, builder: Any, kind: Any, array: Any, places: list[Any], count: Any | None
) -> list[Any]:
    """In an intrinsic: the sixteen elements from each of these places on, or the first `count` of them."""
    memory = _Memory(context, builder, kind, array)
    return [memory.load(place, count) for place in places]


def add_each(builder: Any, sums: Any, rows: list[Any], columns: list[Any]) -> Any:
    """In an intrinsic: what `add_outer` does."""
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = i * len(columns) + j
            before = builder.extract_value(sums, at)
            after = _call(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, row, column, before)
            sums = builder.insert_value(sums, after, at)
    return sums


@_intrinsic
def add_outer(_: Any, sums: Any, rows: Any, columns: Any) -> Any:
    """sums[i · len(columns) + j] + rows[i] · columns[j], all of them vectors."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, *factors = arguments
        return add_each(builder, result, *(cgutils.unpack_tuple(builder, factor) for factor in factors))

    return sums(sums, rows, columns), generate


@_intrinsic
def add_scaled(_: Any, array: Any, starts: Any, vectors: Any, scales: Any) -> Any:
    """Vector j from starts[i] on += vectors[i · len(scales) + j] · scales[j].

    Starts may be the same at the end: all that is read is read before anything is written.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, starts, vectors, scales = arguments
        memory = _Memory(context, builder, signature.args[0], array)
        columns, rows = cgutils.unpack_tuple(builder, scales), cgutils.unpack_tuple(builder, vectors)
        results = []
        for i, start in enumerate(cgutils.unpack_tuple(builder, starts)):
            for j, column in enumerate(columns):
                at = builder.add(start, ir.Constant(start.type, j * LANES))
                factors = rows[i * len(columns) + j], column, memory.load(at, None)
                results.append((at, _call(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, *factors)))
        for at, value in results:
            memory.store(value, at, None)
        return context.get_dummy_value()

    return types.none(array, UniTuple(types.intp, starts.count), vectors, scales), generate


@_intrinsic
def lane_sums(_: Any, vectors: Any) -> Any:
    """The sum of the lanes of each vector of a tuple, of a power of two: lanes i and i + 8 first, then i + 4,
    i + 2, i + 1. Two vectors share each addition as long as there are two.
    """
    result = UniTuple(types.float32, vectors.count)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums = _sums(builder, cgutils.unpack_tuple(builder, arguments[0]))
        # With fewer vectors than lanes, the sums come again and again.
        of_each = [builder.extract_element(sums, ir.Constant(_I32, i)) for i in range(vectors.count)]
        return context.make_tuple(builder, signature.return_type, of_each)

    return result(vectors), generate


def _sums(builder: Any, values: list[Any]) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        pairs = zip(values[::2], values[1::2], strict=True) if len(values) > 1 else ((values[0], values[0]),)
        values = [builder.fadd(*_halves(builder, *pair, width)) for pair in pairs]
    return values[0]


def _halves(builder: Any, a: Any, b: Any, width: int) -> tuple[Any, Any]:
    """The lower halves of the runs of 2 · width lanes of two vectors, and the upper ones."""
    starts = [lane for lane in range(2 * LANES) if lane % (2 * width) < width]
    low, high = (ir.Constant(_BITS, [lane + shift for lane in starts]) for shift in (0, width))
    return builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)


@_intrinsic
def lane_max(_: Any, value: Any) -> Any:
    """The largest lane of a vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _fold(builder, arguments[0], lambda a, b: _larger(builder, a, b))

    return types.float32(value), generate


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


def _fold(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
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
maximum = _elementwise(_larger)


@_intrinsic
def scale_by_power(_: Any, value: Any, power: Any) -> Any:
    """Multiply by 2 ** power, for whole powers that leave a normal number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _BITS)
        shifted = builder.shl(builder.fptosi(arguments[1], _BITS), _same(_BITS, 23))
        return builder.bitcast(builder.add(bits, shifted), _VECTOR)

    return vector(value, power), generate


@_intrinsic
def whole(_: Any, value: Any) -> Any:
    """The nearest whole numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, f"llvm.rint.v{LANES}f32", _VECTOR, arguments[0])

    return vector(value), generate


@_intrinsic
def zero_below(_: Any, value: Any, x: Any, limit: Any) -> Any:
    """`value` where x ≥ limit, else zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(
            builder.fcmp_ordered("<", arguments[1], arguments[2]), _same(_VECTOR, 0), arguments[0]
        )

    return vector(value, x, limit), generate
