"""Whether a model can run through the paged cache: refused early for what it is, then for what it computes.

`probe` switches a module to our attention and learns what each layer stores; `compare` compares a short paged pass
with the model's own. Called by `loading`; every refusal is a `ConfigurationError` that names the remedy.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.errors import ConfigurationError, text_of
from penstock.kernels.paged import AttentionOptions
from penstock.models.attention import IMPLEMENTATION, AttentionBackend, ShapeProbe, StepAttention
from penstock.models.layout import StepLayout
from penstock.models.storage import LayerShape
from penstock.sampling import SamplingParams
from penstock.step import Row

REMEDY = "serve it with another backend, or with a model that keeps plain key/value attention"
# Layer kinds whose state is not keys and values, or whose keys a page cannot hold.
_UNSUPPORTED_LAYERS = ("mamba", "recurrent", "linear_attention", "conv", "rwkv", "chunked_attention")
PROBE_TOKENS = 12
QUANTIZED_TOLERANCE = 0.3  # of the largest logit, over random or trained weights; a wrong rewrite is off by 1
TRIAL_BLOCK_SIZE = 16  # a whole panel of the kernels


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The attention modules of a model (index by id), in the order they run, and what each stores and how it attends.

    `reference` are the logits [T, vocab] of the model's own attention; None where no comparison is requested.
    """

    layers: dict[int, int]
    shapes: list[LayerShape]
    options: list[AttentionOptions]
    reference: Tensor | None


def probe(module: nn.Module, device: torch.device, *, verify: bool, max_length: int = 1 << 31) -> ProbeResult:
    """Switch `module` to our attention and record what its layers store.

    `max_length` is the most tokens of one sequence: windows that reach as far need no support. Expects a module that
    `refuse_unsupported` accepts; raises `ConfigurationError` for one that cannot run nevertheless.
    """
    ids = _probe_ids(module, device)
    reference = _own_logits(module, ids) if verify else None
    _switch_attention(module)
    recorder = ShapeProbe()
    _forward(module, ids, torch.arange(len(ids), dtype=torch.int64, device=device), recorder)
    if not recorder.shapes:
        raise _refusal(module, "its attention does not go through transformers' attention interface")
    if len(recorder.layers) != len(recorder.shapes):
        raise _refusal(module, "a layer attends more than once")
    _check_windows(module, recorder, max_length)
    return ProbeResult(recorder.layers, recorder.shapes, recorder.options, reference)


def compare(
    module: nn.Module,
    probed: ProbeResult,
    backend: AttentionBackend,
    *,
    quantized: Sequence[str] = (),
    tolerance: float | None = None,
) -> None:
    """Compare a paged pass in ragged chunks with the model's own logits. Raises `ConfigurationError`.

    `tolerance` is relative to the largest logit; None is what rounding in the model's dtype explains, or in the few
    bits that the `quantized` settings ("quantization='int8'") leave.
    """
    reference = probed.reference
    if reference is None:
        return
    paged = _paged_logits(module, _probe_ids(module, reference.device), probed, backend, reference.device)
    scale = reference.abs().max().clamp(min=1.0)
    error = ((reference - paged).abs().max() / scale).item()
    exact = 1e-3 if probed.shapes[0].dtype == torch.float32 else 0.1
    if not error <= (tolerance or (QUANTIZED_TOLERANCE if quantized else exact)):
        if quantized:
            raise _too_inaccurate(module, quantized, error)
        raise _refusal(module, f"a paged pass differs from the model's own (relative logit error {error:.3g})")


def trial_pass(
    module: nn.Module, probed: ProbeResult, backend: AttentionBackend, device: torch.device, ids: Tensor | None = None
) -> Tensor:
    """The logits [T, vocab] of one pass of `ids` [T], or of the probe's tokens, as a single row."""
    ids = _probe_ids(module, device) if ids is None else ids
    storage = backend.storage(probed.shapes, -(-len(ids) // TRIAL_BLOCK_SIZE), TRIAL_BLOCK_SIZE)
    layout = StepLayout.of((_row(0, ids.tolist(), 0, len(ids)),), TRIAL_BLOCK_SIZE, device)
    return _forward(module, layout.input_ids, layout.positions, storage.attention(layout, probed.layers))


def refuse_unsupported(module: nn.Module) -> None:
    """Raise `ConfigurationError` for a model whose config alone shows that it cannot run."""
    if getattr(module, "config", None) is None or not hasattr(module, "set_attn_implementation"):
        raise _refusal(module, "it is not a transformers model")
    config = cast(PreTrainedModel, module).config
    text = config.get_text_config()
    kinds = {
        str(kind) for kind in (getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    }
    unsupported = sorted(kind for kind in kinds if any(word in kind for word in _UNSUPPORTED_LAYERS))
    if unsupported:
        raise _refusal(module, f"its layers keep other state than keys and values ({', '.join(unsupported)})")
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(module, "it is an encoder-decoder")
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        raise _refusal(module, "ALiBi positions are not carried by the attention interface")
    if not getattr(module, "_supports_attention_backend", False):
        raise _refusal(module, "its architecture does not support custom attention functions")


def _check_windows(module: nn.Module, recorder: ShapeProbe, max_length: int) -> None:
    """Refuse a model that would apply sliding windows through its mask alone: they do not reach the attention."""
    text = text_config(module)
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or window >= max_length:
        return
    kinds = getattr(text, "layer_types", None)
    expected = list(kinds).count("sliding_attention") if kinds else len(recorder.shapes)
    if recorder.num_windows < expected:
        raise _refusal(
            module,
            f"{expected} layers slide over {window} tokens but only {recorder.num_windows} pass that to their "
            f"attention (with max_sequence_length up to {window} it can run)",
        )


def text_config(module: nn.Module) -> object:
    """The transformers config of a model's decoder."""
    return cast(PreTrainedModel, module).config.get_text_config()


def vocab_size(module: nn.Module) -> int:
    """Logits of a position."""
    head = cast(PreTrainedModel, module).get_output_embeddings()
    return int(getattr(text_config(module), "vocab_size") if head is None else head.weight.shape[0])  # noqa: B009


def hidden_size(module: nn.Module) -> int:
    """Length of the final hidden state of a token: what the output head takes in."""
    head = cast(PreTrainedModel, module).get_output_embeddings()
    width = getattr(head, "in_features", None)  # rewritten heads have it too
    return int(getattr(text_config(module), "hidden_size", 0) if width is None else width)


def _refusal(module: nn.Module, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{type(module).__name__} cannot run in the paged engine: {reason}. Remedy: {REMEDY}")


def _too_inaccurate(module: nn.Module, quantized: Sequence[str], error: float) -> ConfigurationError:
    return ConfigurationError(
        f"{type(module).__name__} loses too much to {' and '.join(quantized)}: its logits are off by {error:.2g} of "
        f"the largest one, and at most {QUANTIZED_TOLERANCE} is accepted. Remedy: leave out {' or '.join(quantized)}"
    )


def _probe_ids(module: nn.Module, device: torch.device) -> Tensor:
    vocabulary = int(getattr(text_config(module), "vocab_size", 2))
    return (torch.arange(PROBE_TOKENS, dtype=torch.int64, device=device) * 7919 + 11) % vocabulary


def _switch_attention(module: nn.Module) -> None:
    try:
        cast(PreTrainedModel, module).set_attn_implementation(IMPLEMENTATION)
    except ValueError as error:
        raise _refusal(module, f"it refuses custom attention ({text_of(error)})") from error


def _own_logits(module: nn.Module, ids: Tensor) -> Tensor:
    """The logits [T, vocab] of the model with its own attention."""
    with torch.inference_mode():
        return _logits_of(module, module(input_ids=ids[None], use_cache=False))


def _logits_of(module: nn.Module, output: object) -> Tensor:
    """The float32 logits [T, vocab] of an output. Raises `ConfigurationError` for a model without an output head."""
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ConfigurationError(f"{type(module).__name__} returns no logits: load it with AutoModelForCausalLM")
    return cast(Tensor, logits)[0].float()


def _forward(module: nn.Module, ids: Tensor, positions: Tensor, paged: StepAttention, **options: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            out = module(input_ids=ids[None], position_ids=positions[None], use_cache=False, paged=paged, **options)
    except TypeError as error:
        raise _refusal(module, f"the step's metadata does not reach its attention ({text_of(error)})") from error
    return _logits_of(module, out).clone()


def _paged_logits(
    module: nn.Module, ids: Tensor, probed: ProbeResult, backend: AttentionBackend, device: torch.device
) -> Tensor:
    """The probe's tokens in three chunks (many, many, one), beside a second row with the same tokens at once."""
    chunks = ((0, 5), (5, len(ids) - 1), (len(ids) - 1, len(ids)))
    storage = backend.storage(probed.shapes, 2 * -(-len(ids) // TRIAL_BLOCK_SIZE), TRIAL_BLOCK_SIZE)
    tokens, results = ids.tolist(), []
    for start, end in chunks:
        rows = _row(0, tokens, start, end), _row(1, tokens, 0, end)
        layout = StepLayout.of(rows, TRIAL_BLOCK_SIZE, device)
        attention = storage.attention(layout, probed.layers)
        indices = torch.arange(end - start, dtype=torch.int64, device=device)
        logits = _forward(module, layout.input_ids, layout.positions, attention, logits_to_keep=indices)
        if len(logits) != len(indices):
            raise _refusal(module, "it returns logits of other positions than requested (logits_to_keep)")
        results.append(logits)
    return torch.cat(results)


def _row(index: int, tokens: list[int], start: int, end: int) -> Row:
    num_blocks = -(-len(tokens) // TRIAL_BLOCK_SIZE)
    blocks = array("i", range(index * num_blocks, (index + 1) * num_blocks))
    return Row(index, tokens, start, end, blocks, True, SamplingParams(), len(tokens))
