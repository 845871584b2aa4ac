"""PyTorch's defaults for one thread, whatever the rest of the program sets meanwhile: `PinnedDefaults`.

`torch.set_default_dtype` is process-wide, and every loader of transformers sets it. Within this mode, code that is not
ours (a model's constructor, its own forward pass) gets the pinned dtype and device. Owns no process-wide state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What creates a tensor of the default dtype, unless told otherwise.
_FLOATS: frozenset[Callable[..., Any]] = frozenset(
    (
        torch.empty,
        torch.empty_strided,
        torch.empty_permuted,
        torch.ones,
        torch.zeros,
        torch.eye,
        torch.rand,
        torch.randn,
        torch.linspace,
        torch.logspace,
        torch.normal,
        torch.scalar_tensor,
        torch.bartlett_window,
        torch.blackman_window,
        torch.hamming_window,
        torch.hann_window,
        torch.kaiser_window,
        torch.fft.fftfreq,
        torch.fft.rfftfreq,
    )
)
# What does so for Python floats only.
_OF_VALUES: frozenset[Callable[..., Any]] = frozenset(
    (torch.arange, torch.range, torch.full, torch.tensor, torch.as_tensor, torch.asarray)
)
_OF_INTEGERS: frozenset[Callable[..., Any]] = frozenset(
    (torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices)
)
# What turns tensors of integers into one of the default dtype: always, or when a Python float takes part.
_TO_FLOATS = _names("__truediv__ __rtruediv__ __rdiv__ div divide true_divide reciprocal softmax log_softmax") | _names(
    "exp exp2 log log2 log10 log1p sqrt rsqrt sin cos tan tanh sigmoid erf"
)
_WITH_FLOATS = _names("__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __pow__ __rpow__") | _names(
    "add sub subtract rsub mul multiply pow"
)


class PinnedDefaults(TorchFunctionMode):
    """New tensors of the calling thread have `dtype` and, if given, `device`, unless the code names others.

    A default device needs no pin: `torch.set_default_device` is of one thread. Costs a few microseconds per operation:
    for loading, not for serving.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` with the pinned defaults."""
        named = dict(kwargs or {})
        if func in _FLOATS or func in _OF_VALUES or func in _OF_INTEGERS:
            self._pin(func, args, named)
        elif _makes_floats(func, args, named):
            args = tuple(_cast(value, self.dtype) for value in args)
            named = {name: _cast(value, self.dtype) for name, value in named.items()}
        return func(*args, **named)

    def _pin(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = (*args, *named.values())
        if named.get("out") is not None or (func is torch.normal and any(isinstance(x, Tensor) for x in values)):
            return
        if self.device is not None and named.get("device") is None:
            named["device"] = self.device
        if named.get("dtype") is None and (func in _FLOATS or any(map(_has_python_float, values))):
            named["dtype"] = self.dtype


def _makes_floats(func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether `func` would turn integers into floats of the default dtype."""
    name = getattr(func, "__name__", "")
    if named.get("dtype") is not None or not (name in _TO_FLOATS or name in _WITH_FLOATS):
        return False
    values = (*args, *named.values())
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        return False
    if named.get("rounding_mode") is not None:
        return any(map(_has_python_float, values))
    return name in _TO_FLOATS or any(map(_has_python_float, values))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _has_python_float(value: Any) -> bool:
    """Of a number or nested lists of them; NumPy's numbers and tensors bring a dtype of their own."""
    if isinstance(value, list | tuple):
        return any(map(_has_python_float, value))
    return type(value) is float
