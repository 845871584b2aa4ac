"""`MemoryPool`: memory for tensors that every step allocates anew, such as its logits.

Owns the memory of the tensors it has lent, and up to a limit the memory of those that were returned. Never clears
memory: a new tensor holds arbitrary values. Used on one thread at a time, by the executor and the rewritten modules;
imports torch when the first pool is created.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from penstock.errors import ConfigurationError, RequestError

MIN_BYTES = 512
HUGE_PAGE = 2 * 1024**2


class _Memory(Protocol):
    """A tensor of bytes; this module is imported without torch."""

    def data_ptr(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: slice) -> Any: ...  # a torch.Tensor


class MemoryPool:
    """Holds at most `pool_size` bytes of free memory on `device`; the least recently returned is released first.

    A tensor gets the smallest free memory that is large enough, whatever its shape and dtype were before. If there is
    none, new memory is allocated and the free memory, which is smaller, is released: a growing batch leaves nothing
    behind. Tensors larger than `pool_size` are allocated, but not held. Raises `ConfigurationError` for a negative
    size.
    """

    def __init__(self, pool_size: int, device: Any = "cpu") -> None:
        import torch

        if pool_size < 0:
            raise ConfigurationError(f"pool_size={pool_size} bytes: it must be 0 or more")
        self.pool_size = pool_size
        self.device = torch.device(device)
        self._torch = torch
        self._lent: dict[int, _Memory] = {}  # by address
        self._free: OrderedDict[int, _Memory] = OrderedDict()  # by address, in the order of return
        self._sizes: list[tuple[int, int]] = []  # (bytes, address) of the free memory, ascending
        self._free_bytes = self._num_new = self._num_reused = self._num_dropped = 0

    def get_tensor(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """A contiguous tensor of this shape and dtype (float32 by default) with arbitrary values."""
        dtype = dtype or self._torch.float32
        num_bytes = math.prod(shape) * dtype.itemsize
        memory = self._take(num_bytes)
        self._lent[memory.data_ptr()] = memory
        return memory[:num_bytes].view(dtype).view(tuple(shape))

    def return_tensor(self, tensor: Any) -> None:
        """Return a tensor that is no longer in use. Raises `RequestError` for one that this pool did not lend."""
        memory = self._lent.pop(tensor.untyped_storage().data_ptr(), None)
        if memory is None:
            raise RequestError("this tensor is not lent by this pool: it came from elsewhere, or was returned before")
        self._hold(memory)

    def return_all(self) -> None:
        """Return all tensors, as at the end of a step."""
        lent, self._lent = self._lent, {}
        for memory in lent.values():
            self._hold(memory)

    def clear_pool(self) -> int:
        """Release all free memory; how many bytes. Lent memory is unaffected."""
        freed = self._free_bytes
        while self._free:
            self._drop(next(iter(self._free)))
        return freed

    def stats(self) -> dict[str, int]:
        """Number of tensors in new and in reused memory, pieces released, and bytes that are free and lent now."""
        return {
            "num_new": self._num_new,
            "num_reused": self._num_reused,
            "num_dropped": self._num_dropped,
            "free_bytes": self._free_bytes,
            "lent_bytes": sum(map(len, self._lent.values())),
        }

    def _take(self, num_bytes: int) -> _Memory:
        index = bisect_left(self._sizes, (num_bytes, 0))
        if index < len(self._sizes):
            self._num_reused += 1
            return self._remove(self._sizes[index][1])
        for _, address in self._sizes[:]:
            self._drop(address)
        self._num_new += 1
        return self._allocate(self._size_class(num_bytes))

    def _size_class(self, num_bytes: int) -> int:
        """Rounded up by at most a quarter, so that slow growth seldom allocates; never beyond the pool's size."""
        step = max(MIN_BYTES, (1 << max(0, num_bytes - 1).bit_length()) // 8)
        size = max(MIN_BYTES, -(-num_bytes // step) * step)
        return size if size <= self.pool_size else max(num_bytes, 1)

    def _allocate(self, num_bytes: int) -> _Memory:
        """New memory. Large pieces lie on huge pages where the system has them, and cost nothing until touched."""
        if self.device.type == "cpu" and num_bytes >= HUGE_PAGE:
            from penstock.kernels.native import pages

            memory: _Memory = pages(num_bytes)
            return memory
        return self._torch.empty(num_bytes, dtype=self._torch.uint8, device=self.device)

    def _hold(self, memory: _Memory) -> None:
        if len(memory) > self.pool_size:
            self._num_dropped += 1
            return
        while self._free_bytes + len(memory) > self.pool_size:
            self._drop(next(iter(self._free)))
        self._free[memory.data_ptr()] = memory
        insort(self._sizes, (len(memory), memory.data_ptr()))
        self._free_bytes += len(memory)

    def _drop(self, address: int) -> None:
        self._num_dropped += 1
        self._remove(address)

    def _remove(self, address: int) -> _Memory:
        memory = self._free.pop(address)
        del self._sizes[bisect_left(self._sizes, (len(memory), address))]
        self._free_bytes -= len(memory)
        return memory
