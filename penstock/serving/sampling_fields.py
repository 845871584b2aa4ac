"""The fields that several APIs share: sampling, vLLM's extensions, and what the engine takes besides parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import BeforeValidator, Field

from penstock.sampling import RequestPriority, SamplingParams
from penstock.serving.auth import Client
from penstock.serving.body import Listed, RequestModel
from penstock.serving.errors import invalid
from penstock.serving.generation import Options
from penstock.serving.settings import ServingSettings

MAX_INT = 2**31 - 1
FLOATS = 1e9
MAX_BIASES = 1 << 14  # whatever the settings say
MAX_TOKEN_IDS = 1 << 14  # of each list of them that steers sampling

TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenKey = Annotated[str, Field(pattern="^[0-9]{1,10}$")]  # JSON has string keys only


def _bounded(biases: object) -> object:
    """Refuse a large mapping before all of it is looked at."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"{len(biases)} entries are more than {MAX_BIASES}")
    return biases


def _bounded_ids(ids: object) -> object:
    """Refuse a long list before all of it is looked at."""
    if isinstance(ids, list) and len(ids) > MAX_TOKEN_IDS:
        raise ValueError(f"{len(ids)} token ids are more than {MAX_TOKEN_IDS}")
    return ids


TokenIds = Annotated[Listed[TokenId] | None, BeforeValidator(_bounded_ids)]


class OptionFields(RequestModel):
    """What a body may ask of the engine besides parameters."""

    priority: int | str | None = Field(None, description="low, normal, high or critical, or their numbers 1 to 4.")
    deadline: float | None = Field(None, gt=0, le=FLOATS, description="Seconds that the request may take.")
    namespace: str | None = Field(
        None, max_length=256, description="Isolates cached prefixes; for servers without keys."
    )

    def options(self, client: Client) -> Options:
        """The engine's other arguments, within what the client may ask for."""
        if client.has_key and self.namespace is not None:
            raise invalid("namespace belongs to the API key here: leave it out", "namespace")
        priority = min(_priority(self.priority), client.priority_ceiling)
        return Options(priority, self.deadline, client.namespace or self.namespace or "")


class SamplingFields(OptionFields):
    """Sampling parameters under OpenAI's and vLLM's names. None is the default of each."""

    n: int | None = Field(None, ge=1, le=MAX_INT)
    best_of: int | None = Field(None, ge=1, le=MAX_INT)
    temperature: float | None = Field(None, ge=0, le=FLOATS)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.001, le=1000)
    logit_bias: Annotated[dict[TokenKey, float] | None, BeforeValidator(_bounded)] = None
    stop: str | Listed[str] | None = None
    stop_token_ids: TokenIds = None
    allowed_token_ids: TokenIds = None
    bad_words: Listed[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False

    def params(
        self, settings: ServingSettings, num_prompts: int = 1, base: SamplingParams | None = None, **more: object
    ) -> SamplingParams:
        """The engine's parameters; `base` has the model's own for what is not given.

        Raises `HttpError` beyond the server's limits, and `RequestError`.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        num_choices = max(self.n or 1, self.best_of or 1) * num_prompts
        check_limit("n", num_choices, settings.max_choices, "completions")
        check_limit("stop", len(stops), settings.max_stop, "stop strings")
        check_limit("stop", sum(map(len, stops)), settings.max_stop_characters, "characters of stop strings")
        check_limit("bad_words", len(self.bad_words or ()), settings.max_bad_words, "bad words")
        check_limit("logit_bias", len(self.logit_bias or ()), settings.max_logit_bias, "entries")
        given = {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        if stops:
            given["stop"] = stops
        if self.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return replace(base or SamplingParams(), **{**given, **more})


# Fields that parameters of the same name are set to.
_PLAIN = (
    *("n", "best_of", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "stop_token_ids", "allowed_token_ids", "bad_words", "min_tokens", "seed", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
)


def check_limit(param: str, count: int, limit: int, things: str) -> None:
    """Raise a 400 for more things than the server allows."""
    if count > limit:
        raise invalid(f"{count} {things} are more than this server allows ({limit})", param)


def _priority(value: int | str | None) -> RequestPriority:
    if value is None or value == 0:
        return RequestPriority.NORMAL
    names: Sequence[object] = [member.name.lower() for member in RequestPriority]
    numbers: Sequence[object] = [member.value for member in RequestPriority]
    if value in names or value in numbers:
        return RequestPriority(value) if isinstance(value, int) else RequestPriority[value.upper()]
    raise invalid(f"priority is low, normal, high or critical, or 1 to 4, got {str(value)[:40]!r}", "priority")
