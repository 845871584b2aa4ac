"""What the program does to PyTorch's process-wide settings changes nothing, and the package changes none of them.

Every tensor made names its dtype and device, for the defaults are anybody's; read from the syntax trees.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from tests.architecture.source import package_files, parsed

BOTH = frozenset({"dtype", "device"})
# Functions that make tensors, and what a call of theirs has to name.
MAKERS: dict[str, frozenset[str]] = {
    "arange": BOTH,
    "as_tensor": BOTH,
    "asarray": BOTH,
    "empty": BOTH,
    "empty_strided": BOTH,
    "eye": BOTH,
    "frombuffer": frozenset({"dtype"}),
    "full": BOTH,
    "linspace": BOTH,
    "logspace": BOTH,
    "normal": BOTH,
    "ones": BOTH,
    "rand": BOTH,
    "randint": BOTH,
    "randn": BOTH,
    "randperm": BOTH,
    "range": BOTH,
    "scalar_tensor": BOTH,
    "tensor": BOTH,
    "tril_indices": BOTH,
    "triu_indices": BOTH,
    "zeros": BOTH,
}
SETTINGS = {
    "set_default_device",
    "set_default_dtype",
    "set_default_tensor_type",
    "set_deterministic_debug_mode",
    "set_float32_matmul_precision",
    "set_flush_denormal",
    "use_deterministic_algorithms",
}


def torch_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call of `torch.name(...)`, or of the module kept as an attribute, with the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if getattr(owner, "id", getattr(owner, "attr", "")) in ("torch", "_torch"):
                yield node.func.attr, node


def violations(files: Mapping[str, str]) -> list[str]:
    """Calls that leave a default to the program, or that set one for it."""
    found = []
    for path, source in files.items():
        for name, call in torch_calls(parsed(source)):
            missing = MAKERS.get(name, frozenset()) - {keyword.arg for keyword in call.keywords}
            if missing:
                found.append(f"{path}:{call.lineno} torch.{name} names no {' and no '.join(sorted(missing))}")
            if name in SETTINGS:
                found.append(f"{path}:{call.lineno} torch.{name} changes what the whole process does")
    return found


def imported_makers(files: Mapping[str, str]) -> list[str]:
    """Makers imported by name, which the calls above would not show."""
    return [
        f"{path}:{node.lineno} {alias.name}"
        for path, source in files.items()
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
        if alias.name in MAKERS or alias.name in SETTINGS
    ]


def test_every_tensor_names_its_dtype_and_its_device() -> None:
    """Buffers of the default dtype were handed to kernels that write float32: the heap was overrun."""
    assert violations(package_files()) == []
    assert imported_makers(package_files()) == []


def test_checker_sees_what_is_left_to_the_defaults() -> None:
    files = {
        "penstock/models/a.py": "torch.empty(3)\ntorch.full((2,), 1.0, dtype=d)\ntorch.zeros(1, dtype=d, device=e)",
        "penstock/models/b.py": "self._torch.tensor(x, device=e)\nx.new_empty(3)\ntorch.frombuffer(x, dtype=d)",
        "penstock/models/c.py": "torch.set_default_dtype(d)",
    }
    assert violations(files) == [
        "penstock/models/a.py:1 torch.empty names no device and no dtype",
        "penstock/models/a.py:2 torch.full names no device",
        "penstock/models/b.py:1 torch.tensor names no dtype",
        "penstock/models/c.py:1 torch.set_default_dtype changes what the whole process does",
    ]
    assert imported_makers({"penstock/d.py": "from torch import Tensor, empty"}) == ["penstock/d.py:1 empty"]
