"""Runs sequences through scheduler, cache and executor on the calling thread: the engine without its loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import nn

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.models.executor import Executor
from penstock.models.loading import load
from penstock.sampling import SamplingParams
from penstock.scheduling.scheduler import Scheduler
from penstock.scores import ScorePart
from penstock.sequence import Sequence
from penstock.step import TokenLogprobs

Guess = Callable[[list[Sequence]], SequenceOf[SequenceOf[int]]]


def prompts(count: int, longest: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens, the first of length 1 and the last of `longest`."""
    rng = random.Random(seed)
    lengths = [1, *(rng.randint(1, longest) for _ in range(count - 2)), longest]
    return [[rng.randrange(2, vocab) for _ in range(length)] for length in lengths]


class Driver:
    """One model, ready to run sequences; `logprobs` collects each sequence's by id.

    Given the `runner` of another driver, it runs the same model with a cache of its own. `guess`, where it is given,
    drafts for all sequences that decode, before every step.
    """

    def __init__(
        self,
        model: nn.Module | str | Executor,
        *,
        num_blocks: int = 1024,
        block_size: int = 4,
        num_host_blocks: int = 0,
        max_logit_rows: int = 4096,
        **settings: Any,
    ) -> None:
        settings = {"max_sequence_length": None, "max_num_batched_tokens": 4096} | settings
        config = EngineConfig(skip_tokenizer_init=True, block_size=block_size, **settings)
        self.runner = model if isinstance(model, Executor) else load(model, None, config).runner
        self.runner.allocate(num_blocks, block_size, num_host_blocks)
        self.cache = CacheManager(
            num_blocks,
            block_size,
            enable_prefix_caching=config.enable_kv_cache,
            num_host_blocks=num_host_blocks,
        )
        self.scheduler = Scheduler(config, self.cache, max_logit_rows=max_logit_rows)
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self.score_parts: dict[int, list[ScorePart]] = {}
        self.guess: Guess | None = None
        self.num_drafted = self.num_accepted = 0

    def run(self, sequences: list[Sequence], late: Iterable[Sequence] = ()) -> list[list[int]]:
        """Run all to their ends, those of `late` arriving one at a step; the output tokens of each."""
        arriving = list(late)
        for sequence in sequences:
            self.scheduler.add(sequence, 0.0)
        sequences = sequences + arriving
        while self.scheduler.has_work or arriving:
            if arriving:
                self.scheduler.add(arriving.pop(0), 0.0)
            self._draft()
            plan = self.scheduler.plan(0.0)
            assert plan.rows, "work is left but nothing was planned"
            for event in self.scheduler.commit(plan, self.runner.execute(plan)):
                assert event.error is None, event.error
                self.num_drafted += event.num_drafted_tokens
                self.num_accepted += event.num_accepted_tokens
                self.logprobs.setdefault(event.seq_id, []).extend(event.logprobs)
                self.prompt_logprobs.setdefault(event.seq_id, []).extend(event.prompt_logprobs)
                if event.scores is not None:
                    self.score_parts.setdefault(event.seq_id, []).append(event.scores)
            self.cache.check(list(self.scheduler.sequences()))
        return [sequence.tokens[sequence.prompt_len :] for sequence in sequences]

    def _draft(self) -> None:
        if self.guess is not None:
            decoding = self.scheduler.decoding()
            for sequence, draft in zip(decoding, self.guess(decoding), strict=True):
                self.scheduler.offer(sequence.id, draft)


def sequence(number: int, prompt: list[int], params: SamplingParams, **fields: Any) -> Sequence:
    """A sequence as the engine's door would make it, without EOS."""
    assert params.max_tokens is not None
    new_tokens = params.max_tokens if params.generates else 0
    return Sequence(
        id=number,
        request_id=fields.pop("request_id", f"r{number}"),
        params=params,
        tokens=list(prompt),
        max_len=len(prompt) + new_tokens,
        seed=params.seed or 0,
        **fields,
    )


def greedy_by_transformers(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """What `model.generate` gives for one prompt alone."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def logprobs_by_transformers(model: Any, prompt: list[int], output: list[int]) -> list[float]:
    """Log probabilities of the output tokens by one plain forward pass."""
    ids = torch.tensor([prompt + output])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
    rows = logprobs[len(prompt) - 1 : -1]
    return rows[torch.arange(len(output)), torch.tensor(output, dtype=torch.int64)].tolist()
