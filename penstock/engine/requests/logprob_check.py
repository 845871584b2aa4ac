"""`check_logprobs`: the log probabilities of finished requests against a forward pass of the module that is trained.

Owns which tokens can be compared. The module runs on a thread of its own, as for scores with gradients. Called by
`InferenceEngine.check_logprobs`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from penstock.api.logprob_report import Compared, LogprobReport, report_on
from penstock.engine.requests.gradients import ReadableEngine
from penstock.errors import ConfigurationError, RequestError, shown
from penstock.models.protocol import DifferentiableRunner, GradientScorer
from penstock.outputs import CompletionOutput, RequestOutput
from penstock.scores import FloatArray
from penstock.values import items

# Tokens that the module takes at once: they bound the memory of its activations, which nobody chunks.
BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion that has a log probability and a version for every token, copied."""

    request_id: str
    index: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    is_stale: bool

    @classmethod
    def of(cls, output: RequestOutput, completion: CompletionOutput) -> Rollout:
        """Raises `RequestError` where the completion cannot be compared."""
        lengths = [len(completion.token_ids), len(completion.token_logprobs), len(completion.weight_versions)]
        if len(set(lengths)) > 1 or not output.prompt_token_ids:
            raise RequestError(
                f"output {shown(output.request_id)} cannot be checked: it needs the prompt's token ids, and a log "
                "probability and a weight version for every token"
            )
        texts = tuple(output.prompt_token_ids), tuple(completion.token_ids)
        values = tuple(completion.token_logprobs), tuple(completion.weight_versions)
        return cls(output.request_id, completion.index, *texts, *values, completion.stale_kv)


class FinishedRequests:
    """The completions of the latest `size` requests that have finished, which are copied; with size 0 it keeps none."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._requests: deque[list[Rollout]] = deque(maxlen=size)

    def add(self, output: RequestOutput) -> None:
        """Keep the completions of a request; on the engine's thread."""
        if not self.size:
            return
        rollouts = [Rollout.of(output, completion) for completion in output.outputs if completion.token_ids]
        if rollouts:
            self._requests.append(rollouts)

    def rollouts(self) -> list[Rollout]:
        """All that are kept, oldest first. Raises `RequestError` if there are none."""
        rollouts = [rollout for request in self._requests.copy() for rollout in request]
        if not self.size:
            raise RequestError("no finished request is kept: pass outputs, or make the engine with kept_outputs=32")
        if not rollouts:
            raise RequestError("no request has finished yet: generate first, or pass outputs")
        return rollouts


def rollouts_of(outputs: RequestOutput | Sequence[RequestOutput]) -> list[Rollout]:
    """The completions of one output or of several. Raises `RequestError`."""
    listed = [outputs] if isinstance(outputs, RequestOutput) else list(items("outputs", outputs))
    for output in listed:
        if not isinstance(output, RequestOutput):
            raise RequestError(f"outputs must be RequestOutputs, the results of generate, not {shown(output)}")
    return [Rollout.of(output, completion) for output in listed for completion in output.outputs]


async def check_logprobs(engine: ReadableEngine, runner: object, rollouts: Sequence[Rollout]) -> LogprobReport:
    """The report on what can be compared. Raises `RequestError`, `ConfigurationError`, `EngineStateError`."""
    if not isinstance(runner, DifferentiableRunner):
        raise ConfigurationError("this model has no live module: pass a transformers module to InferenceEngine")
    from anyio import to_thread  # imported here, because most programs never check

    scorer = _scorer_of(runner)
    with engine.reading_weights() as version:
        fresh = [rollout for rollout in rollouts if not rollout.is_stale]
        comparable = [rollout for rollout in fresh if version in rollout.weight_versions]
        num_stale = sum(len(rollout.token_ids) for rollout in rollouts if rollout.is_stale)
        num_other = sum(len(rollout.token_ids) - rollout.weight_versions.count(version) for rollout in fresh)
        if not comparable:
            raise RequestError(
                f"no token was sampled with the weights of now, version {version}: {num_other} are of other versions "
                f"and {num_stale} of stale K/V; check what was generated since the last update"
            )
        module_logprobs = await to_thread.run_sync(_recompute, scorer, comparable)
    pairs = zip(comparable, module_logprobs, strict=True)
    return report_on([_compared(*pair) for pair in pairs], version, num_other, num_stale)


def _scorer_of(runner: DifferentiableRunner) -> GradientScorer:
    """A scorer without gradients and without dropout."""
    import torch

    with torch.no_grad():
        return runner.gradient_scorer(checkpoint_layers=False, dropout=False)


def _recompute(scorer: GradientScorer, rollouts: Sequence[Rollout]) -> list[FloatArray]:
    """The module's log probabilities of each completion, as float32 arrays."""
    return [
        score.logprobs.cpu().numpy()
        for batch in _batches(rollouts)
        for score in scorer.score([rollout.prompt_ids for rollout in batch], [rollout.token_ids for rollout in batch])
    ]


def _batches(rollouts: Sequence[Rollout]) -> Iterator[list[Rollout]]:
    batch, num_tokens = list[Rollout](), 0
    for rollout in rollouts:
        length = len(rollout.prompt_ids) + len(rollout.token_ids)
        if batch and num_tokens + length > BATCH_TOKENS:
            yield batch
            batch, num_tokens = [], 0
        batch.append(rollout)
        num_tokens += length
    yield batch


def _compared(rollout: Rollout, module_logprobs: FloatArray) -> Compared:
    fixed = rollout.request_id, rollout.index, rollout.token_ids, rollout.weight_versions
    return Compared(*fixed, rollout.logprobs, module_logprobs)
