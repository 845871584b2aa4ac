"""`Kernels`, the compiled CPU kernels and their pool of threads, and the checks of every tensor that they are given.

Owns the pool; every tensor is the caller's. Holds no lock while a kernel runs. Used by one thread at a time. The calls
are in `products`, `paged`, `program` and `logits`. A kernel trusts its arguments, so the address of a tensor comes from
`operand` or `strided`, which compare dtype, shape, strides and device. Layouts are documented in `cpu/*.c`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.build import build
from penstock.kernels.structures import STRUCTURES, Int, Long, Ptr

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TYPES = FLOATS | {torch.int8: 3}


def available() -> bool:
    """Whether the compiled kernels can be used here."""
    return build().library is not None


def note() -> str:
    """How the kernels were compiled, or why they are not available."""
    return build().note


class Kernels:
    """The compiled kernels, or those of another build's `library`, on a pool of `threads` threads; `close()` ends them.

    While other programs occupy cores, only `active` of the threads are used, for a second at a time.
    """

    def __init__(self, threads: int, library: ctypes.CDLL | None = None) -> None:
        library = library or build().library
        assert library is not None, "ask available() first"
        self.library = library
        self.threads = threads
        library.ps_pool_new.restype = Ptr
        for name in ("ps_columns", "ps_lanes", "ps_cache_bytes", "ps_low_rank_bytes"):
            getattr(library, name).restype = Long
        for name in ("ps_linear", "ps_low_rank"):
            getattr(library, name).argtypes = [Ptr, Ptr, Ptr, Long, Long, Ptr, Long, Ptr]
        library.ps_low_rank_bytes.argtypes = [Ptr, Long]
        library.ps_pack_low_ranks.argtypes = [Ptr, Long, Ptr]
        library.ps_norm.argtypes = [Ptr, Ptr, Ptr, Long, Ptr, Int]
        library.ps_attention.argtypes = [Ptr, Ptr]
        library.ps_program.argtypes = [Ptr, Ptr]
        library.ps_rotate.argtypes = [Ptr, Long, Long]
        compare_sizes(library, STRUCTURES)
        self.pool = Ptr(library.ps_pool_new(threads))
        self.lanes = int(library.ps_lanes())
        self._workspace = pages(0)
        self._adapter_slots: tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]] | None = None

    def close(self) -> None:
        """End the threads. Nothing that uses these kernels may be called afterwards."""
        if self.pool:
            self.library.ps_pool_free(self.pool)
            self.pool = Ptr()

    @property
    def active(self) -> int:
        """Number of threads that the next call runs on."""
        return int(self.library.ps_pool_active(self.pool))

    def workspace(self, num_bytes: int) -> int:
        """The address of scratch memory, valid until the next call; it is kept because fresh pages are slow."""
        if num_bytes > len(self._workspace):
            self._workspace = pages(num_bytes)
        return self._workspace.data_ptr()

    def select_adapters(self, slots: np.ndarray | None, logit_slots: np.ndarray | None = None) -> None:
        """Run each token of the next calls with the adapter of its slot, int32 [T], -1 for none; None: all without.

        `logit_slots` int32 [L] are the same for the rows of the output head.
        """
        self._adapter_slots = None
        if slots is not None and logit_slots is not None:
            self._adapter_slots = (slots, slots.ctypes.data), (logit_slots, logit_slots.ctypes.data)

    def adapter_slots(self, rows: int, *, is_head: bool = False) -> int | None:
        """The address of the selected slots for a layer of so many rows; None if no row has an adapter."""
        if self._adapter_slots is None:
            return None
        slots, address = self._adapter_slots[is_head]
        if len(slots) != rows:
            raise AssertionError(
                f"a layer with an adapter runs on {rows} rows of {len(slots)}: layers that see a part of a step's "
                "tokens, as experts do, cannot have adapters"
            )
        return address

    def columns(self, n: int) -> int:
        """n outputs rounded up to whole panels of packed weights."""
        return int(self.library.ps_columns(Long(n)))


def pages(num_bytes: int) -> Tensor:
    """Zeroed memory that takes no pages until it is touched, on huge pages if the system has them."""
    region = mmap.mmap(-1, max(1, num_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system may be built without them
            region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def floats(x: Tensor) -> Tensor:
    """A contiguous float32 copy."""
    return x.detach().float().contiguous().clone()


def write_floats(*pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Copy the second tensor of each pair into the first, of the same shape, where there is one."""
    for target, value in pairs:
        if value is not None:
            if target is None or target.shape != value.shape:
                raise AssertionError(f"{tuple(value.shape)} cannot replace {target and tuple(target.shape)}")
            target.copy_(value.detach())


def check(status: int) -> None:
    """Raise `MemoryError` if a kernel returned 0: it could not allocate its scratch."""
    if not status:
        raise MemoryError("no memory for the kernels' scratch: lower max_num_batched_tokens")


def address(x: Tensor | None) -> int | None:
    """The address of a tensor that the kernels package made itself; None for None."""
    return None if x is None else x.data_ptr()


def operand(x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of x, a contiguous CPU tensor of this dtype and shape. Raises `AssertionError` if it is not one."""
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        raise _misfit(x, dtype, shape)
    return x.data_ptr()


def strided(x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """As `operand`, but only the last dimension has to be contiguous."""
    if x.dtype != dtype or x.shape != shape or (x.stride(-1) != 1 and shape[-1] > 1) or not x.is_cpu:
        raise _misfit(x, dtype, shape)
    return x.data_ptr()


def compare_sizes(library: ctypes.CDLL, mirrors: Mapping[str, type[ctypes.Structure]]) -> None:
    """Raise `AssertionError` if a structure, by the name of its type in C, has another size there."""
    library.ps_size_of.restype = Long
    for name, mirror in mirrors.items():
        size = library.ps_size_of(name.encode())
        if size != ctypes.sizeof(mirror):
            raise AssertionError(f"struct {name} has {ctypes.sizeof(mirror)} bytes in Python and {size} in C")


def _misfit(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> AssertionError:
    layout = f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
    return AssertionError(f"a kernel was given {x.dtype} {layout} where it takes {dtype} {shape} on the CPU")
