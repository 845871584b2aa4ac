"""Decoding is safe for any id that a model samples; a tokenizer's exception ends only its request."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizer

from penstock import InferenceEngine, ScriptedModel
from penstock.engine.text.token_text import Kind, TokenDecoder
from penstock.errors import RequestError
from penstock.sampling import SamplingParams
from tests.letters import LetterTokenizer
from tests.tokenizers_for_tests import byte_fallback, byte_level


class PythonTokenizer(PreTrainedTokenizer):
    """A tokenizer over a dictionary, as in repositories with their own tokenization_*.py; 4 and 5 are gaps."""

    def __init__(self, **options: Any) -> None:
        self._names = {0: "a", 1: "b", 2: "c", 3: "d", 6: "g"}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return 7

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        return {token: id for id, token in self._names.items()} | self.added_tokens_encoder

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names.get(index)  # type: ignore[return-value]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Fails on an id that has no token."""
        return "".join(tokens)


class StrictTokenizer(PythonTokenizer):
    """A tokenizer that knows only one id."""

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]


@pytest.mark.parametrize("make", [PythonTokenizer, StrictTokenizer, byte_level, byte_fallback])
def test_no_id_below_the_models_vocabulary_raises(make: Any) -> None:
    tokenizer = make()
    for skip in (True, False):
        decoder = TokenDecoder(tokenizer, skip)
        assert decoder.kind(599) is Kind.INVISIBLE
        assert [decoder.text([id]) for id in range(len(tokenizer) + 4, 600)] == [""] * (596 - len(tokenizer))


@pytest.mark.parametrize("make", [PythonTokenizer, StrictTokenizer])
def test_ids_outside_a_python_tokenizer_end_no_request_with_logprobs(make: type[PythonTokenizer]) -> None:
    """The detokenizer checked ids, but the texts of logprobs were decoded without a check and raised TypeError."""
    engine = InferenceEngine(ScriptedModel([0, 4, 50, 6], vocab_size=64), make())
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1, stop="zz")
    output = engine.generate([0], params).result(30).outputs[0]
    engine.stop()
    assert output.text == "ag"
    assert [
        entry[token].decoded_token for entry, token in zip(output.logprobs or [], output.token_ids, strict=True)
    ] == [
        "a",
        "",
        "",
        "g",
    ]


def test_tokens_behind_the_gaps_of_a_vocabulary_have_their_text() -> None:
    """Every id above the number of tokens was treated as outside the vocabulary."""
    decoder = TokenDecoder(PythonTokenizer(), skip_special_tokens=True)
    assert [decoder.text([id]) for id in range(8)] == ["a", "b", "c", "d", "", "", "g", ""]
    assert decoder.text([4, 6, 50, 1]) == "gb"


async def test_a_fork_behind_ids_outside_the_tokenizer_has_its_text() -> None:
    """The text before a fork was also decoded without a check."""
    async with InferenceEngine(ScriptedModel([0, 4, 50, 6], vocab_size=64), PythonTokenizer()) as engine:
        origin = engine.generate(
            {"prompt": "d", "prompt_token_ids": [3]}, SamplingParams(max_tokens=1000, ignore_eos=True)
        )
        seen = 0
        async for delta in origin:
            seen += len(delta.token_ids)
            if seen >= 4:
                break
        (fork,) = origin.fork(at=4, params=SamplingParams(max_tokens=2))
        assert (await fork).prompt == "dag"


def test_a_tokenizer_that_really_raises_ends_its_request_alone_with_a_typed_error() -> None:
    engine = InferenceEngine(ScriptedModel(lambda tokens, sample: tokens[0], vocab_size=26), LetterTokenizer())
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=1)
    bad, good = engine.generate([25], params), engine.generate([1], params)
    with pytest.raises(RequestError, match="no text for z"):
        bad.result(30)
    assert good.result(30).outputs[0].text == "bbb"
    engine.stop()
