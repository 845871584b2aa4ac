"""What a server answered, with the training records, and with tool calls where the server left them in the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penstock.api.prompt import read_ids
from penstock.backends.services.hf_tokenizer import Tokenizer
from penstock.backends.services.holder import text_of_tokens
from penstock.backends.services.openai_call import Call
from penstock.backends.services.parsing import OutputFormats, read_answer
from penstock.backends.services.records import (
    Json,
    add_records,
    prompt_tokens_of,
    record_of_choice,
    versions_of,
)
from penstock.backends.services.service_config import ServiceConfig
from penstock.backends.services.templates import render_chat, with_arguments_as_objects
from penstock.errors import ExecutionError, RequestError
from penstock.tools import read_tools

_PROMPT_END = 64  # tokens of a prompt that decide whether its template has begun the reasoning


class AnswerReader:
    """Completes the responses of one client. `tokenizer` is called where the server leaves something to this side."""

    def __init__(self, config: ServiceConfig, tokenizer: Callable[[], Tokenizer]) -> None:
        self._config = config
        self._tokenizer = tokenizer

    def read(self, call: Call, response: Json, version: int | None) -> Json:
        """The response with `nexrl_train`. `version` is what the controller knows of the weights.

        Raises `ExecutionError` if the server does not return what a record needs.
        """
        if not response.get("choices"):
            raise ExecutionError("the server answered without a choice")
        if self._config.train_record:
            self._add_records(call, response, version)
        if call.is_chat and (call.tools or self._config.tool_parser):
            for choice in response["choices"]:
                self._add_attempts(choice, call.tools)
        return response

    def _add_records(self, call: Call, response: Json, version: int | None) -> None:
        versions = versions_of(response) or (() if version is None else (version,))
        choices = response["choices"]
        prompt = prompt_tokens_of(response, choices[0]) or self._prompt_tokens(call, response)
        add_records(response, [record_of_choice(choice, prompt, versions) for choice in choices], version)

    def _prompt_tokens(self, call: Call, response: Mapping[str, Any]) -> Sequence[int]:
        """The ids of the prompt by the tokenizer on this side, for a server that does not return them."""
        arguments = call.arguments
        if call.is_chat:
            options = (arguments.get("extra_body") or {}).get("chat_template_kwargs") or {}
            messages = with_arguments_as_objects(arguments["messages"])
            tokenizer, options = self._tokenizer(), {"add_generation_prompt": True, **options}
            tokens = read_ids(render_chat(tokenizer, messages, call.tools, tokenize=True, **options))
        else:
            prompt = arguments["prompt"]
            tokens = self._tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        num_tokens = (response.get("usage") or {}).get("prompt_tokens")
        if num_tokens not in (None, len(tokens)):
            raise ExecutionError(
                f"the server does not return the ids of the prompt, and encoded it to {num_tokens} tokens where the "
                f"tokenizer here makes {len(tokens)}: set inference_service.tokenizer to that of the model"
            )
        return tokens

    def _add_attempts(self, choice: Json, tools: Any) -> None:
        """Add the attempts at calls; the calls as well, if the server left them in the text."""
        message = choice["message"]
        if self._config.tool_parser is None:
            choice["tool_attempts"] = [_attempt(call) for call in message.get("tool_calls") or ()]
            return
        formats = OutputFormats(self._config.tool_parser, self._config.reasoning_parser)
        is_cut, prompt = choice.get("finish_reason") == "length", self._end_of_prompt(choice)
        answer = read_answer(self._text(choice), formats, _readable(tools), prompt=prompt, is_cut=is_cut)
        choice["tool_attempts"] = [attempt.to_dict() for attempt in answer.attempts]
        if not message.get("tool_calls") and (answer.tool_calls or answer.reasoning):
            message.update(answer.message())
            choice["finish_reason"] = answer.finish_reason(choice["finish_reason"])

    def _text(self, choice: Mapping[str, Any]) -> str:
        """The text that was sampled, with special tokens, where the tokens are known."""
        record, message = choice.get("nexrl_train"), choice["message"]
        is_split = message.get("reasoning_content") and self._config.reasoning_parser is None
        if record is None or is_split:
            return message.get("content") or ""
        reason = "stop" if choice.get("finish_reason") == "tool_calls" else (choice.get("finish_reason") or "stop")
        return text_of_tokens(self._tokenizer(), record["response_tokens"], reason)

    def _end_of_prompt(self, choice: Mapping[str, Any]) -> str:
        record = choice.get("nexrl_train")
        if record is None or self._config.reasoning_parser is None:
            return ""
        return self._tokenizer().decode(record["prompt_tokens"][-_PROMPT_END:])


def _readable(tools: Any) -> Any:
    try:
        return read_tools(tools)
    except RequestError:  # the server took them
        return []


def _attempt(call: Mapping[str, Any]) -> Json:
    """An attempt, from a call that the server has parsed."""
    function = call.get("function") or {}
    text = function.get("arguments") or ""
    try:
        arguments = json.loads(text)
    except ValueError:
        arguments = None
    is_complete = isinstance(arguments, dict)
    return {
        "status": "complete" if is_complete else "malformed",
        "name": function.get("name"),
        "arguments": arguments if is_complete else {},
        "arguments_json": text,
        "raw_text": "",
    }
