"""`DifferentiableScorer`: log probabilities of completions, as tensors whose `backward()` fills a module's gradients.

Owns no weights: each call makes a view of the caller's module, in its owner's mode (dropout included), over the same
parameters. Must not run beside an update of the weights. Made by the executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from penstock.errors import ConfigurationError, RequestError, RequestTooLarge
from penstock.models.borrow import device_and_dtype, view_of
from penstock.models.checks import refuse_unsupported, vocab_size
from penstock.models.gradients.attention import IMPLEMENTATION, SegmentAttention
from penstock.models.gradients.head import Head
from penstock.models.gradients.modes import ThreadModes
from penstock.models.gradients.packing import IntArray, PackedRow, pack
from penstock.models.wrappers import unwrapped
from penstock.scores import DifferentiableScore

DEFAULT_CHUNK_BYTES = 64 << 20


class DifferentiableScorer:
    """Scores (prompt, completion) pairs with gradients through `owner`, a live transformers module.

    `checkpoint_layers` recomputes each layer in the backward pass instead of keeping its activations.
    `logits_chunk_bytes` bounds the logits that exist at once, and `max_length` the tokens of a pair. Without `dropout`,
    a module in train mode computes as in eval mode. `attach` is called with each view before its pass, and may register
    hooks. Scores on any thread, under the gradient and autocast modes of the one that constructs this. Raises
    `ConfigurationError` for a module that cannot be scored this way.
    """

    def __init__(
        self, owner: nn.Module, *, checkpoint_layers: bool = False, logits_chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        max_length: int | None = None, dropout: bool = True, attach: Callable[[nn.Module], None] | None = None,
    ) -> None:  # fmt: skip
        _refuse_distributed(owner)
        self._owner = owner = unwrapped(owner)
        refuse_unsupported(owner)
        self._device, _ = device_and_dtype(owner)
        self._modes = ThreadModes()
        self._checkpoint_layers = checkpoint_layers
        self._chunk_bytes = logits_chunk_bytes
        self._max_length = max_length
        self._dropout = dropout
        self._attach = attach

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        values: Sequence[npt.NDArray[np.float32]] | None = None,
        share_prefixes: bool = True,
    ) -> list[DifferentiableScore]:
        """A score for every pair of token ids; prompts are not empty, completions may be.

        The log probabilities are those at `temperature`. With `values`, one array per completion, they have these
        values and the module's gradients. `share_prefixes=False` runs a shared prompt once per pair. Raises
        `RequestError`.
        """
        pairs = self._checked(prompts, completions, temperature, values)
        row = pack([np.concatenate(pair)[:-1] for pair in pairs], share_prefixes=share_prefixes)
        with self._modes.applied():
            scores = self._score(pairs, row, temperature)
        lengths = [len(completion) for _, completion in pairs]
        logprobs, entropies = (tensor.split(lengths) for tensor in scores)
        return _scores(logprobs, entropies, values)

    def logits(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        """The module's own logits [R, vocab] in front of each token of each completion, float32, with gradients.

        All of them exist at once. Raises `RequestError`.
        """
        pairs = self._checked(prompts, completions, 1.0, None)
        row = pack([np.concatenate(pair)[:-1] for pair in pairs], share_prefixes=True)
        with self._modes.applied():
            head, states = self._run(pairs, row)
            logits = head.logits(states).float()
        return list(logits.split([len(completion) for _, completion in pairs]))

    def target_logprobs(self, inputs: Sequence[IntArray], targets: Sequence[IntArray]) -> list[Tensor]:
        """For N input tokens, the log probabilities of N targets, or of N rows of K: float32, in the targets' shape.

        Position p predicts `targets[i][p]` from the inputs up to p, whatever the next input is. None of the inputs is
        empty; all ids are within the vocabulary.
        """
        row = pack(inputs, share_prefixes=True)
        # What several sequences predict at the same place of a shared prefix is computed once.
        wanted, inverse = np.unique(
            np.column_stack([np.concatenate(row.places), _padded(targets)]), axis=0, return_inverse=True
        )
        places, table, order = (
            torch.from_numpy(array).to(self._device) for array in (wanted[:, 0], wanted[:, 1:], inverse.reshape(-1))
        )
        with self._modes.applied():
            head, states = self._decode(row)
            logprobs = head.target_logprobs(states[places], table)[order]
        parts = logprobs.split([len(target) for target in targets])
        return [part[:, : _width(target)].reshape(target.shape) for part, target in zip(parts, targets, strict=True)]

    def _checked(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        temperature: float,
        values: Sequence[npt.NDArray[np.float32]] | None,
    ) -> list[tuple[IntArray, IntArray]]:
        pairs = _checked(prompts, completions, temperature, values)
        _check_vocabulary(pairs, vocab_size(self._owner))
        _check_lengths(pairs, self._max_length)
        return pairs

    def _score(
        self, pairs: Sequence[tuple[IntArray, IntArray]], row: PackedRow, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log probabilities and entropies, float32, of all completions, one after the other."""
        head, states = self._run(pairs, row)
        targets = torch.from_numpy(np.concatenate([completion for _, completion in pairs])).to(self._device)
        return head.logprobs(states, targets, temperature)

    def _run(self, pairs: Sequence[tuple[IntArray, IntArray]], row: PackedRow) -> tuple[Head, Tensor]:
        """The head, and the hidden states in front of all tokens of all completions, one after the other."""
        predicting = [place[len(prompt) - 1 :] for (prompt, _), place in zip(pairs, row.places, strict=True)]
        head, states = self._decode(row)
        return head, states[torch.from_numpy(np.concatenate(predicting)).to(self._device)]

    def _decode(self, row: PackedRow) -> tuple[Head, Tensor]:
        """The head, and the hidden states [T, H] after all tokens of the row."""
        ids, view = torch.from_numpy(row.input_ids).to(self._device), self._view()
        output = self._run_decoder(view, ids, row)
        for part in view.modules():  # a module that refers to itself would keep activations until garbage is collected
            vars(part).pop("forward", None)
        return Head(view, output, ids, self._chunk_bytes), cast(Tensor, output["last_hidden_state"])[0]

    def _view(self) -> nn.Module:
        """A view that attends along segments, and trains or not as its owner does; without dropout, it does not."""
        view = view_of(self._owner)
        for part, original in zip(view.modules(), self._owner.modules(), strict=True):
            part.training = original.training and self._dropout
        cast(PreTrainedModel, view).set_attn_implementation(IMPLEMENTATION)
        for part in view.modules():
            if self._checkpoint_layers and isinstance(part, GradientCheckpointingLayer):
                part.gradient_checkpointing = False
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)
            else:
                _make_non_reentrant(part)
        if self._attach is not None:
            self._attach(view)
        return view

    def _run_decoder(self, view: nn.Module, ids: Tensor, row: PackedRow) -> ModelOutput:
        """The output of the decoder after its last norm, by the model's own forward pass."""
        outputs: list[ModelOutput] = []
        hook = cast(PreTrainedModel, view).get_decoder().register_forward_hook(lambda *args: outputs.append(args[-1]))
        with hook:
            view(
                input_ids=ids[None],
                position_ids=torch.from_numpy(row.positions).to(ids.device)[None],
                use_cache=False,
                logits_to_keep=ids.new_zeros(1),
                segments=SegmentAttention(row.segments, ids.device),
            )
        return outputs[0]


def _make_non_reentrant(part: nn.Module) -> None:
    """Have a part that its owner checkpoints give gradients, whether or not its inputs need any.

    Reentrant checkpoints give none to a layer over frozen embeddings, unless a hook that a view leaves out
    (`enable_input_require_grads`) makes their output need gradients.
    """
    function = vars(part).get("_gradient_checkpointing_func")
    if isinstance(function, partial) and function.func is checkpoint:
        vars(part)["_gradient_checkpointing_func"] = partial(function, use_reentrant=False)


def _refuse_distributed(owner: nn.Module) -> None:
    """Such wrappers average gradients or gather weights in their own forward pass, which a view does not call."""
    kinds = {kind.__name__ for part in owner.modules() for kind in type(part).__mro__}
    if isinstance(owner, DistributedDataParallel):
        raise ConfigurationError(
            "gradients through a view of a DistributedDataParallel module would not be averaged over its processes: "
            "pass its .module and average them yourself, or compute log probabilities with its own forward pass"
        )
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        raise ConfigurationError(
            "the weights of an FSDP module are gathered by its own forward pass, which a view does not call: "
            "compute log probabilities with its own forward pass"
        )


def _checked(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float,
    values: Sequence[npt.NDArray[np.float32]] | None,
) -> list[tuple[IntArray, IntArray]]:
    if not prompts or len(prompts) != len(completions):
        raise RequestError(f"{len(prompts)} prompts and {len(completions)} completions: pass one completion per prompt")
    if not (isinstance(temperature, int | float) and 0 < temperature < float("inf")):
        raise RequestError(f"temperature must be a finite number above 0 for scores with gradients, not {temperature}")
    pairs = [(_ids(prompt), _ids(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
    for i, (prompt, _) in enumerate(pairs):
        if not len(prompt):
            raise RequestError(f"prompt {i} is empty: a completion's first token is scored after its prompt's last")
    lengths = [len(completion) for _, completion in pairs]
    if values is not None and [np.shape(each) for each in values] != [(length,) for length in lengths]:
        raise RequestError("values must hold one number for every token of every completion")
    return pairs


def _check_vocabulary(pairs: Sequence[tuple[IntArray, IntArray]], size: int) -> None:
    tokens = np.concatenate([part for pair in pairs for part in pair])
    if tokens.min() < 0 or tokens.max() >= size:
        outside = tokens[(tokens < 0) | (tokens >= size)][0]
        raise RequestError(f"token id {outside} is outside the model's vocabulary of {size}")


def _check_lengths(pairs: Sequence[tuple[IntArray, IntArray]], limit: int | None) -> None:
    for i, (prompt, completion) in enumerate(pairs):
        if limit is not None and len(prompt) + len(completion) > limit:
            raise RequestTooLarge(
                f"prompt and completion {i} have {len(prompt) + len(completion)} tokens and the limit is {limit} for "
                "both together: shorten the prompt, or leave the pair out"
            )


def _padded(targets: Sequence[IntArray]) -> IntArray:
    """The targets of all positions, int64 [T, K] for the largest K; zeros where a sequence has fewer."""
    table = np.zeros((sum(map(len, targets)), max(map(_width, targets))), dtype=np.int64)
    begin = 0
    for target in targets:
        table[begin : begin + len(target), : _width(target)] = target.reshape(len(target), -1)
        begin += len(target)
    return table


def _width(target: IntArray) -> int:
    """The number of targets of each position."""
    return 1 if target.ndim == 1 else target.shape[1]


def _ids(tokens: Sequence[int]) -> IntArray:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise RequestError("prompts and completions must be lists of token ids")
    return ids.astype(np.int64)


def _scores(
    logprobs: Sequence[Tensor], entropies: Sequence[Tensor], values: Sequence[npt.NDArray[np.float32]] | None
) -> list[DifferentiableScore]:
    if values is None:
        return [DifferentiableScore(*pair) for pair in zip(logprobs, entropies, strict=True)]
    scores = []
    for own, entropy, value in zip(logprobs, entropies, values, strict=True):
        given = torch.from_numpy(np.array(value, dtype=np.float32)).to(own.device)
        detached = own.detach()
        scores.append(DifferentiableScore(given + (own - detached), entropy, detached - given))
    return scores
