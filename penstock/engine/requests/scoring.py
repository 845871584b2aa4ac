"""`score`: the log probabilities of given completions, each as a request of an engine that generates nothing.

Owns what a pair of prompt and completion may be, and how it becomes the token ids of one request. Called by
`InferenceEngine.score`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from penstock.api.arguments import check_params
from penstock.api.prompt import Prompt, PromptInput, as_batch, read_ids, read_prompt
from penstock.api.protocols import Completion, WithAdapters
from penstock.engine.requests.batch import Batch, BatchOptions
from penstock.errors import ExecutionError, RequestError
from penstock.generation import GenerationConfig, Params
from penstock.outputs import RequestOutput
from penstock.scores import Score, joined
from penstock.scoring import ScoringParams
from penstock.values import flag, items

# The ids of a prompt; the flag says whether special tokens are added to a text.
Encode = Callable[[PromptInput, bool], Awaitable[list[int]]]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a score holds besides raw log probabilities. Raises `RequestError` naming the invalid value."""

    params: Params
    logits: bool
    entropies: bool

    def __post_init__(self) -> None:
        params = check_params(self.params)
        if isinstance(params, GenerationConfig):
            params = params.sampling_params()
        object.__setattr__(self, "params", params)
        for name in ("logits", "entropies"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))

    def scoring_params(self, num_scored: int) -> ScoringParams:
        """The parameters of a request for a completion of so many tokens. Raises `RequestError`."""
        assert not isinstance(self.params, GenerationConfig)
        return ScoringParams.of(self.params, num_scored, logits=self.logits, entropies=self.entropies)


async def score(
    engine: WithAdapters,
    pairs: Sequence[tuple[PromptInput, PromptInput]],
    wishes: Wishes,
    options: BatchOptions,
    encode: Encode,
) -> list[Score]:
    """The scores of `pairs` of prompt and completion. Raises the first error, after which nothing runs on."""
    with Batch(engine, options) as batch:
        for pair in pairs:
            ids, scored = await encoded(pair, encode)
            await batch.submit([*ids, *scored], wishes.scoring_params(len(scored)))
        return [_score_of(await handle) for handle in batch.handles]


async def encoded(pair: tuple[PromptInput, PromptInput], encode: Encode) -> tuple[list[int], list[int]]:
    """The token ids of a prompt and of its completion."""
    prompt, completion = pair
    return prompt.token_ids or await encode(prompt, True), completion.token_ids or await encode(completion, False)


def read_pairs(
    prompts: Prompt | Sequence[Prompt], completions: Completion | Sequence[Completion]
) -> list[tuple[PromptInput, PromptInput]]:
    """Copies of one prompt and one completion, or of as many of both. Raises `RequestError` for anything else."""
    prompt_list, completion_list = as_batch(prompts), _as_completions(completions)
    if len(prompt_list) != len(completion_list):
        empty = "; an empty list of ids counts as none" if not (prompt_list and completion_list) else ""
        raise RequestError(
            f"{len(prompt_list)} prompts and {len(completion_list)} completions: pass one prompt for each completion, "
            f"and leave out pairs without a token to score{empty}"
        )
    numbered = enumerate(zip(prompt_list, completion_list, strict=True))
    return [(read_prompt(prompt), _read_completion(number, completion)) for number, (prompt, completion) in numbered]


def _as_completions(completions: Completion | Sequence[Completion]) -> list[Completion]:
    if isinstance(completions, str):
        return [completions]
    if completions is None:
        raise RequestError("completions must be texts, token ids, or a list of them, got None")
    listed = list(items("completions", completions))
    is_single = bool(listed) and not isinstance(listed[0], str) and not hasattr(listed[0], "__len__")
    return [listed] if is_single else listed


def _read_completion(number: int, completion: Completion) -> PromptInput:
    try:
        if completion is None:
            raise RequestError("it is None: pass a text or token ids, or leave the pair out")
        if len(completion) == 0:
            raise RequestError("it has no token to score: leave the pair out")
        if isinstance(completion, str):
            return read_prompt({"prompt": completion})
        return PromptInput(token_ids=read_ids(completion))
    except (RequestError, TypeError) as error:
        raise RequestError(f"completion {number} is refused: {error}") from error


def _score_of(output: RequestOutput) -> Score:
    if not output.score_parts:
        raise ExecutionError("this model gives no scores: its runner scored nothing")
    return joined(output.score_parts)
