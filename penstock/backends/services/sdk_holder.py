"""`SdkServiceHolder`: what the holders of training services share: their clients, and the path that is sampled."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from penstock.api.prompt import Prompt, read_ids
from penstock.backends.services.hf_tokenizer import Tokenizer, shared_tokenizer
from penstock.backends.services.holder import ServiceHolder
from penstock.errors import ConfigurationError, EngineOverloaded, ExecutionError, PenstockError, RequestError, described

Client = Any  # an object of an SDK, which has no common type with those of the other


class SdkServiceHolder(ServiceHolder):
    """Clients of one service. They are made on first use; the training client only where something is trained."""

    def __init__(self, base_model: str, tokenizer_path: str | None) -> None:
        self.base_model = base_model
        self._tokenizer_path = tokenizer_path
        self._tokenizer: Tokenizer | None = None
        self._service: Client = None
        self._training: Client = None
        self._sampling: Client = None
        self._path: str | None = None
        self._lock = threading.RLock()

    @abstractmethod
    def _new_service(self) -> Client:
        """Connect."""

    @abstractmethod
    def _end(self, service: Client) -> None:
        """Disconnect."""

    @abstractmethod
    def _new_training(self, service: Client) -> Client:
        """A client that trains an adapter of the base model."""

    @abstractmethod
    def _new_sampling(self, service: Client, path: str | None) -> Client:
        """A client that samples with the weights at this path; None is the base model."""

    def get_service_client(self) -> Client:
        """The client of the service."""
        with self._lock:
            if self._service is None:
                self._service = self._new_service()
            return self._service

    def get_training_client(self) -> Client:
        """The client that trains. Raises `ConfigurationError` without a base model."""
        with self._lock:
            if self._training is None:
                if not self.base_model:
                    raise ConfigurationError("base_model is missing: name the model to train")
                self._training = self._new_training(self.get_service_client())
            return self._training

    def get_sampling_client(self) -> Client:
        """The client that samples, with the weights of the last `update_sampling_client`."""
        with self._lock:
            if self._sampling is None:
                self.update_sampling_client()
            return self._sampling

    def get_current_sampling_path(self) -> str | None:
        """The path of the weights that `update_sampling_client` changes to; None is the base model."""
        return self._path

    def set_current_sampling_path(self, path: str | None) -> None:
        """Sample with these weights from the next `update_sampling_client` on."""
        self._path = path

    def update_sampling_client(self) -> None:
        """Change to the current path. Samples under way keep their weights."""
        with self._lock:
            if self._path is None and not self.base_model:
                raise ConfigurationError("there is nothing to sample from: pass base_model, or set a sampling path")
            self._sampling = self._new_sampling(self.get_service_client(), self._path)

    def close(self) -> None:
        """End the session; the service then frees the models that it made. A later call begins another."""
        with self._lock:
            service, self._service, self._training, self._sampling = self._service, None, None, None
        if service is not None:
            self._end(service)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer at `tokenizer_path`, or else the one that the service names."""
        with self._lock:
            if self._tokenizer is None:
                path = self._tokenizer_path
                self._tokenizer = shared_tokenizer(path) if path else self._service_tokenizer()
            return self._tokenizer

    @abstractmethod
    def _service_tokenizer(self) -> Tokenizer:
        """The tokenizer that the service names."""

    def _ids_of(self, prompt: Prompt) -> list[int]:
        """The ids to send, which are therefore those of the engine."""
        return read_ids(self.get_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt)


@contextmanager
def sdk_errors(service: str) -> Iterator[None]:
    """The package's errors for those of an SDK, which retries by itself."""
    try:
        yield
    except (PenstockError, ImportError):
        raise
    except Exception as error:
        status = getattr(error, "status_code", None)
        if status == 429:
            raise EngineOverloaded(f"{service} is overloaded: {described(error)}") from error
        is_callers = getattr(error, "category", None) == "user"  # Tinker's word for requests that failed later
        if is_callers or isinstance(error, ValueError) or (isinstance(status, int) and 400 <= status < 500):
            raise RequestError(f"{service} refused the request: {described(error)}") from error
        raise ExecutionError(f"{service} failed: {described(error)}") from error
