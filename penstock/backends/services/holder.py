"""`ServiceHolder`: samples of a service as plain dictionaries, for `RemoteApiInferenceServiceClient`.

A subclass holds the service, and draws samples of a prompt in `_sample`. Rendering, parsing and the shape of the result
are here. The SDKs of the services retry by themselves; nothing here does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.api.prompt import Prompt
from penstock.backends.services.hf_tokenizer import Tokenizer
from penstock.backends.services.openai_style import Messages
from penstock.backends.services.parsing import Answer, OutputFormats, read_answer
from penstock.backends.services.records import Json, TrainRecord
from penstock.backends.services.templates import render_chat
from penstock.errors import ExecutionError
from penstock.tools import read_tools
from penstock.values import items

Tools = Sequence[Mapping[str, object]]
_PROMPT_END = 64  # tokens of a prompt that decide whether its template has begun the reasoning


@dataclass(frozen=True, slots=True)
class Sampling:
    """How samples are drawn, in the words of the services: `top_k` -1 and `max_tokens` None are no limit."""

    max_tokens: int | None
    temperature: float = 1.0
    num_samples: int = 1
    stop: Sequence[str] = ()
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: its record, and why it ended ("stop", "length", "abort")."""

    record: TrainRecord
    finish_reason: str


class ServiceHolder(ABC):
    """Draws samples from a service. Every method has a twin for event loops, whose name begins with `a`.

    A result describes its first sample: `response`, `prompt_tokens`, `response_tokens`, `response_logprobs`,
    `finish_reason`, `reasoning_string`, `tool_string`, `tool_calls`, `tool_attempts` and `is_valid`, with
    `weight_version` where the service gives one. `samples` lists all of them in the same form.
    """

    tool_parser: str | None = None
    reasoning_parser: str | None = None

    @abstractmethod
    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""

    @abstractmethod
    def _sample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        """The samples of a prompt, as many as were asked for. Raises `PenstockError`."""

    @abstractmethod
    async def _asample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        """`_sample` for event loops."""

    def sample_from_prompt(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        temperature: float = 1.0,
        num_samples: int = 1,
        **more: object,
    ) -> Json:
        """Complete a prompt. `more` has further fields of `Sampling`. Raises `PenstockError`."""
        sampling = _sampling(max_tokens, temperature, num_samples, more)
        return _result([self._plain(sample) for sample in self._sample(prompt, sampling)], num_samples)

    async def asample_from_prompt(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        temperature: float = 1.0,
        num_samples: int = 1,
        **more: object,
    ) -> Json:
        """`sample_from_prompt` for event loops."""
        sampling = _sampling(max_tokens, temperature, num_samples, more)
        return _result([self._plain(sample) for sample in await self._asample(prompt, sampling)], num_samples)

    def sample_from_messages(
        self,
        messages: Messages,
        max_tokens: int,
        temperature: float = 1.0,
        num_samples: int = 1,
        tools: Tools | None = None,
        **more: object,
    ) -> Json:
        """Answer a chat. `tools` are those that the model may call. Raises `PenstockError`."""
        sampling = _sampling(max_tokens, temperature, num_samples, more)
        samples = self._sample(self._chat_prompt(messages, tools), sampling)
        return _result([self._parsed(sample, tools) for sample in samples], num_samples)

    async def asample_from_messages(
        self,
        messages: Messages,
        max_tokens: int,
        temperature: float = 1.0,
        num_samples: int = 1,
        tools: Tools | None = None,
        **more: object,
    ) -> Json:
        """`sample_from_messages` for event loops."""
        sampling = _sampling(max_tokens, temperature, num_samples, more)
        samples = await self._asample(self._chat_prompt(messages, tools), sampling)
        return _result([self._parsed(sample, tools) for sample in samples], num_samples)

    def apply_chat_template(
        self,
        messages: Messages,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The prompt of a chat as text, or as token ids. Raises `RequestError`."""
        options = {"add_generation_prompt": add_generation_prompt}
        return render_chat(self.get_tokenizer(), messages, tools, tokenize=tokenize, **options)

    def _chat_prompt(self, messages: Messages, tools: Tools | None) -> Prompt:
        """What `_sample` is given for a chat: its token ids."""
        return self.apply_chat_template(messages, tools, tokenize=True)

    def _plain(self, sample: Sample) -> Json:
        return _sample_json(sample, Answer(text_of_tokens(self.get_tokenizer(), sample.record.response_tokens)))

    def _parsed(self, sample: Sample, tools: Tools | None) -> Json:
        tokenizer, tokens = self.get_tokenizer(), sample.record.response_tokens
        formats = OutputFormats.of_template(tokenizer.chat_template, self.tool_parser, self.reasoning_parser)
        looks_for_calls = tools is not None or self.tool_parser is not None
        answer = read_answer(
            text_of_tokens(tokenizer, tokens, sample.finish_reason),
            formats,
            read_tools(tools) if looks_for_calls else None,
            prompt=tokenizer.decode(list(sample.record.prompt_tokens[-_PROMPT_END:])),
            is_cut=sample.finish_reason == "length",
        )
        return _sample_json(sample, answer)


def text_of_tokens(tokenizer: Tokenizer, tokens: Sequence[int], finish_reason: str = "") -> str:
    """The text of sampled tokens with special tokens, but after "stop" without those that ended it."""
    end = len(tokens)
    while finish_reason == "stop" and end > 0 and tokens[end - 1] in tokenizer.all_special_ids:
        end -= 1
    return tokenizer.decode(list(tokens[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _sampling(max_tokens: int, temperature: float, num_samples: int, more: Mapping[str, object]) -> Sampling:
    stop = more.get("stop")
    stops = {"stop": (stop,) if isinstance(stop, str) else items("stop", stop)} if "stop" in more else {}
    return Sampling(max_tokens, temperature, num_samples, **{**more, **stops})  # type: ignore[arg-type]


def _sample_json(sample: Sample, answer: Answer) -> Json:
    return {
        "response": answer.content,
        **sample.record.to_dict(),
        "finish_reason": answer.finish_reason(sample.finish_reason),
        "reasoning_string": answer.reasoning,
        "tool_string": "\n".join(call.raw_text for call in answer.tool_calls),
        "tool_calls": [call.to_dict() for call in answer.tool_calls],
        "tool_attempts": [attempt.to_dict() for attempt in answer.attempts],
        "is_valid": answer.is_valid,
    }


def _result(samples: list[Json], num_samples: int) -> Json:
    if len(samples) != num_samples:
        raise ExecutionError(f"the service returned {len(samples)} samples of {num_samples}")
    return {**samples[0], "samples": samples}
