"""`Scoring`: a completion scored by vLLM, as the log probabilities of a prompt that ends with it.

Owns the arithmetic from vLLM's entries to a `Score`. Called by `VLLMEngine.score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from penstock.errors import ExecutionError, RequestError
from penstock.generation import GenerationConfig, Params
from penstock.sampling import SamplingParams
from penstock.scores import FloatArray, Score
from penstock.values import token_ids

_DEFAULTS = SamplingParams()


@dataclass(slots=True, eq=False)
class Scoring:
    """One completion. `are_logits`: whether vLLM's entries are logits. `entries` are vLLM's `FlatLogprobs`.

    They were computed under weights of `weight_version`.
    """

    completion: tuple[int, ...]
    temperature: float | None
    are_logits: bool
    wants_logits: bool
    wants_entropies: bool
    begin: int = 0  # the length of the prompt
    entries: Any = None
    weight_version: int = 0

    @classmethod
    def of(cls, completion: object, params: Params, are_logits: bool, logits: bool, entropies: bool) -> Scoring:
        """Raises `RequestError` for what vLLM cannot score."""
        ids = token_ids("completion", completion)
        if not ids:
            raise RequestError("score needs at least one token id in every completion")
        if logits and not are_logits:
            raise RequestError('this engine has no logits: make it with logprobs_mode="raw_logits"')
        if isinstance(params, GenerationConfig):
            params = params.sampling_params()
        if params is not None:
            _check_params(params)
        return cls(ids, None if params is None else params.temperature, are_logits, logits, entropies)

    def request(self, prompt_ids: Sequence[int]) -> tuple[list[int], SamplingParams]:
        """The prompt and the parameters of the request that scores the completion."""
        self.begin = len(prompt_ids)
        count = -1 if self._needs_rows else 0
        return [*prompt_ids, *self.completion], SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=count, detokenize=False
        )

    @property
    def _needs_rows(self) -> bool:
        """Whether the entries must cover the vocabulary."""
        is_tempered = self.temperature not in (None, 1.0)
        return self.are_logits or self.wants_logits or self.wants_entropies or is_tempered

    def score(self) -> Score:
        """The score, once the request has ended."""
        import numpy as np

        if self.entries is None or len(self.entries) < self.begin + len(self.completion):
            raise ExecutionError("vLLM returned no log probabilities of the prompt")
        if not self._needs_rows:
            values = [self.entries.logprobs[self.entries.start_indices[place]] for place in self._places()]
            logprobs = np.array(values, dtype=np.float32)
            return Score(logprobs, None if self.temperature is None else logprobs, weight_version=self.weight_version)
        rows = self._rows()
        model = _log_softmax(rows)
        return Score(
            self._chosen(model),
            None if self.temperature is None else self._chosen(_at_temperature(rows, self.temperature)),
            rows if self.wants_logits else None,
            -(np.exp(model) * model).sum(-1) if self.wants_entropies else None,
            weight_version=self.weight_version,
        )

    def _places(self) -> range:
        return range(self.begin, self.begin + len(self.completion))

    def _rows(self) -> FloatArray:
        """[R, vocab] float32: what vLLM computed in front of each token of the completion."""
        import numpy as np

        flat = self.entries
        rows = [(flat.start_indices[place], flat.end_indices[place]) for place in self._places()]
        vocab_size = 1 + max(max(flat.token_ids[start:end]) for start, end in rows)
        array = np.empty((len(rows), vocab_size), dtype=np.float32)
        for row, (start, end) in zip(array, rows, strict=True):
            row[flat.token_ids[start:end]] = flat.logprobs[start:end]
        return array

    def _chosen(self, rows: FloatArray) -> FloatArray:
        import numpy as np

        return rows[np.arange(len(rows)), list(self.completion)]


def _check_params(params: SamplingParams) -> None:
    """Of what changes a distribution only the temperature can be applied to vLLM's log probabilities."""
    harmless = {"temperature", "max_tokens", "n", "seed", "logprobs", "output_kind", "detokenize", "stop", "ignore_eos"}
    for field in fields(params):
        is_default = getattr(params, field.name) == getattr(_DEFAULTS, field.name)
        if field.init and field.name not in harmless and not is_default:
            raise RequestError(f"vLLM cannot score with {field.name}: leave it out, or use the native engine")


def _log_softmax(rows: FloatArray) -> FloatArray:
    import numpy as np

    wide = rows.astype(np.float64) - rows.max(-1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(-1, keepdims=True))).astype(np.float32)


def _at_temperature(rows: FloatArray, temperature: float) -> FloatArray:
    """Log probabilities of a draw at a temperature; at 0 the most likely token is certain."""
    import numpy as np

    if temperature:
        return _log_softmax(rows / np.float32(temperature))
    certain = np.full_like(rows, -np.inf)
    certain[np.arange(len(rows)), rows.argmax(-1)] = 0.0
    return certain
