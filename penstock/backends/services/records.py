"""The `nexrl_train` record of one sample: prompt tokens, response tokens, log probabilities, all of the engine's own.

Tokens and log probabilities of a response have equal lengths, or there is no record but an error. Nothing here encodes
text again: whoever lacks an id says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.errors import ExecutionError

Json = dict[str, Any]  # a JSON object; its values have no common type
_ID_PREFIX = "token_id:"


@dataclass(frozen=True, slots=True)
class TrainRecord:
    """What a trainer needs of one sample.

    `weight_versions` has the version of each token where the engine gives it, and else one version for all, or none.
    Raises `ExecutionError` if the lengths differ or a log probability is not a number.
    """

    prompt_tokens: Sequence[int]
    response_tokens: Sequence[int]
    response_logprobs: Sequence[float]
    weight_versions: Sequence[int | str] = ()

    def __post_init__(self) -> None:
        num_tokens, num_logprobs = len(self.response_tokens), len(self.response_logprobs)
        if num_tokens != num_logprobs:
            raise ExecutionError(f"the response has {num_tokens} tokens and {num_logprobs} log probabilities")
        if not all(isinstance(value, int | float) and not math.isnan(value) for value in self.response_logprobs):
            raise ExecutionError("the response has a token without a log probability")
        if len(self.weight_versions) not in (0, 1, num_tokens):
            raise ExecutionError(f"the response has {num_tokens} tokens and {len(self.weight_versions)} versions")

    def to_dict(self) -> Json:
        """The record as a response holds it. `weight_version` is that of the last token."""
        record: Json = {
            "prompt_tokens": list(self.prompt_tokens),
            "response_tokens": list(self.response_tokens),
            "response_logprobs": list(self.response_logprobs),
        }
        if self.weight_versions:
            record["weight_version"] = self.weight_versions[-1]
        if len(set(self.weight_versions)) > 1:
            record["weight_versions"] = list(self.weight_versions)
        return record


def add_records(response: Json, records: Sequence[TrainRecord], version: int | None) -> Json:
    """The response with the record of each choice in the choice, and that of the first one also beside the choices.

    `version` is that of the controller: in the records `rollout_model_version`, if there is one.
    """
    known = {} if version is None else {"rollout_model_version": version}
    for choice, record in zip(response["choices"], records, strict=True):
        choice["nexrl_train"] = record.to_dict() | known
    response["nexrl_train"] = records[0].to_dict() | known
    return response


def record_of_choice(
    choice: Mapping[str, Any], prompt_tokens: Sequence[int], versions: Sequence[int | str] = ()
) -> TrainRecord:
    """The record of a choice that a server answered, of either of OpenAI's APIs. Raises `ExecutionError`."""
    names, logprobs = _logprobs(choice.get("logprobs") or {})
    ids = choice.get("token_ids")
    tokens = [int(token) for token in ids] if ids is not None else [_id_of(name) for name in names]
    own_versions = choice.get("weight_versions") or _listed(choice.get("weight_version"))
    return TrainRecord(prompt_tokens, tokens, logprobs, own_versions or versions)


def versions_of(response: Mapping[str, Any]) -> Sequence[int | str]:
    """The version of the weights, where a server names one for the whole response; SGLang has it in the metadata."""
    metadata = response.get("metadata")
    nested = metadata.get("weight_version") if isinstance(metadata, Mapping) else None
    return _listed(response.get("weight_version")) or _listed(nested)


def prompt_tokens_of(response: Mapping[str, Any], choice: Mapping[str, Any]) -> Sequence[int] | None:
    """The ids of the prompt, where the server gives them."""
    for place in (choice, response):
        if place.get("prompt_token_ids") is not None:
            return [int(token) for token in place["prompt_token_ids"]]
    return None


def _listed(version: int | str | None) -> Sequence[int | str]:
    return () if version is None else (version,)


def _logprobs(logprobs: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[float]]:
    """Tokens and their log probabilities, from the shape of a chat completion or from that of a text completion."""
    if logprobs.get("content") is not None:
        entries = logprobs["content"]
        return [entry["token"] for entry in entries], [entry["logprob"] for entry in entries]
    return logprobs.get("tokens") or (), logprobs.get("token_logprobs") or ()


def _id_of(name: str) -> int:
    """The id in "token_id:123". A token's text is not an id, even if it is made of digits."""
    digits = name.removeprefix(_ID_PREFIX)
    if digits == name or not digits.isdecimal():
        raise ExecutionError(
            "the server gives no token ids, so there is no training record: use a server that knows return_token_ids "
            "(Penstock, vLLM), or set inference_service.train_record to false"
        )
    return int(digits)
