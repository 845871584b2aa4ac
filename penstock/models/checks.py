"""Whether a model can run through the paged cache: refused early by what it is, then by what it computes.

`probe` switches a module to our attention and learns what each layer stores; `compare` holds a short paged pass against
the model's own. Called by `loading`; every refusal is a `ConfigurationError` that names the remedy.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError, text_of
from penstock.models.attention import IMPLEMENTATION, Options, ShapeProbe
from penstock.models.layout import StepLayout
from penstock.models.paging import Paging
from penstock.models.storage import LayerShape
from penstock.sampling import SamplingParams
from penstock.step import Row

REMEDY = "serve it with another backend, or with a model that keeps plain key/value attention"
# Layer kinds whose state is not keys and values, or whose keys a page cannot hold.
_FOREIGN = ("mamba", "recurrent", "linear_attention", "conv", "rwkv", "chunked_attention")
PROBE_TOKENS = 12
QUANTIZED_TOLERANCE = 0.3  # of the largest logit, over random or trained weights; a wrong rewrite is off by 1
TRIAL_BLOCK = 16  # a whole panel of the kernels


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe of a model found: its attention modules (index by id), in the order they run, and its own logits.

    `shapes` is what each stores, `options` how each attends; `own` is None when no comparison is wanted.
    """

    layers: dict[int, int]
    shapes: list[LayerShape]
    options: list[Options]
    own: Tensor | None


def probe(module: nn.Module, device: torch.device, *, verify: bool, longest: int = 1 << 31) -> Probed:
    """Switch `module` to our attention and look at what its layers store.

    `longest` is the most tokens of one sequence: windows that reach as far need no support.
    Raises `ConfigurationError` for models that cannot run so, of those that `refuse_foreign` let pass.
    """
    ids = _probe_ids(module, device)
    own = _logits(module, ids) if verify else None
    _switch(module)
    found = ShapeProbe()
    _forward(module, ids, torch.arange(len(ids), dtype=torch.int64, device=device), paged=found)
    if not found.shapes:
        raise _refusal(module, "its attention does not go through transformers' attention interface")
    if len(found.layers) != len(found.shapes):
        raise _refusal(module, "a layer attends more than once")
    _check_windows(module, found, longest)
    return Probed(found.layers, found.shapes, found.options, own)


def compare(
    module: nn.Module,
    probed: Probed,
    paging: Paging,
    *,
    quantized: Sequence[str] = (),
    tolerance: float | None = None,
) -> None:
    """Hold a paged pass in ragged chunks against the model's own logits. Raises `ConfigurationError`.

    `tolerance` is relative to the largest logit; None is what rounding in the model's dtype explains, or in the few
    bits that the `quantized` settings ("quantization='int8'") leave.
    """
    if probed.own is None:
        return
    device = probed.own.device
    paged = _paged_logits(module, _probe_ids(module, device), probed, paging, device)
    scale = probed.own.abs().max().clamp(min=1.0)
    worst = ((probed.own - paged).abs().max() / scale).item()
    exact = 1e-3 if probed.shapes[0].dtype == torch.float32 else 0.1
    if not worst <= (tolerance or (QUANTIZED_TOLERANCE if quantized else exact)):
        if quantized:
            raise _too_coarse(module, quantized, worst)
        raise _refusal(module, f"a paged pass differs from the model's own (relative logit error {worst:.3g})")


def trial_pass(module: nn.Module, probed: Probed, paging: Paging, device: torch.device) -> Tensor:
    """The logits [T, vocab] of one pass of the probe's tokens as a single row."""
    ids = _probe_ids(module, device)
    storage = paging.storage(probed.shapes, 1, TRIAL_BLOCK)
    layout = StepLayout((_row(0, ids.tolist(), 0, len(ids), TRIAL_BLOCK),), TRIAL_BLOCK, device)
    paged = paging.attention(storage, layout, probed.layers)
    return _forward(module, layout.input_ids, layout.positions, paged=paged)


def refuse_foreign(module: nn.Module) -> None:
    """Refuse what is known from the config alone."""
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(module, "set_attn_implementation"):
        raise _refusal(module, "it is not a transformers model")
    text = config.get_text_config()
    kinds = {
        str(kind) for kind in (getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    }
    foreign = sorted(kind for kind in kinds if any(word in kind for word in _FOREIGN))
    if foreign:
        raise _refusal(module, f"its layers keep other state than keys and values ({', '.join(foreign)})")
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(module, "it is an encoder-decoder")
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        raise _refusal(module, "ALiBi positions are not carried by the attention interface")
    if not getattr(module, "_supports_attention_backend", False):
        raise _refusal(module, "its architecture does not support custom attention functions")


def _check_windows(module: nn.Module, probe: ShapeProbe, longest: int) -> None:
    """Refuse a model that would apply sliding windows through its mask alone: they do not reach the attention."""
    text: Any = module.config.get_text_config()  # type: ignore[union-attr, operator]
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or window >= longest:
        return
    kinds = getattr(text, "layer_types", None)
    expected = list(kinds).count("sliding_attention") if kinds else len(probe.shapes)
    if probe.num_windows < expected:
        raise _refusal(
            module,
            f"{expected} layers slide over {window} tokens but {probe.num_windows} tell their attention so "
            f"(with max_sequence_length up to {window} it can run)",
        )


def vocab_size(module: nn.Module) -> int:
    """Logits of a position."""
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    text: Any = module.config.get_text_config()  # type: ignore[union-attr, operator]
    return int(text.vocab_size if head is None else head.weight.shape[0])


def _refusal(module: nn.Module, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{type(module).__name__} cannot run in the paged engine: {reason}. Remedy: {REMEDY}")


def _too_coarse(module: nn.Module, quantized: Sequence[str], worst: float) -> ConfigurationError:
    return ConfigurationError(
        f"{type(module).__name__} loses too much to {' and '.join(quantized)}: its logits are off by {worst:.2g} of "
        f"the largest one, and at most {QUANTIZED_TOLERANCE} is accepted. Remedy: leave out {' or '.join(quantized)}"
    )


def _probe_ids(module: nn.Module, device: torch.device) -> Tensor:
    vocab = int(getattr(module.config.get_text_config(), "vocab_size", 2))  # type: ignore[union-attr, operator]
    return (torch.arange(PROBE_TOKENS, dtype=torch.int64, device=device) * 7919 + 11) % vocab


def _switch(module: nn.Module) -> None:
    try:
        module.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    except ValueError as error:
        raise _refusal(module, f"it refuses custom attention ({text_of(error)})") from error


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(input_ids=ids[None], use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def _forward(module: nn.Module, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
    try:
        with torch.inference_mode():
            out = module(input_ids=ids[None], position_ids=positions[None], use_cache=False, **options)
    except TypeError as error:
        raise _refusal(module, f"the step's metadata does not reach its attention ({text_of(error)})") from error
    return out.logits[0].float().clone()  # type: ignore[no-any-return]


def _paged_logits(module: nn.Module, ids: Tensor, probed: Probed, paging: Paging, device: torch.device) -> Tensor:
    """The probe's tokens in three chunks (many, many, one), beside a second row with the same tokens in one go."""
    block, parts = TRIAL_BLOCK, ((0, 5), (5, len(ids) - 1), (len(ids) - 1, len(ids)))
    storage = paging.storage(probed.shapes, 2 * -(-len(ids) // block), block)
    tokens, found = ids.tolist(), []
    for start, end in parts:
        layout = StepLayout((_row(0, tokens, start, end, block), _row(1, tokens, 0, end, block)), block, device)
        paged = paging.attention(storage, layout, probed.layers)
        wanted = torch.arange(end - start, dtype=torch.int64, device=device)
        logits = _forward(module, layout.input_ids, layout.positions, paged=paged, logits_to_keep=wanted)
        if len(logits) != len(wanted):
            raise _refusal(module, "it gives logits of other positions than asked for (logits_to_keep)")
        found.append(logits)
    return torch.cat(found)


def _row(which: int, tokens: list[int], start: int, end: int, block: int) -> Row:
    count = -(-len(tokens) // block)
    blocks = array("i", range(which * count, (which + 1) * count))
    return Row(which, tokens, start, end, blocks, True, SamplingParams(), len(tokens))
