"""`Server`: what all endpoints of one app share: the engine, the settings and what counts and limits calls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from anyio import to_thread

from penstock.api.protocols import Engine, Tokenizing, WithAdapters, WithDefaults
from penstock.demo import MODEL_DIR
from penstock.sampling import SamplingParams
from penstock.serving.auth import KeyRing
from penstock.serving.errors import HttpError
from penstock.serving.lifecycle import Lifecycle
from penstock.serving.logs import access_logger
from penstock.serving.metrics import Metrics
from penstock.serving.model_formats import ModelFormats, formats_of
from penstock.serving.readiness import Readiness
from penstock.serving.responses.store import ResponseStore
from penstock.serving.settings import ServingSettings
from penstock.serving.tinker.service import TinkerService
from penstock.serving.tracing import Tracing


class Server:
    """The parts of one app. Raises `ConfigurationError` for a key that cannot be read."""

    def __init__(self, engine: Engine, settings: ServingSettings, tinker: TinkerService | None = None) -> None:
        self.engine = engine
        self.tinker = tinker
        self.settings = settings
        self.keys = KeyRing(settings)
        self.lifecycle = Lifecycle(settings.max_concurrent_requests)
        self.metrics = Metrics(engine, lambda: self.names[0])
        self.readiness = Readiness(settings.stall_s)
        self.tracing = Tracing(settings.tracing)
        self.log = access_logger()
        self.created = int(time.time())
        self._names = settings.served_model_name
        self._max_model_len: int | None = None
        self._formats = formats_of(engine, settings)  # refuses unknown formats now
        self._defaults: SamplingParams | None = None
        self._is_loaded = False
        self.responses = ResponseStore(settings.max_stored_responses, settings.max_stored_bytes)

    async def load(self) -> None:
        """Wait until the engine is loaded, and learn what it serves. Called before every request that generates."""
        if self._is_loaded:
            return
        await to_thread.run_sync(self.engine.start)
        self._formats = formats_of(self.engine, self.settings)
        if isinstance(self.engine, WithDefaults):
            self._defaults = _sampled(self.engine.default_params())
        self._is_loaded = True

    @property
    def defaults(self) -> SamplingParams | None:
        """The model's own parameters, for what a request does not give; at temperature 1 if these would be greedy."""
        return self._defaults

    @property
    def names(self) -> tuple[str, ...]:
        """The model's names; the first is the principal one. Without a setting, that of its folder or hub id."""
        if not self._names:
            name = self.stats().get("model")
            if not isinstance(name, str) or not name:  # not loaded yet
                return ("penstock",)
            self._names = ("penstock-demo" if Path(name) == MODEL_DIR else Path(name).name,)
        return self._names

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters, under which these are served; without those that the model has itself.

        Adapters of the Tinker service belong to its sessions alone.
        """
        loaded = self.engine.adapters if isinstance(self.engine, WithAdapters) else []
        private = () if self.tinker is None else self.tinker.adapters
        return [name for name in loaded if name not in self.names and name not in private]

    def adapter_of(self, model: str) -> str:
        """The adapter that a model's name stands for; "" for the model itself."""
        return "" if model in self.names else model

    @property
    def formats(self) -> ModelFormats:
        """How the model writes tool calls and reasoning."""
        return self._formats

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence that the engine accepts; None if it does not say."""
        if self._max_model_len is None:
            value = self.stats().get("max_sequence_length")
            self._max_model_len = value if isinstance(value, int) else None
        return self._max_model_len

    def check_model(self, name: str | None) -> str:
        """The name under which to answer; the principal one for None. Raises a 404 for an unknown one."""
        if name is None or name in self.names or name in self.adapters:
            return name or self.names[0]
        text = f"The model `{name[:200]}` does not exist: this server has {', '.join([*self.names, *self.adapters])}"
        raise HttpError(404, text, code="model_not_found", param="model")

    async def text_of(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids; none if the engine does not tokenize."""
        if not isinstance(self.engine, Tokenizing):
            return ""
        return await self.engine.detokenize(ids, skip_special_tokens=skip_special_tokens)

    async def num_tokens(self, text: str) -> int:
        """The number of tokens of a text; 0 if the engine does not tokenize."""
        if not text or not isinstance(self.engine, Tokenizing):
            return 0
        return len(await self.engine.tokenize({"prompt": text}, add_special_tokens=False))

    def stats(self) -> Mapping[str, object]:
        """The engine's statistics."""
        return self.engine.get_stats()


def _sampled(params: SamplingParams) -> SamplingParams:
    """Parameters that sample, which clients of these APIs expect of a request without a temperature.

    A generation config is greedy unless it says `do_sample`. That is transformers' rule, which in-process calls keep.
    """
    return params if params.temperature or params.use_beam_search else replace(params, temperature=1.0)
