"""Malformed calls in what `InferenceModule` generates: none raises, and no complete call is lost beside them."""

from __future__ import annotations

import pytest

from penstock import InferenceModule
from penstock.training.backend import EngineBackend
from tests.malformed_tool_calls import FAILURES
from tests.scripted_engine import replying_engine
from tests.unit.tools.texts import TOOLS


@pytest.mark.parametrize("format", sorted({failure.format for failure in FAILURES}))
def test_complete_calls_are_found_in_every_row_of_a_batch(format: str) -> None:
    failures = [failure for failure in FAILURES if failure.format == format]
    replies = {f"task {number}.": failure.text for number, failure in enumerate(failures)}
    tools = [tool.to_dict() for tool in TOOLS]
    with replying_engine(replies) as engine:
        module = InferenceModule(backend=EngineBackend(engine), tool_parser=format)
        result, tool_calls = module.batch_generate_with_tools(
            list(replies), tools, num_return_sequences=2, return_logprobs=True
        )
    rows = [failure for failure in failures for _ in range(2)]
    assert [text.removesuffix("</s>") for text in result.texts] == [failure.text for failure in rows]
    for failure, calls in zip(rows, tool_calls, strict=True):
        assert [call.name for call in calls] == [name for status, name in failure.attempts if status == "complete"]
        assert all(call.raw_text in failure.text for call in calls)
    assert [len(row) for row in result.logprobs or []] == [len(ids) for ids in result.token_ids]
