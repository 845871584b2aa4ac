"""The body of `/v1/completions`, and the prompts and parameters that it means."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from penstock.api.prompt import Prompt
from penstock.sampling import SamplingParams
from penstock.serving.body import Listed
from penstock.serving.chunks import StreamOptions
from penstock.serving.errors import invalid
from penstock.serving.sampling_fields import MAX_INT, SamplingFields, TokenId
from penstock.serving.settings import ServingSettings
from penstock.serving.structure_fields import StructureFields


def _count(logprobs: object) -> object:
    """True, as chats have it, asks for the chosen tokens only."""
    return (0 if logprobs else None) if isinstance(logprobs, bool) else logprobs


class CompletionRequest(SamplingFields, StructureFields):
    """A text completion. `prompt` is a text, token ids, or a list of either."""

    prompt: str | Listed[TokenId] | Listed[str] | Listed[Listed[TokenId]]
    model: str | None = None
    suffix: str | None = None
    echo: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(16, ge=0, le=MAX_INT)
    logprobs: Annotated[Annotated[int, Field(ge=0, le=MAX_INT)] | None, BeforeValidator(_count)] = None
    user: str | None = None

    def prompts(self, settings: ServingSettings) -> list[Prompt]:
        """The prompts as the engine takes them. Raises `HttpError`."""
        if self.suffix:
            raise invalid("suffix is not supported: no model here was trained to fill a gap", "suffix")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise invalid("best_of above n cannot be streamed: all candidates must end first", "best_of")
        if self.stream and self.echo and self.logprobs is not None:
            raise invalid("echo with logprobs cannot be streamed: the prompt's are known at the end", "echo")
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens=0 generates nothing: it needs echo", "max_tokens")
        prompts = listed_prompts(self.prompt)
        if not prompts or not all(prompts):
            raise invalid("the prompt is empty: pass at least one character or token id", "prompt")
        if len(prompts) > settings.max_choices:
            raise invalid(f"{len(prompts)} prompts are more than this server allows ({settings.max_choices})", "prompt")
        return [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]

    def sampling(self, settings: ServingSettings, num_prompts: int, base: SamplingParams | None) -> SamplingParams:
        """The engine's parameters. A request that only scores its prompt generates one token, which is not shown."""
        prompt_logprobs = self.logprobs if self.echo else None
        max_tokens = 1 if self.max_tokens == 0 else self.max_tokens
        return self.params(
            *(settings, num_prompts, base),
            max_tokens=max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=self.structure(),
        )


def listed_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """The prompts one by one. A list of numbers is one prompt."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return [*prompt]
