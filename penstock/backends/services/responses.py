"""Results of service holders as responses of OpenAI's API. Tokens are named "token_id:N", since only ids are exact."""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.backends.services.records import Json, TrainRecord, add_records
from penstock.tools import random_id


def text_response(model: str, samples: Sequence[Json], version: int | None) -> Json:
    """A text completion with a choice for each sample."""
    choices = [
        {"index": index, "text": sample["response"], "logprobs": _text_logprobs(sample), **_ending(sample)}
        for index, sample in enumerate(samples)
    ]
    return _response("cmpl-", "text_completion", model, choices, samples, version)


def chat_response(model: str, samples: Sequence[Json], version: int | None) -> Json:
    """A chat completion with a choice for each sample."""
    choices = [
        {"index": index, "message": _message(sample), "logprobs": _chat_logprobs(sample), **_ending(sample)}
        for index, sample in enumerate(samples)
    ]
    for choice, sample in zip(choices, samples, strict=True):
        choice["tool_attempts"] = sample.get("tool_attempts", [])
    return _response("chatcmpl-", "chat.completion", model, choices, samples, version)


def _response(
    prefix: str, kind: str, model: str, choices: list[Json], samples: Sequence[Json], version: int | None
) -> Json:
    num_prompt = len(samples[0]["prompt_tokens"])
    num_sampled = sum(len(sample["response_tokens"]) for sample in samples)
    response: Json = {
        "id": random_id(prefix),
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_sampled,
            "total_tokens": num_prompt + num_sampled,
        },
    }
    return add_records(response, [_record(sample, version) for sample in samples], version)


def _record(sample: Json, version: int | None) -> TrainRecord:
    """The record of a sample. The service's own version goes before that of the controller."""
    versions = sample.get("weight_versions") or [sample.get("weight_version", version)]
    return TrainRecord(
        sample["prompt_tokens"],
        sample["response_tokens"],
        sample["response_logprobs"],
        [value for value in versions if value is not None],
    )


def _ending(sample: Json) -> Json:
    return {"finish_reason": sample.get("finish_reason", "stop")}


def _message(sample: Json) -> Json:
    calls, content = sample.get("tool_calls") or [], sample["response"]
    message: Json = {"role": "assistant", "content": content or (None if calls else "")}
    if sample.get("reasoning_string"):
        message["reasoning_content"] = sample["reasoning_string"]
    if calls:
        message["tool_calls"] = calls
    return message


def _names(sample: Json) -> list[str]:
    return [f"token_id:{token}" for token in sample["response_tokens"]]


def _text_logprobs(sample: Json) -> Json:
    return {"tokens": _names(sample), "token_logprobs": list(sample["response_logprobs"]), "top_logprobs": None}


def _chat_logprobs(sample: Json) -> Json:
    pairs = zip(_names(sample), sample["response_logprobs"], strict=False)  # `TrainRecord` compares the lengths
    return {"content": [{"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in pairs]}
