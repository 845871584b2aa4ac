"""The fake model returns whatever a real model would."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import ConfigurationError, InferenceEngine, SamplingParams, ScriptedModel


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_a_script_answers_prompt_logprobs(chunk: int, n: int) -> None:
    """It left them out, and requests for them failed without a typed error."""
    engine = InferenceEngine(ScriptedModel([5, 6]), max_num_batched_tokens=chunk)
    params = SamplingParams(max_tokens=2, prompt_logprobs=1, n=n)
    output = engine.generate([1, 2, 3, 4, 8, 9], params).result(30)
    engine.stop(0)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    scored = [entry for entry in output.prompt_logprobs if entry is not None]
    assert [next(iter(entry)) for entry in scored] == [2, 3, 4, 8, 9]
    assert {entry[token].logprob for entry in scored for token in entry} == {0.0}
    assert [out.token_ids for out in output.outputs] == [[5, 6]] * n


async def test_a_script_scores_completions_as_certain() -> None:
    """`score()` raised a ValueError of `zip`."""
    async with InferenceEngine(ScriptedModel([5, 6]), max_num_batched_tokens=4) as engine:
        (score,) = await engine.score([1, 2, 3], [4, 5, 6, 7], params=SamplingParams(), logits=True, entropies=True)
        assert score.logprobs.tolist() == score.tempered.tolist() == score.entropies.tolist() == [0.0] * 4
        assert score.logits.argmax(-1).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("script", ["abc", [1, "a"]])
def test_a_script_without_token_ids_is_refused(script: Any) -> None:
    """Its tokens ended the engine's thread, and with it all requests."""
    with pytest.raises(ConfigurationError, match="a script is a list of token ids or a function"):
        ScriptedModel(script)
