"""`Scoring`: a completion scored by another engine, as the log probabilities of a prompt that ends with it.

Owns the arithmetic from the engine's entries to a `Score`. Called by `HostedEngine.score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.backends.request_params import changed
from penstock.errors import ExecutionError, RequestError
from penstock.generation import GenerationConfig, Params
from penstock.sampling import SamplingParams
from penstock.scores import FloatArray, Score
from penstock.values import token_ids

# Of what changes a distribution, only the temperature can be applied to log probabilities.
_HARMLESS = {"temperature", "max_tokens", "n", "seed", "logprobs", "output_kind", "detokenize", "stop", "ignore_eos"}


class Entries(Protocol):
    """The log probabilities or logits in front of the tokens of a prompt, as vLLM's `FlatLogprobs` has them.

    Those of place p are `logprobs[start_indices[p] : end_indices[p]]`, of the tokens at the same indices of
    `token_ids`; the first is that of the prompt's own token.
    """

    @property
    def logprobs(self) -> Sequence[float]: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def start_indices(self) -> Sequence[int]: ...

    @property
    def end_indices(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...


@dataclass(slots=True, eq=False)
class Scoring:
    """One completion, scored by `engine` under weights of `weight_version`.

    `are_logits`: whether its entries are logits, not log probabilities.
    """

    completion: tuple[int, ...]
    temperature: float | None
    are_logits: bool
    wants_logits: bool
    wants_entropies: bool
    begin: int = 0  # the length of the prompt
    entries: Entries | None = None
    engine: str = "vLLM"
    weight_version: int = 0

    @classmethod
    def of(
        cls, completion: object, params: Params, *, are_logits: bool, logits: bool, entropies: bool, engine: str
    ) -> Scoring:
        """Raises `RequestError` for what cannot be scored, but for logits that are asked for in vain."""
        ids = token_ids("completion", completion)
        if not ids:
            raise RequestError("score needs at least one token id in every completion")
        if isinstance(params, GenerationConfig):
            params = params.sampling_params()
        for name in () if params is None else changed(params):
            if name not in _HARMLESS:
                raise RequestError(f"{engine} cannot score with {name}: leave it out, or use the native engine")
        temperature = None if params is None else params.temperature
        return cls(ids, temperature, are_logits, logits, entropies, engine=engine)

    def request(self, prompt_ids: Sequence[int]) -> tuple[list[int], SamplingParams]:
        """The prompt and the parameters of the request that scores the completion."""
        self.begin = len(prompt_ids)
        count = -1 if self.needs_rows else 0
        return [*prompt_ids, *self.completion], SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=count, detokenize=False
        )

    @property
    def needs_rows(self) -> bool:
        """Whether the entries must cover the vocabulary."""
        is_tempered = self.temperature not in (None, 1.0)
        return self.are_logits or self.wants_logits or self.wants_entropies or is_tempered

    def score(self) -> Score:
        """The score, once the request has ended."""
        import numpy as np

        if self.entries is None or len(self.entries) < self.begin + len(self.completion):
            raise ExecutionError(f"{self.engine} returned no log probabilities of the prompt")
        if not self.needs_rows:
            values = [self.entries.logprobs[self.entries.start_indices[place]] for place in self._places()]
            logprobs = np.array(values, dtype=np.float32)
            return Score(logprobs, None if self.temperature is None else logprobs, weight_version=self.weight_version)
        rows = self._rows(self.entries)
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

    def _rows(self, flat: Entries) -> FloatArray:
        """[R, vocab] float32: what the engine computed in front of each token of the completion."""
        import numpy as np

        rows = [(flat.start_indices[place], flat.end_indices[place]) for place in self._places()]
        vocab_size = 1 + max(max(flat.token_ids[start:end]) for start, end in rows)
        if any(end - start < vocab_size for start, end in rows):
            raise ExecutionError(f"{self.engine} returned log probabilities of a part of the vocabulary only")
        array = np.empty((len(rows), vocab_size), dtype=np.float32)
        for row, (start, end) in zip(array, rows, strict=True):
            row[flat.token_ids[start:end]] = flat.logprobs[start:end]
        return array

    def _chosen(self, rows: FloatArray) -> FloatArray:
        import numpy as np

        return rows[np.arange(len(rows)), list(self.completion)]


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
