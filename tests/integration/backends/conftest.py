"""vLLM, started once for all tests of a run: the start takes longer than the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.backends.vllm_engines import RunningLLM, running_llm


@pytest.fixture(scope="session")
def llm_with_logprobs() -> Iterator[RunningLLM]:
    """vLLM with its own defaults."""
    with running_llm() as llm:
        yield llm


@pytest.fixture(scope="session")
def llm_with_logits() -> Iterator[RunningLLM]:
    """vLLM as `create_backend` starts it."""
    with running_llm(logprobs_mode="raw_logits", max_num_seqs=16) as llm:
        yield llm
