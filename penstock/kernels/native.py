"""The compiled CPU kernels' pool of threads, and what all callers of them need: `Kernels`, `operand`, `survey_logits`.

Owns the pool; every tensor is the caller's. Holds no lock while a kernel runs. Used by one thread at a time. The calls
are in `products` and `paged`; layouts and the order of sums are documented in `native.c`. A kernel believes what it is
told of a tensor, so every tensor is looked at by `operand` or `strided` before its address is handed over.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock.kernels.build import build

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TYPES = FLOATS | {torch.int8: 3}

Ptr, Long, Int, Float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int32, ctypes.c_float


_structures: dict[str, type[ctypes.Structure]] = {}


def struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A C structure of these fields, in order; `name` is its type in native.c."""
    _structures[name] = type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})
    return _structures[name]


_Survey = struct(
    "survey", logits=Ptr, rows=Long, width=Long, block=Long, peaks=Ptr, greatest=Ptr, totals=Ptr, tokens=Ptr
)


def available() -> bool:
    """Whether the compiled kernels can be used here."""
    return build().library is not None


def note() -> str:
    """How the kernels were compiled, or why there are none."""
    return build().note


class Kernels:
    """A pool of `threads` threads that run the compiled kernels, or another build's `library`. `close()` ends them.

    Where other programs hold cores, some of the threads sit out for a second at a time: `active` are left.
    """

    def __init__(self, threads: int, library: ctypes.CDLL | None = None) -> None:
        library = library or build().library
        assert library is not None, "ask available() first"
        self.library = library
        self.threads = threads
        for name in ("ps_pool_new", "ps_columns", "ps_lanes", "ps_cache_bytes"):
            getattr(library, name).restype = Long if name != "ps_pool_new" else Ptr
        library.ps_linear.argtypes = [Ptr, Ptr, Ptr, Long, Long, Ptr, Long]
        library.ps_norm.argtypes = [Ptr, Ptr, Ptr, Long, Ptr, Int]
        library.ps_attention.argtypes = [Ptr, Ptr]
        library.ps_program.argtypes = [Ptr, Ptr]
        compare_sizes(library, _structures)
        self.pool = Ptr(library.ps_pool_new(threads))
        self.lanes = int(library.ps_lanes())
        self._workspace = pages(0)

    def close(self) -> None:
        """End the threads. Nothing made from these kernels may run afterwards."""
        if self.pool:
            self.library.ps_pool_free(self.pool)
            self.pool = Ptr()

    @property
    def active(self) -> int:
        """How many of the threads share the work at present."""
        return int(self.library.ps_pool_active(self.pool))

    def workspace(self, num_bytes: int) -> int:
        """The address of memory that is anybody's until the next kernel is called; kept, for fresh pages are slow."""
        if num_bytes > len(self._workspace):
            self._workspace = pages(num_bytes)
        return self._workspace.data_ptr()

    def columns(self, n: int) -> int:
        """Packed columns of n outputs: n rounded up to whole panels."""
        return int(self.library.ps_columns(Long(n)))


class Surveyed(NamedTuple):
    """Of logits [R, N * block]: each block's greatest `peaks` [R, N] and the row's `greatest` [R], both float32.

    `totals` is the sum of exp(logit - greatest), float64 [R]; `tokens` the first of the greatest, int64 [R]. A row
    with a NaN has a NaN for its greatest and its total.
    """

    peaks: Tensor
    greatest: Tensor
    totals: Tensor
    tokens: Tensor


def survey_logits(kernels: Kernels, logits: Tensor, block: int) -> Surveyed:
    """Look at logits float32 [R, N * block] once. `block` is a multiple of 16 that divides 8192."""
    rows, width = logits.shape
    if width % block or block % 16 or 8192 % block:
        raise AssertionError(f"rows of {width} logits are not blocks of {block}")
    at = operand(logits, torch.float32, rows, width)
    found = Surveyed(
        logits.new_empty(rows, width // block),
        logits.new_empty(rows),
        logits.new_empty(rows, dtype=torch.float64),
        logits.new_empty(rows, dtype=torch.int64),
    )
    call = _Survey(at, rows, width, block, *(x.data_ptr() for x in found))
    check(kernels.library.ps_survey(kernels.pool, ctypes.byref(call)))
    return found


def pages(num_bytes: int) -> Tensor:
    """Zeroed bytes that cost nothing until they are touched, on huge pages where the system has them."""
    region = mmap.mmap(-1, max(1, num_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system may be built without them
            region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def floats(x: Tensor) -> Tensor:
    """A float32 copy whose numbers lie side by side."""
    return x.detach().float().contiguous().clone()


def check(enough: int) -> None:
    """Raise `MemoryError` where a kernel found none for its scratch."""
    if not enough:
        raise MemoryError("no memory for the kernels' scratch: lower max_num_batched_tokens")


def address(x: Tensor | None) -> int | None:
    """Where the numbers of a tensor that the caller made begin; None for none."""
    return None if x is None else x.data_ptr()


def operand(x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Where the numbers of x begin, which are of this dtype and shape and lie side by side.

    Raises `AssertionError` if they do not: whoever calls a kernel with such a tensor is broken.
    """
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        raise _misfit(x, dtype, shape)
    return x.data_ptr()


def strided(x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """As `operand`, but only the numbers of the last dimension lie side by side."""
    if x.dtype != dtype or x.shape != shape or (x.stride(-1) != 1 and shape[-1] > 1) or not x.is_cpu:
        raise _misfit(x, dtype, shape)
    return x.data_ptr()


def compare_sizes(library: ctypes.CDLL, mirrors: Mapping[str, type[ctypes.Structure]]) -> None:
    """Raise `AssertionError` where a structure, by its type in native.c, has not the size that it has there."""
    library.ps_size_of.restype = Long
    for name, mirror in mirrors.items():
        size = library.ps_size_of(name.encode())
        if size != ctypes.sizeof(mirror):
            raise AssertionError(f"struct {name} has {ctypes.sizeof(mirror)} bytes in Python and {size} in native.c")


def _misfit(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> AssertionError:
    layout = f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
    return AssertionError(f"a kernel was given {x.dtype} {layout} where it takes {dtype} {shape} on the CPU")
