"""`EngineServiceHolder`: an engine of this process as the service behind `RemoteApiInferenceServiceClient`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from penstock.api.prompt import Prompt
from penstock.api.protocols import Engine, Templated
from penstock.backends.services.hf_tokenizer import Tokenizer
from penstock.backends.services.holder import Sample, Sampling, ServiceHolder, Tools, text_of_tokens
from penstock.backends.services.openai_style import Messages
from penstock.backends.services.records import TrainRecord
from penstock.errors import ConfigurationError
from penstock.outputs import CompletionOutput, RequestOutput
from penstock.sampling import SamplingParams


class EngineServiceHolder(ServiceHolder):
    """Samples from an engine that gives token ids and log probabilities. The caller starts and stops the engine.

    The engine renders and encodes prompts. `tokenizer` is needed only for an engine without one of its own.
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
            self._tokenizer = cast(Tokenizer | None, self._engine.tokenizer)
        if self._tokenizer is None:
            raise ConfigurationError("the engine has no tokenizer: pass one to EngineServiceHolder")
        return self._tokenizer

    def _sample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        return self._samples(self._engine.generate(prompt, _params(sampling)).result())

    async def _asample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        return self._samples(await self._engine.generate(prompt, _params(sampling)))

    def _chat_prompt(self, messages: Messages, tools: Tools | None) -> Prompt:
        chat: Mapping[str, object] = {"messages": messages}
        return {**chat, "tools": tools} if tools else chat

    def _samples(self, output: RequestOutput) -> list[Sample]:
        return [self._sample_of(output, completion) for completion in output.outputs]

    def _sample_of(self, output: RequestOutput, completion: CompletionOutput) -> Sample:
        reason = completion.finish_reason or "stop"
        text = text_of_tokens(self.get_tokenizer(), completion.token_ids, reason)
        record = TrainRecord(
            output.prompt_token_ids, completion.token_ids, completion.token_logprobs, completion.weight_versions
        )
        return Sample(record, text, reason)


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
