"""`Executor`: runs a `StepPlan` on a transformers model: plan to tensors, logits to tokens.

Owns the K/V storage and the per-sequence sampler state; decides nothing about who runs. Called by the engine's model
thread, one step at a time. Any `AutoModelForCausalLM` whose attention goes through `AttentionInterface` will do.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError, ExecutionError, OutOfMemory, described, text_of
from penstock.models.borrow import Borrowed
from penstock.models.checks import probe, vocab_size
from penstock.models.continuations import Continuations
from penstock.models.layout import StepLayout, scores_prompt, wanted_logits
from penstock.models.memory import free_bytes, held_bytes, host_free_bytes, memory_usage, trim_memory
from penstock.models.paging import Paging, Storage
from penstock.models.protocol import ModelChanged, ModelSpec
from penstock.models.sampler import Sampler
from penstock.models.storage import LayerShape
from penstock.optimizers.memory_pool import MemoryPool
from penstock.optimizers.speculation.verification import positions, verified
from penstock.step import Row, RowResult, StepPlan, StepResult


class Executor:
    """A `ModelRunner` over a module that was switched to paged attention (see `checks.attach`).

    `borrowed` is whose view the module is, if it is one.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ModelSpec,
        layers: dict[int, int],
        shapes: Sequence[LayerShape],
        paging: Paging,
        workspaces: MemoryPool,
        device: torch.device,
        logits_chunk_bytes: int,
        *,
        borrowed: Borrowed | None = None,
    ) -> None:
        self.spec = spec
        self._borrowed = borrowed
        self._module = module
        self._layers = layers
        self._shapes = shapes
        self._paging = paging
        self._workspaces = workspaces
        self._device = device
        self._storage: Storage | None = None
        self._sampler = Sampler(spec.vocab_size, spec.eos_token_ids, logits_chunk_bytes, paging.survey)
        self._continuations = Continuations(spec.eos_token_ids, logits_chunk_bytes, paging.survey)

    def free_bytes(self) -> int:
        """Memory that a K/V cache could take now."""
        return free_bytes(self._device)

    def memory_usage(self) -> float:
        """Fraction of the device's memory in use, 0 to 1."""
        return memory_usage(self._device)

    def host_free_bytes(self) -> int:
        """Ordinary memory that a tier on the host could take now."""
        return host_free_bytes()

    def trim_memory(self, blocks: Sequence[int] = (), places: Sequence[int] = ()) -> int:
        """Give unused memory back, that of these blocks and places of the tier included; how many bytes."""
        before = held_bytes(self._device)
        if self._storage is not None:
            self._storage.give_back(blocks, places)
        self._workspaces.clear_pool()
        trim_memory(self._device)
        return max(0, before - held_bytes(self._device))

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        """Make room for the K/V of `num_blocks` blocks, and of as many on the host as told. Raises `OutOfMemory`."""
        self._storage = self._paging.storage(self._shapes, num_blocks, block_size, num_host_blocks)

    def forget(self, seq_id: int) -> None:
        """Drop the sampler's state of a sequence that ended."""
        self._sampler.forget(seq_id)

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        self._storage = self._borrowed = None
        self._module = nn.Module()
        self._paging.close()
        self.trim_memory()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises `OutOfMemory` or `ExecutionError` when the forward pass itself fails.

        `ModelChanged` where a borrowed module is not what it was when the step began, or when the last one ended.
        """
        begin = time.perf_counter()
        with self._passing():
            self._keep_up(thorough=_begins(plan.rows))
            moved = self._move(plan)
            logits, done = self._forward(plan), time.perf_counter()
            self._keep_up()
            rows = self._outcomes(plan.rows, logits)
        timings = {"forward": done - moved, "sample": time.perf_counter() - done}
        if plan.swaps_out or plan.swaps_in:
            timings["swap"] = moved - begin
        return StepResult(rows, timings_s=timings)

    @contextlib.contextmanager
    def _passing(self) -> Iterator[None]:
        """Around what a step does. Raises `OutOfMemory` or `ExecutionError` whatever went wrong."""
        try:
            with torch.inference_mode():
                yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error must not keep the step's tensors
            raise _out_of_memory(self._device, error) from error
        except ModelChanged:
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, ExecutionError):
                raise
            self._keep_up(thorough=True)  # perhaps it failed because the module had changed
            if self._borrowed is not None:
                self._borrowed.check_place()
            raise ExecutionError(f"the forward pass failed: {described(error)}") from error
        finally:
            self._workspaces.return_all()

    def _keep_up(self, *, thorough: bool = False) -> None:
        """Raise `ModelChanged` once the module runs as what its owner made of it, `ExecutionError` where it cannot."""
        borrowed = self._borrowed
        if borrowed is not None and borrowed.changed(thorough=thorough) and borrowed.renew(self._attach):
            raise ModelChanged

    def _attach(self, view: nn.Module) -> None:
        """Run `view` from here on. Raises `ConfigurationError` where it cannot take the place of the last one."""
        probed = probe(view, self._device, verify=False, longest=self.spec.max_length)
        if probed.shapes != self._shapes:
            raise ConfigurationError("its layers keep other keys and values than when it was loaded: make a new engine")
        if (size := vocab_size(view)) < self.spec.vocab_size:
            raise ConfigurationError(f"its vocabulary shrank from {self.spec.vocab_size} to {size}: make a new engine")
        self._module, self._layers = view, probed.layers

    def _move(self, plan: StepPlan) -> float:
        """Move the plan's blocks to the host and back; when that was done."""
        assert self._storage is not None, "allocate() comes first"
        if plan.swaps_out or plan.swaps_in:
            self._storage.swap(plan.swaps_out, plan.swaps_in)
        return time.perf_counter()

    def _forward(self, plan: StepPlan) -> Tensor:
        """Logits [wanted places, vocab] of the step."""
        assert self._storage is not None, "allocate() comes first"
        self._storage.copy_blocks(plan.copies)
        return self._run(StepLayout(plan.rows, self._storage.block_size, self._device))

    def _run(self, layout: StepLayout) -> Tensor:
        assert self._storage is not None
        out = self._module(
            input_ids=layout.input_ids[None],
            position_ids=layout.positions[None],
            use_cache=False,
            logits_to_keep=_at_least_one(layout.logit_places),
            paged=self._paging.attention(self._storage, layout, self._layers),
        )
        logits: Tensor = out.logits[0]
        if len(logits) != max(1, len(layout.logit_places)):
            raise ExecutionError(
                f"the model gave {len(logits)} rows of logits where {len(layout.logit_places)} were asked"
            )
        return logits[: len(layout.logit_places)]

    def _outcomes(self, rows: Sequence[Row], logits: Tensor) -> tuple[RowResult, ...]:
        """Split the logits by row: prompt logprobs where asked for, and draws for each row that samples."""
        outcomes = [RowResult() for _ in rows]
        drawing: list[int] = []
        places: list[int] = []
        begin = 0
        for i, row in enumerate(rows):
            count = wanted_logits(row)
            if scores_prompt(row):
                outcomes[i] = self._sampler.prompt_logprobs(logits[begin : begin + count], row)
            begin += count
            if row.samples:
                drawing.append(i)
                places.append(begin - 1)
        for i, result in zip(drawing, self._draw([rows[i] for i in drawing], logits, places), strict=True):
            if scores_prompt(rows[i]):
                scored = outcomes[i]
                result = result._replace(prompt_logprobs=scored.prompt_logprobs, error=scored.error or result.error)
            outcomes[i] = result
        return tuple(outcomes)

    def _draw(self, rows: Sequence[Row], logits: Tensor, places: list[int]) -> list[RowResult]:
        """A token or a beam's continuations for every row, whose last logits are at `places`.

        Siblings draw from the same logits; a row with drafts has a draw in place of each of them, too.
        """
        if not any(row.draft or row.siblings or row.params.use_beam_search for row in rows):
            return self._sampler.sample(_chosen(logits, places), rows) if rows else []
        everyone = [found for row, place in zip(rows, places, strict=True) for found in _draws(row, place)]
        found: dict[int, RowResult] = {}
        for way, searches in ((self._sampler.sample, False), (self._continuations.find, True)):
            members = [i for i, (one, _) in enumerate(everyone) if one.params.use_beam_search == searches]
            if members:
                chosen = _chosen(logits, [everyone[i][1] for i in members])
                found |= zip(members, way(chosen, [everyone[i][0] for i in members]), strict=True)
        results = iter(found[i] for i in range(len(everyone)))
        own, siblings = list[RowResult](), list[tuple[RowResult, ...]]()
        for row in rows:
            own += islice(results, 1 + len(row.draft))
            siblings.append(tuple(islice(results, len(row.siblings))))
        return [one._replace(siblings=some) for one, some in zip(verified(rows, own), siblings, strict=True)]


def _begins(rows: Sequence[Row]) -> bool:
    """Whether nobody was decoding before this step, as after a pause: then there is time for a thorough look."""
    return all(row.start < row.prompt_len for row in rows)


def _draws(row: Row, last: int) -> Iterator[tuple[Row, int]]:
    """Whoever draws for a row whose last logits are at `last`, and from which logits."""
    yield from zip(positions(row), range(last - len(row.draft), last + 1), strict=True)
    for sibling in row.siblings:
        yield sibling, last


def _chosen(logits: Tensor, places: list[int]) -> Tensor:
    """The logits at those places; without a copy where that is all of them."""
    if places == list(range(len(logits))):
        return logits
    return logits[torch.tensor(places, dtype=torch.int64, device=logits.device)]


def _at_least_one(places: Tensor) -> Tensor:
    """Models slice with these places; an empty choice would mean "all" to some."""
    return places if len(places) else places.new_zeros(1)


def _out_of_memory(device: torch.device, error: BaseException) -> OutOfMemory:
    return OutOfMemory(
        f"{device.type.upper()} out of memory in a step: lower max_num_batched_tokens, max_batch_size or "
        f"memory_pool_size, or use a smaller model ({text_of(error)})"
    )
