"""`EngineServiceHolder`: an engine of this process as the service behind `RemoteApiInferenceServiceClient`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from penstock.api.prompt import Prompt
from penstock.api.protocols import Engine, Templated
from penstock.backends.services.hf_tokenizer import Tokenizer
from penstock.backends.services.holder import Sample, Sampling, ServiceHolder, Tools
from penstock.backends.services.openai_style import Messages
from penstock.backends.services.records import TrainRecord
from penstock.errors import ConfigurationError, RequestTooLarge
from penstock.outputs import CompletionOutput, RequestOutput
from penstock.sampling import SamplingParams


class EngineServiceHolder(ServiceHolder):
    """Samples from an engine that gives token ids and log probabilities. The caller starts and stops the engine.

    The engine renders and encodes prompts; of `max_tokens`, what fits behind the prompt is generated. `tokenizer` is
    needed only for an engine without one of its own.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser

    def get_tokenizer(self) -> Tokenizer:
        """The given tokenizer, or that of the engine. Raises `ConfigurationError` if there is none."""
        if self._tokenizer is None and isinstance(self._engine, Templated):
            self._engine.start()  # loads the model
            self._tokenizer = copy.deepcopy(cast(Tokenizer | None, self._engine.tokenizer))  # the engine uses its own
        if self._tokenizer is None:
            raise ConfigurationError("the engine has no tokenizer: pass one to EngineServiceHolder")
        return self._tokenizer

    def _sample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        prompt = _explicit(prompt)
        try:
            output = self._engine.generate(prompt, _params(sampling)).result()
        except RequestTooLarge:
            output = self._engine.generate(prompt, _params(replace(sampling, max_tokens=None))).result()
        return _samples(output)

    async def _asample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        prompt = _explicit(prompt)
        try:
            output = await self._engine.generate(prompt, _params(sampling))
        except RequestTooLarge:
            output = await self._engine.generate(prompt, _params(replace(sampling, max_tokens=None)))
        return _samples(output)

    def _chat_prompt(self, messages: Messages, tools: Tools | None) -> Prompt:
        chat: Mapping[str, object] = {"messages": messages}
        return {**chat, "tools": tools} if tools else chat


def _explicit(prompt: Prompt) -> Prompt:
    """A text as a prompt to be continued, which an engine of a chat model would otherwise take for a mistake."""
    return {"prompt": prompt} if isinstance(prompt, str) else prompt


def _samples(output: RequestOutput) -> list[Sample]:
    return [_sample_of(output, completion) for completion in output.outputs]


def _sample_of(output: RequestOutput, completion: CompletionOutput) -> Sample:
    record = TrainRecord(
        output.prompt_token_ids, completion.token_ids, completion.token_logprobs, completion.weight_versions
    )
    return Sample(record, completion.finish_reason or "stop")


def _params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        n=sampling.num_samples,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=sampling.stop,
        seed=sampling.seed,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
