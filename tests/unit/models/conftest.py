"""`logit_kernels`: a test that uses it runs in plain torch, and with the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.kernels.logits import LogitKernels
from penstock.kernels.native import Kernels, available
from penstock.models.vocabulary import CHUNK


@pytest.fixture(scope="module", params=["plain torch", "kernels"])
def logit_kernels(request: pytest.FixtureRequest) -> Iterator[LogitKernels | None]:
    """The kernels of a sampler, or none."""
    if request.param == "plain torch":
        yield None
        return
    if not available():
        pytest.skip("no compiler")
    kernels = Kernels(2)
    yield LogitKernels(kernels, CHUNK)
    kernels.close()
