"""What `vllm.utils` had for questions about the platform: `from penstock.utils import is_cpu, is_hip`.

Answers for `device="auto"` on this machine, and imports PyTorch at the first question. Called by programs written for
vLLM; `penstock doctor` prints more.
"""

from __future__ import annotations


def is_hip() -> bool:
    """Whether PyTorch was built for AMD GPUs (ROCm). They are addressed as "cuda" devices."""
    import torch

    return torch.version.hip is not None


def is_cpu() -> bool:
    """Whether `device="auto"` is the CPU, because PyTorch finds no GPU."""
    from penstock.models.loading import resolve_device

    return resolve_device("auto").type == "cpu"
