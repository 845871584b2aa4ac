"""Whether a model can run through the paged cache: refused early by what it is, then by what it computes.

`attach` switches a module to our attention, learns what each layer stores, and compares a short paged pass with the
model's own. Called once per load; every refusal is a `ConfigurationError` that names the remedy.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError
from penstock.models.attention import IMPLEMENTATION, PagedAttention, ShapeProbe
from penstock.models.layout import StepLayout
from penstock.models.storage import KVStorage, LayerShape
from penstock.sampling import SamplingParams
from penstock.step import Row

REMEDY = "serve it with another backend, or with a model that keeps plain key/value attention"
# Layer kinds whose state is not keys and values, or whose keys a page cannot hold.
_FOREIGN = ("mamba", "recurrent", "linear_attention", "conv", "rwkv", "chunked_attention")
PROBE_TOKENS = 12


def attach(
    module: nn.Module, device: torch.device, *, verify: bool, longest: int = 1 << 31
) -> tuple[dict[int, int], list[LayerShape]]:
    """Switch `module` to paged attention: (layer index by module id, what each layer stores).

    `longest` is the most tokens of one sequence: windows that reach as far need no support.
    Raises `ConfigurationError` for models that cannot run so, of those that `refuse_foreign` let pass.
    """
    ids = _probe_ids(module, device)
    own = _logits(module, ids) if verify else None
    _switch(module)
    probe = ShapeProbe()
    _forward(module, ids, torch.arange(len(ids), device=device), paged=probe)
    if not probe.shapes:
        raise _refusal(module, "its attention does not go through transformers' attention interface")
    if len(probe.layers) != len(probe.shapes):
        raise _refusal(module, "a layer attends more than once")
    _check_windows(module, probe, longest)
    if own is not None:
        _compare(module, own, _paged_logits(module, ids, probe, device))
    return probe.layers, probe.shapes


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


def _refusal(module: nn.Module, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{type(module).__name__} cannot run in the paged engine: {reason}. Remedy: {REMEDY}")


def _probe_ids(module: nn.Module, device: torch.device) -> Tensor:
    vocab = int(getattr(module.config.get_text_config(), "vocab_size", 2))  # type: ignore[union-attr, operator]
    return (torch.arange(PROBE_TOKENS, device=device) * 7919 + 11) % vocab


def _switch(module: nn.Module) -> None:
    try:
        module.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    except ValueError as error:
        raise _refusal(module, f"it refuses custom attention ({error})") from error


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(input_ids=ids[None], use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def _forward(module: nn.Module, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
    try:
        with torch.inference_mode():
            out = module(input_ids=ids[None], position_ids=positions[None], use_cache=False, **options)
    except TypeError as error:
        raise _refusal(module, f"the step's metadata does not reach its attention ({error})") from error
    return out.logits[0].float()  # type: ignore[no-any-return]


def _paged_logits(module: nn.Module, ids: Tensor, probe: ShapeProbe, device: torch.device) -> Tensor:
    """The probe's tokens in three chunks (many, many, one), beside a second row with the same tokens in one go."""
    block, parts = 4, ((0, 5), (5, len(ids) - 1), (len(ids) - 1, len(ids)))
    storage = KVStorage(probe.shapes, 2 * -(-len(ids) // block), block, device)
    tokens, found = ids.tolist(), []
    for start, end in parts:
        layout = StepLayout((_row(0, tokens, start, end, block), _row(1, tokens, 0, end, block)), block, device)
        paged = PagedAttention(storage, layout, probe.layers)
        wanted = torch.arange(end - start, device=device)
        logits = _forward(module, layout.input_ids, layout.positions, paged=paged, logits_to_keep=wanted)
        if len(logits) != len(wanted):
            raise _refusal(module, "it gives logits of other positions than asked for (logits_to_keep)")
        found.append(logits)
    return torch.cat(found)


def _row(which: int, tokens: list[int], start: int, end: int, block: int) -> Row:
    count = -(-len(tokens) // block)
    blocks = array("i", range(which * count, (which + 1) * count))
    return Row(which, tokens, start, end, blocks, True, SamplingParams(), len(tokens))


def _compare(module: nn.Module, own: Tensor, paged: Tensor) -> None:
    scale = own.abs().max().clamp(min=1.0)
    worst = ((own - paged).abs().max() / scale).item()
    exact = next(module.parameters()).dtype == torch.float32
    if not worst <= (1e-3 if exact else 0.1):
        raise _refusal(module, f"a paged pass differs from the model's own (relative logit error {worst:.3g})")
