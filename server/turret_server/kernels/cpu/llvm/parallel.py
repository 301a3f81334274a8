"""Runs a kernel on the threads of torch's OpenMP pool.

numba's OpenMP layer loads a second copy of libgomp beside torch's. Threads that wait for work spin, so two
pools slow each other down, and steps take milliseconds longer than their kernels. So the parallel region is
opened through the OpenMP that torch has loaded. Where that is not GNU's, as on macOS, kernels run on one
thread.
"""

# ruff: noqa: ARG001, ARG005 (numba and OpenMP fix the signatures)
from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.types.containers import BaseTuple
from numba.extending import intrinsic

from turret_server.kernels.cpu.cores import CORES

_POINTER = ir.IntType(8).as_pointer()
_INT = ir.IntType(32)
_VOID = ir.VoidType()
_SINGLE_THREADED = (
    ("omp_get_thread_num", ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)),
    ("omp_get_num_threads", ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)),
    (
        "GOMP_parallel",
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
            lambda body, data, threads, flags: ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)(data)
        ),
    ),
)


def _bind() -> int:
    """Gives LLVM the addresses of OpenMP's functions; the number of threads of a region."""
    loaded = ctypes.CDLL(None)
    has_gomp = hasattr(loaded, "GOMP_parallel")
    for name, substitute in _SINGLE_THREADED:
        function = getattr(loaded, name) if has_gomp else substitute
        binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return CORES if has_gomp else 1


THREADS = _bind()

_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic


@_intrinsic
def run_parallel(typing: Any, kernel: Any, arguments: Any) -> Any:
    """Runs kernel(worker, workers, arguments) once for every worker; it must not raise."""
    call = kernel.get_call_type(typing, (types.intp, types.intp, arguments), {})

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        compiled = kernel.dispatcher.get_compile_result(call)
        context.active_code_library.add_linking_library(compiled.library)
        body = _body(context, builder.module, compiled.fndesc, values[1].type)
        borrowed = _borrowed(context, builder, arguments, values[1])
        data = builder.bitcast(cgutils.alloca_once_value(builder, borrowed), _POINTER)
        opened = ir.FunctionType(_VOID, [body.type, _POINTER, _INT, _INT])
        parallel = cgutils.get_or_insert_function(builder.module, opened, "GOMP_parallel")
        builder.call(parallel, [body, data, ir.Constant(_INT, 0), ir.Constant(_INT, 0)])
        return context.get_dummy_value()

    return types.none(kernel, arguments), generate


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The value with arrays that own no memory: numba counts no references to them.

    The caller keeps the arrays for the whole region. Counting is atomic, and the threads would take the
    counts' cache lines from each other in the innermost loops.
    """
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo, array.parent = (
            cgutils.get_null_value(each.type) for each in (array.meminfo, array.parent)
        )
        return array._getvalue()  # noqa: SLF001 (numba's name for it)
    if isinstance(kind, BaseTuple):
        parts = zip(kind, cgutils.unpack_tuple(builder, value), strict=True)
        return context.make_tuple(builder, kind, [_borrowed(context, builder, *part) for part in parts])
    return value


def _body(context: Any, module: Any, kernel: Any, arguments: Any) -> Any:
    """A C function that takes a pointer to the arguments and calls the kernel."""
    name = module.get_unique_name("run_parallel")
    body = ir.Function(module, ir.FunctionType(_VOID, [_POINTER]), name)
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block())
    worker, workers = (
        builder.sext(
            builder.call(cgutils.get_or_insert_function(module, ir.FunctionType(_INT, []), name), []),
            ir.IntType(64),
        )
        for name in ("omp_get_thread_num", "omp_get_num_threads")
    )
    values = builder.load(builder.bitcast(body.args[0], arguments.as_pointer()))
    context.call_conv.call_function(
        builder,
        context.declare_function(module, kernel),
        kernel.restype,
        kernel.argtypes,
        [worker, workers, values],
    )
    builder.ret_void()
    return body
