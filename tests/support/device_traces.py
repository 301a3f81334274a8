"""What a function has a device do, seen without one: whether the host waits, and whether it is ever the same.

A CUDA graph replays launches as they were, with the numbers they had and the memory they named. So what is
recorded must launch the same for every step, and must not look at what the device computed.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

_READ = {"item", "tolist", "numpy", "cpu", "cuda", "__bool__", "__int__", "__float__", "__index__", "equal"}
# Their result's shape, or what they do, depends on numbers.
_DEPEND = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero", "equal"}


class Waits:
    """`found` are the calls for which a host waits for its device, in a block."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = ExitStack()

    def __enter__(self):
        found = self.found

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                name = getattr(function, "__name__", "")
                if name in _READ:
                    found.append(name)
                return function(*args, **kwargs or {})

        class Calls(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.overloadpacket.__name__
                if name in _DEPEND or _has_mask_index(name, args):
                    found.append(name)
                return function(*args, **kwargs or {})

        self._modes.enter_context(Functions())
        self._modes.enter_context(Calls())
        return self

    def __exit__(self, *error):
        return self._modes.__exit__(*error)


def _has_mask_index(name, args):
    return name in {"index", "index_put", "index_put_"} and any(
        isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
    )


class Launches(TorchDispatchMode):
    """`trace` is every call that reaches the device, and every Triton kernel, with its arguments: numbers as
    they are, tensors by dtype, shape, strides and, where the block did not make them, by address. `devices`
    are those of the arguments of kernels and of all results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[object] = []
        self.devices: set[torch.device] = set()
        self._made: dict[int, torch.UntypedStorage] = {}
        self._kernels = ExitStack()

    def __enter__(self):
        self._kernels.enter_context(_launching(self._launch))
        return super().__enter__()

    def __exit__(self, *error):
        self._kernels.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.trace.append((str(function), self._seen((args, kwargs))))
        result = function(*args, **kwargs)
        self.devices |= {each.device for each in tree_flatten(result)[0] if isinstance(each, torch.Tensor)}
        known = {id(each) for each in tree_flatten((args, kwargs))[0]}
        for each in tree_flatten(result)[0]:
            if isinstance(each, torch.Tensor) and id(each) not in known and not each._is_view():
                # Kept, so that nothing else is made at its address.
                self._made[each.untyped_storage()._cdata] = each.untyped_storage()
        return result

    def _launch(self, kernel, grid, args, options):
        self.trace.append((kernel, grid, self._seen((args, options))))
        self.devices |= {each.device for each in args if isinstance(each, torch.Tensor)}

    def _seen(self, arguments):
        return [self._of(each) for each in tree_flatten(arguments)[0]]

    def _of(self, each):
        if not isinstance(each, torch.Tensor):
            return str(each) if isinstance(each, torch.device | torch.dtype) else each
        made = each.untyped_storage()._cdata in self._made or each.device.type == "meta"
        return each.dtype, tuple(each.shape), each.stride(), None if made else each.data_ptr()


class Peak(TorchDispatchMode):
    """`num_bytes` is the most that was allocated at a time in the block, of what the block itself made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._kernels = ExitStack()

    def __enter__(self):
        self._kernels.enter_context(_launching(lambda *_: None))
        return super().__enter__()

    def __exit__(self, *error):
        self._kernels.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = filter(_is_tensor, tree_flatten((args, kwargs))[0])
        given = {each.untyped_storage()._cdata for each in tensors}
        result = function(*args, **kwargs or {})
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        for each in filter(_is_tensor, tree_flatten(result)[0]):
            storage = each.untyped_storage()
            if storage._cdata not in given:
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.num_bytes = max(self.num_bytes, sum(size for _, size in self._made.values()))
        return result


def _is_tensor(each):
    return isinstance(each, torch.Tensor)


@contextmanager
def _launching(tell):
    """Call `tell` before each Triton kernel, of which on a device without memory that is all."""
    from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415 (not everybody has Triton)
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    interpreted, compiled = InterpretedFunction.__getitem__, JITFunction.__getitem__

    def launch(function, grid):
        def run(*args, **options):
            tell(function.__name__, tuple(grid), args, options)
            if not any(isinstance(each, torch.Tensor) and each.is_meta for each in args):
                plain = interpreted if isinstance(function, InterpretedFunction) else compiled
                with _disable_current_modes():  # the interpreter computes with tensors too
                    plain(function, grid)(*args, **options)

        return run

    InterpretedFunction.__getitem__ = JITFunction.__getitem__ = launch
    try:
        yield
    finally:
        InterpretedFunction.__getitem__, JITFunction.__getitem__ = interpreted, compiled
