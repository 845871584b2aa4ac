"""`MemoryPool`: memory for tensors that every step makes anew, such as its logits.

Owns what it has lent until that is returned, and of what was returned a limited number of bytes. Never clears memory:
a tensor from it holds anything. Used on one thread at a time, by the executor and the rewritten modules; imports torch
when the first pool is made.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from penstock.errors import ConfigurationError, RequestError

SMALLEST = 512  # bytes
HUGE_PAGE = 2 * 1024**2


class MemoryPool:
    """Keeps at most `pool_size` bytes of free memory on `device`, least recently returned first to go.

    A tensor gets the smallest free memory that is large enough, whatever its shape and dtype were before. Where none
    is, new memory is taken, and free memory that is smaller is given up: a batch that grows leaves no trail behind.
    Tensors larger than `pool_size` are served, and not kept. Raises `ConfigurationError` for a negative size.
    """

    def __init__(self, pool_size: int, device: Any = "cpu") -> None:
        import torch

        if pool_size < 0:
            raise ConfigurationError(f"pool_size={pool_size} bytes: it must be 0 or more")
        self.pool_size = pool_size
        self.device = torch.device(device)
        self._torch = torch
        self._lent: dict[int, Any] = {}  # memory by its address
        self._free: OrderedDict[int, Any] = OrderedDict()  # the same, in the order in which it came back
        self._sizes: list[tuple[int, int]] = []  # (bytes, address) of what is free, ascending
        self._free_bytes = self._num_new = self._num_reused = self._num_dropped = 0

    def get_tensor(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """A contiguous tensor of this shape and dtype (float32 by default) with any content, until it is returned."""
        dtype = dtype or self._torch.float32
        num_bytes = math.prod(shape) * dtype.itemsize
        memory = self._take(num_bytes)
        self._lent[memory.data_ptr()] = memory
        return memory[:num_bytes].view(dtype).view(tuple(shape))

    def return_tensor(self, tensor: Any) -> None:
        """The tensor's user is done with it: the next one may write there. Raises `RequestError` for a foreign one."""
        memory = self._lent.pop(tensor.untyped_storage().data_ptr(), None)
        if memory is None:
            raise RequestError("this tensor is not lent by this pool: it came from elsewhere, or was returned before")
        self._keep(memory)

    def return_all(self) -> None:
        """Everybody is done with everything, as at the end of a step."""
        lent, self._lent = self._lent, {}
        for memory in lent.values():
            self._keep(memory)

    def clear_pool(self) -> int:
        """Give up all free memory; how many bytes. What is lent stays lent."""
        freed = self._free_bytes
        while self._free:
            self._drop(next(iter(self._free)))
        return freed

    def stats(self) -> dict[str, int]:
        """Tensors served from new and from kept memory, pieces given up, and bytes that are free and lent now."""
        return {
            "num_new": self._num_new,
            "num_reused": self._num_reused,
            "num_dropped": self._num_dropped,
            "free_bytes": self._free_bytes,
            "lent_bytes": sum(map(len, self._lent.values())),
        }

    def _take(self, num_bytes: int) -> Any:
        at = bisect_left(self._sizes, (num_bytes, 0))
        if at < len(self._sizes):
            self._num_reused += 1
            return self._remove(self._sizes[at][1])
        for _, address in self._sizes[:]:
            self._drop(address)
        self._num_new += 1
        return self._new(self._size_class(num_bytes))

    def _size_class(self, num_bytes: int) -> int:
        """Rounded up by at most a quarter, so that slow growth seldom takes new memory; never out of the pool."""
        step = max(SMALLEST, (1 << max(0, num_bytes - 1).bit_length()) // 8)
        size = max(SMALLEST, -(-num_bytes // step) * step)
        return size if size <= self.pool_size else max(num_bytes, 1)

    def _new(self, num_bytes: int) -> Any:
        """Memory of the system. Large pieces are on huge pages where there are such, and cost nothing until touched."""
        if self.device.type == "cpu" and num_bytes >= HUGE_PAGE:
            from penstock.kernels.native import pages

            return pages(num_bytes)
        return self._torch.empty(num_bytes, dtype=self._torch.uint8, device=self.device)

    def _keep(self, memory: Any) -> None:
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

    def _remove(self, address: int) -> Any:
        memory = self._free.pop(address)
        del self._sizes[bisect_left(self._sizes, (len(memory), address))]
        self._free_bytes -= len(memory)
        return memory
