"""`Executor`: runs a `StepPlan` on a transformers model: plan to tensors, logits to tokens.

Owns the K/V storage and the per-sequence sampler state; decides nothing about who runs. Called by the engine's model
thread, one step at a time. Any `AutoModelForCausalLM` whose attention goes through `AttentionInterface` will do.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from penstock.api.weights import SleepLevel, WeightSource
from penstock.constraints.masks import Masks
from penstock.errors import ConfigurationError, ExecutionError, OutOfMemory, described, text_of
from penstock.models.adapters.choice import adapters_for
from penstock.models.attention import KVStorage, StepAttention
from penstock.models.beam_sampler import BeamSampler
from penstock.models.borrow import Borrowed
from penstock.models.checks import probe, vocab_size
from penstock.models.gradients.scorer import DifferentiableScorer
from penstock.models.layout import StepLayout
from penstock.models.memory import free_bytes, host_free_bytes, memory_usage, resident_bytes, trim_memory
from penstock.models.origin import Origin
from penstock.models.pooling import HiddenStates, Pooler
from penstock.models.preparation import PreparedModel
from penstock.models.protocol import ModelChanged, ModelSpec
from penstock.models.sampler import Sampler
from penstock.models.scoring import RowScorer
from penstock.models.weights import ModelWeights
from penstock.optimizers.speculation.verification import positions, verified
from penstock.pooling import PoolingParams
from penstock.step import Row, RowResult, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What `launch` hands to `collect`: logits [L, vocab], of which `num_logits[i]` rows belong to row i of the plan.

    The logits lie in memory that the step has borrowed: they are valid until `collect` returns.
    """

    plan: StepPlan
    logits: Tensor
    num_logits: list[int]
    timings_s: dict[str, float]
    hidden: HiddenStates | None = None  # if a row pools them


class Executor:
    """A `ModelRunner` over a module that was prepared for paged attention.

    `borrowed` is the live module that `model.module` is a view of, if it is one; else its weights are from `origin`.
    """

    def __init__(
        self, model: PreparedModel, spec: ModelSpec, logits_chunk_bytes: int, borrowed: Borrowed | None = None,
        origin: Origin | None = None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.weight_version = 0
        self._borrowed = borrowed
        self._chunk_bytes = logits_chunk_bytes
        self._module = model.module
        self.adapters = adapters_for(model, borrowed)
        is_packed = spec.weight_mode == "packed"
        self._weights = ModelWeights(model.module, model.weights, borrowed, origin, is_packed=is_packed)
        self._layers = model.layers
        self._shapes = model.shapes
        self._backend = model.backend
        self._workspaces = model.workspaces
        self._device = model.device
        self._storage: KVStorage | None = None
        kernels = model.backend.logit_kernels
        self._sampler = Sampler(spec.vocab_size, spec.eos_token_ids, logits_chunk_bytes, kernels)
        # The scheduler leaves the other half to the logits that are scored.
        self._scorer = RowScorer(spec.vocab_size, spec.eos_token_ids, logits_chunk_bytes // 2, kernels)
        self._pooler = Pooler()
        self._beam_sampler = BeamSampler(spec.eos_token_ids, logits_chunk_bytes, kernels)

    def free_bytes(self) -> int:
        """Memory that a K/V cache could take now."""
        return free_bytes(self._device)

    def memory_usage(self) -> float:
        """Fraction of the device's memory in use, 0 to 1."""
        return memory_usage(self._device)

    def host_free_bytes(self) -> int:
        """Host memory that the host tier could take now."""
        return host_free_bytes()

    def trim_memory(self, blocks: Sequence[int] = (), places: Sequence[int] = ()) -> int:
        """Give unused memory back, that of these blocks and host places included; returns the number of bytes."""
        bytes_before = resident_bytes(self._device)
        if self._storage is not None:
            self._storage.release(blocks, places)
        self._workspaces.clear_pool()
        trim_memory(self._device)
        return max(0, bytes_before - resident_bytes(self._device))

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        """Allocate `num_blocks` K/V blocks, and `num_host_blocks` in the host tier. Raises `OutOfMemory`."""
        self._storage = self._backend.storage(self._shapes, num_blocks, block_size, num_host_blocks)

    def refresh_weights(self, names: Collection[str] | None = None, source: Mapping[str, Tensor] | None = None) -> int:
        """`ModelWeights.refresh`, on the model's thread, between steps."""
        return self._weights.refresh(names, source)

    def read_weights(self, source: WeightSource) -> WeightSource:
        """Check the weights of a source, without writing any; what to pass on. Raises `WeightsError`."""
        return self._weights.read(source)

    def update_weights(self, source: WeightSource) -> None:
        """Write weights that were read, or take over what the owner wrote (None), and raise `weight_version`."""
        self._weights.update(source)
        self.weight_version += 1

    def check_unload(self, level: SleepLevel) -> None:
        """Raise `WeightsError` where `unload` would lose weights."""
        self._weights.check_release(level)

    def unload(self, level: SleepLevel) -> None:
        """Free the K/V storage until `allocate`, and weights until `reload`."""
        if level != "cache":
            self._weights.release()
        if level != "weights":
            self._storage = None
        self.trim_memory()

    def reload(self) -> None:
        """Make or read released weights again. Raises `WeightsError`, `OutOfMemory`; then it can be repeated."""
        self._weights.reload()

    def gradient_scorer(self, *, checkpoint_layers: bool, dropout: bool = True) -> DifferentiableScorer:
        """Scores with gradients through the borrowed module, for any thread. Raises `ConfigurationError`."""
        if self._borrowed is None:
            raise ConfigurationError(
                "gradients need a live module, and this engine loaded its weights for inference alone: load the module "
                "with transformers and pass it, InferenceEngine(module, tokenizer)"
            )
        return DifferentiableScorer(
            self._borrowed.owner, checkpoint_layers=checkpoint_layers, logits_chunk_bytes=self._chunk_bytes,
            max_length=self.spec.max_length, dropout=dropout,
        )  # fmt: skip

    def forget(self, seq_id: int) -> None:
        """Drop the state of a sequence that ended."""
        self._sampler.forget(seq_id)
        self._scorer.forget(seq_id)
        self._pooler.forget(seq_id)

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        self._storage = self._borrowed = None
        self._weights.close()
        self.adapters.close()
        self._module = nn.Module()
        self._backend.close()
        self.trim_memory()

    def execute(self, plan: StepPlan, masks: Masks | None = None) -> StepResult:
        """Run one step: `launch`, then `collect`. Raises what they raise."""
        return self.collect(self.launch(plan), masks)

    def launch(self, plan: StepPlan) -> ForwardOutput:
        """Move and copy the plan's blocks, then run the forward pass, the output head included.

        Samples nothing, so that grammar masks may still be computed while this runs. Raises `OutOfMemory`
        or `ExecutionError` when the pass fails, `ModelChanged` where a borrowed module is not what it was after the
        last step.
        """
        storage = self._storage
        assert storage is not None, "allocate() comes first"
        begin = time.perf_counter()
        with self.contained():
            if self._borrowed is not None:
                # A step in which nobody decodes, as after a pause, has time for a thorough comparison.
                self._check_module(thorough=all(row.start < row.prompt_len for row in plan.rows))
            if plan.swaps_out or plan.swaps_in:
                storage.swap(plan.swaps_out, plan.swaps_in)
            swap_end = time.perf_counter()
            storage.copy_blocks(plan.copies)
            layout = StepLayout.of(plan.rows, storage.block_size, self._device)
            with self._hidden_states(plan) as hidden:
                logits = self.compute(layout, storage.attention(layout, self._layers))
        timings = {"forward": time.perf_counter() - swap_end}
        if plan.swaps_out or plan.swaps_in:
            timings["swap"] = swap_end - begin
        return ForwardOutput(plan, logits, layout.num_logits, timings, hidden)

    def collect(self, output: ForwardOutput, masks: Masks | None = None) -> StepResult:
        """Sample from the logits of a forward pass: a result for every row of its plan.

        Waits for the masks of rows under a constraint. Raises as `launch` does.
        """
        begin = time.perf_counter()
        with self.contained():
            if self._borrowed is not None:
                self._check_module()  # it may have changed during the pass
            if masks is not None:
                masks.wait()
            rows = self._results(output, masks)
            if output.hidden is not None:
                rows = self._pooler.pooled(output.plan.rows, rows, output.hidden)
            self._workspaces.return_all()
        return StepResult(rows, self.weight_version, {**output.timings_s, "sample": time.perf_counter() - begin})

    def compute(self, layout: StepLayout, attention: StepAttention) -> Tensor:
        """Logits [L, vocab] after the tokens at `layout.logit_indices`, by the module's own forward."""
        self.adapters.select(layout.rows, layout.num_logits)
        indices = layout.logit_indices
        out = self._module(
            input_ids=layout.input_ids[None],
            position_ids=layout.positions[None],
            use_cache=False,
            # An empty choice would mean "all" to some models.
            logits_to_keep=indices if len(indices) else indices.new_zeros(1),
            paged=attention,
        )
        logits: Tensor = out.logits[0]
        if len(logits) != max(1, len(indices)):
            raise ExecutionError(f"the model returned {len(logits)} rows of logits, and {len(indices)} were requested")
        return logits[: len(indices)]

    def _hidden_states(self, plan: StepPlan) -> AbstractContextManager[HiddenStates | None]:
        """A block that keeps the hidden states of the forward pass inside it, if a row of the plan pools them."""
        pools = any(isinstance(row.params, PoolingParams) for row in plan.rows)
        return HiddenStates(self._module) if pools else contextlib.nullcontext()

    @contextlib.contextmanager
    def contained(self) -> Iterator[None]:
        """Whatever fails inside becomes `OutOfMemory` or `ExecutionError`, and the step's memory is free again."""
        try:
            with torch.inference_mode():
                yield
        except BaseException as error:
            self._workspaces.return_all()
            step_error = self._step_error(error)
            if step_error is error:
                raise
            raise step_error from error

    def _step_error(self, error: BaseException) -> BaseException:
        if not isinstance(error, Exception) or isinstance(error, ModelChanged):
            return error
        traceback.clear_frames(error.__traceback__)  # whoever keeps the error must not keep the step's tensors
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return _out_of_memory(self._device, error)
        if isinstance(error, ExecutionError):
            return error
        self._check_module(thorough=True)  # a change of the module may be why it failed
        if self._borrowed is not None:
            self._borrowed.check_placement()
        return ExecutionError(f"the forward pass failed: {described(error)}")

    def _check_module(self, *, thorough: bool = False) -> None:
        """Raise `ModelChanged` once the module runs as its owner has changed it, `ExecutionError` where it cannot."""
        borrowed = self._borrowed
        if borrowed is not None and borrowed.changed(thorough=thorough) and borrowed.renew(self._attach):
            self.weight_version += 1
            raise ModelChanged

    def _attach(self, view: nn.Module) -> None:
        """Run `view` from here on. Raises `ConfigurationError` where it cannot replace the last one."""
        probed = probe(view, self._device, verify=False, max_length=self.spec.max_length)
        if probed.shapes != self._shapes:
            raise ConfigurationError("its layers keep other keys and values than when it was loaded: make a new engine")
        if (size := vocab_size(view)) < self.spec.vocab_size:
            raise ConfigurationError(f"its vocabulary shrank from {self.spec.vocab_size} to {size}: make a new engine")
        self.adapters.attach(view)
        self._module, self._layers = view, probed.layers

    def _results(self, output: ForwardOutput, masks: Masks | None) -> tuple[RowResult, ...]:
        """Split the logits by row: scores of its scored range, and draws for each row that samples."""
        rows, logits = output.plan.rows, output.logits
        scores: dict[int, RowResult] = {}
        samplers: list[int] = []
        newest: list[int] = []  # index of each sampler's last logits
        begin = 0
        for i, (row, count) in enumerate(zip(rows, output.num_logits, strict=True)):
            if row.scored:
                scores[i] = self._scorer.score(logits[begin : begin + len(row.scored)], row)
            begin += count
            if row.samples:
                samplers.append(i)
                newest.append(begin - 1)
        draws = self._draw([rows[i] for i in samplers], logits, newest, masks)
        if not scores and len(draws) == len(rows):
            return tuple(draws)
        results = [scores.get(i) or RowResult() for i in range(len(rows))]
        for i, draw in zip(samplers, draws, strict=True):
            score = scores.get(i)
            results[i] = (
                draw
                if score is None
                else draw._replace(prompt_logprobs=score.prompt_logprobs, error=score.error or draw.error)
            )
        return tuple(results)

    def _draw(self, rows: Sequence[Row], logits: Tensor, newest: list[int], masks: Masks | None) -> list[RowResult]:
        """A token, or a beam's candidates, for every row; `newest` are the indices of their last logits.

        A row's siblings draw from the same logits; a row with drafts also has a draw in place of each draft.
        """
        if not any(row.draft or row.siblings or row.params.use_beam_search for row in rows):
            return self._sampler.sample(_take(logits, newest), rows, masks) if rows else []
        draws = [draw for row, index in zip(rows, newest, strict=True) for draw in _draws_of(row, index)]
        results: dict[int, RowResult] = {}
        sample_masked = functools.partial(self._sampler.sample, masks=masks)
        for sample, beams in ((sample_masked, False), (self._beam_sampler.candidates, True)):
            members = [i for i, (row, _) in enumerate(draws) if row.params.use_beam_search == beams]
            if members:
                member_logits = _take(logits, [draws[i][1] for i in members])
                results |= zip(members, sample(member_logits, [draws[i][0] for i in members]), strict=True)
        ordered = iter(results[i] for i in range(len(draws)))
        row_results, sibling_results = list[RowResult](), list[tuple[RowResult, ...]]()
        for row in rows:
            row_results += islice(ordered, 1 + len(row.draft))
            sibling_results.append(tuple(islice(ordered, len(row.siblings))))
        pairs = zip(verified(rows, row_results), sibling_results, strict=True)
        return [result._replace(siblings=siblings) for result, siblings in pairs]


def _draws_of(row: Row, newest: int) -> Iterator[tuple[Row, int]]:
    """(row to draw for, index of its logits): after each draft position, then for each sibling."""
    yield from zip(positions(row), range(newest - len(row.draft), newest + 1), strict=True)
    for sibling in row.siblings:
        yield sibling, newest


def _take(logits: Tensor, indices: list[int]) -> Tensor:
    """The logits at `indices`; not copied where these are all in order."""
    if indices == list(range(len(logits))):
        return logits
    return logits[torch.tensor(indices, dtype=torch.int64, device=logits.device)]


def _out_of_memory(device: torch.device, error: BaseException) -> OutOfMemory:
    return OutOfMemory(f"{device.type.upper()} out of memory in a step ({text_of(error)})").with_hint(
        "Lower max_num_batched_tokens, max_batch_size or memory_pool_size, or use a smaller model."
    )
