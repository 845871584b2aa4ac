"""`BaseBackend`: one blocking interface to every engine, of texts and numpy arrays; `create_backend` makes it.

Loads its engine once, at the first call that needs it. Everything is asked of an `EngineBackend`; only shapes are made
here. May be called from any number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from penstock.api.blocking import run
from penstock.api.prompt import as_batch
from penstock.api.protocols import Completion, Tokenizing
from penstock.backends.config import BackendConfig
from penstock.errors import ConfigurationError, RequestError, shown
from penstock.training.backend import EngineBackend, Prompts, Responses, as_responses
from penstock.training.results import GenerationResult
from penstock.values import plain, real

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True)
class _Details:
    """What is asked for beside the texts. `temperature`: that of the probabilities."""

    logits: bool
    probs: bool
    gradients: bool
    temperature: float


def create_backend(config: BackendConfig | Mapping[str, Any]) -> BaseBackend:
    """A backend by its config, an object or a mapping as in its file. The model is loaded by `load()`.

    Raises `ConfigurationError`, a `ValueError`, for what the config gets wrong or what is not available, and
    `PackageMissing`, which is an `ImportError` too, where the engine is not installed.
    """
    if isinstance(config, Mapping):
        config = BackendConfig.from_dict(config)
    if not isinstance(config, BackendConfig):
        raise ConfigurationError(f"a backend is made from a mapping or a BackendConfig, not from {shown(config)}")
    return BaseBackend(config)


class BaseBackend:
    """Generates with the engine that `config` names, and computes logits and probabilities of responses.

    A string gives one value, a list of prompts a list of values. Results are of the caller; none is cached. Raises
    `ConfigurationError`, `PackageMissing`.
    """

    def __init__(self, config: BackendConfig) -> None:
        config.backend_config.check_available()
        self.config = config
        self._backend: EngineBackend | None = None
        self._loading = threading.Lock()

    def load(self) -> None:
        """Load the model and its tokenizer, unless that was done. Raises `ConfigurationError`, `OutOfMemory`."""
        self._loaded()

    def is_loaded(self) -> bool:
        """Whether `load` has ended."""
        return self._backend is not None

    def close(self) -> None:
        """Free the model. A later call loads it again."""
        with self._loading:
            backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def generate(
        self,
        prompts: Prompts,
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool = True,
        stop_strings: str | Sequence[str] | None = None,
        return_logits: bool = False,
        return_probs: bool = False,
        compute_gradients: bool = False,
        **options: Any,
    ) -> Any:
        """A completion of at most `max_length` new tokens of each prompt: its text, up to the first stop string.

        With one of the last three flags it is a mapping instead, with `text`, `token_ids`, `finish_reason` and, as
        asked for, `logits` [tokens, vocab], the model's own in front of each of `token_ids`, and `probs` of the same
        shape, which are those at `temperature`, before filters (at 1 if greedy). With `compute_gradients` they are
        tensors with gradients instead of float32 arrays, and `logprobs` [tokens] of the model are there too.
        `do_sample=False` is greedy. `options` are further fields of `SamplingParams`, such as `seed`. Raises
        `RequestError`, and whatever a request raises.
        """
        options |= {} if stop_strings is None else {"stop": stop_strings}
        filters = {"top_k": 0 if top_k is None else top_k, "top_p": 1.0 if top_p is None else top_p}
        sampling = {"temperature": temperature, "do_sample": do_sample, **filters}
        result = self._loaded().generate(prompts, max_new_tokens=max_length, **sampling, **options)
        if not (return_logits or return_probs or compute_gradients):
            return _like(prompts, result.texts)
        heat = temperature if do_sample and temperature > 0 else 1.0
        details = _Details(return_logits, return_probs, compute_gradients, heat)
        return _like(prompts, self._detailed(result, details))

    def get_logits(self, prompts: Prompts, responses: Responses, compute_gradients: bool = False) -> Any:
        """The model's own logits in front of each token of a response, [tokens, vocab], without those of the prompt.

        float32 arrays; with `compute_gradients`, tensors whose `backward()` reaches the parameters of the model.
        A response's text is encoded by itself, without special tokens; token ids are accepted. Raises `RequestError`.
        """
        return _like(prompts, self._scores(prompts, responses, True, compute_gradients))

    def get_logprobs(self, prompts: Prompts, responses: Responses, compute_gradients: bool = False) -> Any:
        """The model's log probability of each token of a response, [tokens]; otherwise as `get_logits`."""
        return _like(prompts, self._scores(prompts, responses, False, compute_gradients))

    def get_probabilities(self, prompts: Prompts, responses: Responses, temperature: float = 1.0) -> Any:
        """The probability of every token of the vocabulary in front of each token of a response, [tokens, vocab].

        float32, of the model at a temperature above 0. Raises `RequestError`.
        """
        heat = real("temperature", temperature, 1e-6, 1e6, "a number above 0")
        rows = self._nonempty(prompts, responses, self._loaded().adistributions)
        return _like(prompts, [_softmax(row, heat) for row in rows])

    def encode(self, text: str | Sequence[str]) -> Any:
        """Token ids of a text, without special tokens; of each text in a list."""
        if not isinstance(text, str):
            return [self.encode(each) for each in text]
        return run(self._tokenizing().tokenize(text, add_special_tokens=False)) if text else []

    def decode(self, token_ids: TokenIds | Sequence[TokenIds]) -> Any:
        """The text of token ids, without special tokens; of each list in a list."""
        if any(hasattr(plain(item), "__len__") for item in token_ids):
            return [self.decode(ids) for ids in token_ids]  # type: ignore[arg-type]
        ids: TokenIds = token_ids  # type: ignore[assignment]
        return run(self._tokenizing().detokenize(ids, skip_special_tokens=True)) if len(ids) else ""

    def get_tokenizer(self) -> Any:
        """The tokenizer, which two threads must not use at once."""
        return self._loaded().tokenizer

    @property
    def backend(self) -> EngineBackend:
        """What runs the model, with its `engine` and, if it is one of this process, its `model`; loads it."""
        return self._loaded()

    def __repr__(self) -> str:
        return f"<BaseBackend over {self.config.backend_type}, {'loaded' if self.is_loaded() else 'not loaded'}>"

    def _loaded(self) -> EngineBackend:
        with self._loading:
            if self._backend is None:
                self._backend = self.config.backend_config.open(self.config.model_name)
            return self._backend

    def _tokenizing(self) -> Tokenizing:
        engine = self._loaded().engine
        if not isinstance(engine, Tokenizing):
            raise RequestError(f"{self.config.backend_type} has no tokenizer")
        return engine

    def _scores(self, prompts: Prompts, responses: Responses, logits: bool, gradients: bool) -> list[Any]:
        """One array of each response, or one tensor with gradients."""
        backend = self._loaded()
        score = backend.ascore_with_gradients if gradients else backend.ascore
        return self._nonempty(prompts, responses, partial(score, logits=logits))

    def _nonempty(self, prompts: Prompts, responses: Responses, score: Callable[..., Any]) -> list[Any]:
        """What `score` returns, also of empty responses."""
        completions = as_responses(responses)
        # An empty response has no tokens to score: that of another one tells how wide its rows are.
        scored = [response if len(response) else [0] for response in completions]
        rows: list[Any] = run(score(prompts, scored))
        pairs: list[tuple[Any, Completion]] = list(zip(rows, completions, strict=True))
        return [row if len(response) else row[:0] for row, response in pairs]

    def _detailed(self, result: GenerationResult, details: _Details) -> list[dict[str, Any]]:
        pairs: tuple[Any, Any] = result.metadata["prompt_token_ids"], result.token_ids
        reasons = result.metadata["finish_reasons"]
        texts, ids = result.texts, result.token_ids
        columns: dict[str, Sequence[Any]] = {"text": texts, "token_ids": ids, "finish_reason": reasons}
        if details.logits or details.probs:
            has_logits = details.logits or details.gradients
            rows = (
                self._scores(*pairs, True, details.gradients)
                if has_logits
                else self._nonempty(*pairs, self._loaded().adistributions)
            )
            columns |= {"logits": rows} if details.logits else {}
            columns |= {"probs": [_softmax(row, details.temperature) for row in rows]} if details.probs else {}
        if details.gradients:
            columns["logprobs"] = self._scores(*pairs, False, True)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _like(prompts: Prompts, values: list[Any]) -> Any:
    """The values as a list, or the only one if the prompts were a single one and no list."""
    batch = as_batch(prompts)
    is_single = len(batch) == 1 and batch[0] is prompts  # a list never holds itself
    return values[0] if is_single and len(values) == 1 else values


def _softmax(logits: Any, temperature: float) -> Any:
    """The probabilities [tokens, vocab] of logits, as a tensor or a float32 array as these are."""
    if hasattr(logits, "softmax"):
        return (logits / temperature).softmax(-1)
    import numpy as np

    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(-1, keepdims=True))
    return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)
