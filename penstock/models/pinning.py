"""PyTorch's defaults for one thread, whatever the rest of the program sets meanwhile: `PinnedDefaults`.

`torch.set_default_dtype` is process-wide, and every `from_pretrained` sets it. Within this mode, code that is not ours
(a model's constructor, its own forward pass) gets the pinned dtype and device. Owns no process-wide state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Function = Callable[..., object]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions that create a tensor of the default dtype unless they are given one.
_FLOAT_MAKERS: frozenset[Function] = frozenset(
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
# The same, for Python floats only.
_MAKERS_FROM_VALUES: frozenset[Function] = frozenset(
    (torch.arange, torch.range, torch.full, torch.tensor, torch.as_tensor, torch.asarray)
)
_INTEGER_MAKERS: frozenset[Function] = frozenset(
    (torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices)
)
# Functions that turn integer tensors into one of the default dtype: always, or with a Python float among the arguments.
_TO_FLOATS = _names("__truediv__ __rtruediv__ __rdiv__ div divide true_divide reciprocal softmax log_softmax") | _names(
    "exp exp2 log log2 log10 log1p sqrt rsqrt sin cos tan tanh sigmoid erf"
)
_WITH_FLOATS = _names("__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __pow__ __rpow__") | _names(
    "add sub subtract rsub mul multiply pow"
)


class PinnedDefaults(TorchFunctionMode):
    """New tensors of the calling thread have `dtype` and, if given, `device`, unless the code names others.

    The program's default device needs no pin: `torch.set_default_device` affects one thread. Costs a few microseconds
    per operation: for loading, not for serving.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device

    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run `func` with the pinned defaults."""
        keywords = dict(kwargs or {})
        if func in _FLOAT_MAKERS or func in _MAKERS_FROM_VALUES or func in _INTEGER_MAKERS:
            self._pin(func, args, keywords)
        elif _makes_floats(func, args, keywords):
            args = tuple(_cast(value, self.dtype) for value in args)
            keywords = {name: _cast(value, self.dtype) for name, value in keywords.items()}
        return func(*args, **keywords)

    def _pin(self, func: Function, args: tuple[object, ...], keywords: dict[str, object]) -> None:
        values = (*args, *keywords.values())
        if keywords.get("out") is not None or (func is torch.normal and any(isinstance(x, Tensor) for x in values)):
            return
        if self.device is not None and keywords.get("device") is None:
            keywords["device"] = self.device
        if keywords.get("dtype") is None and (func in _FLOAT_MAKERS or any(map(_has_python_float, values))):
            keywords["dtype"] = self.dtype


def _makes_floats(func: Function, args: tuple[object, ...], keywords: Mapping[str, object]) -> bool:
    """Whether `func` would turn integers into floats of the default dtype."""
    name = getattr(func, "__name__", "")
    if keywords.get("dtype") is not None or not (name in _TO_FLOATS or name in _WITH_FLOATS):
        return False
    values = (*args, *keywords.values())
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        return False
    if keywords.get("rounding_mode") is not None:
        return any(map(_has_python_float, values))
    return name in _TO_FLOATS or any(map(_has_python_float, values))


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _has_python_float(value: object) -> bool:
    """Whether a number or nested lists of them hold a Python float; NumPy numbers and tensors have their own dtype."""
    if isinstance(value, list | tuple):
        return any(map(_has_python_float, value))
    return type(value) is float
