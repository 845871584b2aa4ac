"""`create_inference_service_client`: the client that `inference_service.backend` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.backends.services.client import InferenceServiceClient
from penstock.backends.services.openai_client import OpenAIInferenceServiceClient
from penstock.backends.services.remote_client import RemoteApiInferenceServiceClient
from penstock.backends.services.service_config import read_config
from penstock.errors import ConfigurationError, shown

_CLIENTS: Mapping[str, type[OpenAIInferenceServiceClient] | type[RemoteApiInferenceServiceClient]] = {
    **dict.fromkeys(("openai", "vllm", "sglang"), OpenAIInferenceServiceClient),
    **dict.fromkeys(("tinker", "weaver"), RemoteApiInferenceServiceClient),
}


def create_inference_service_client(config: Mapping[str, Any]) -> InferenceServiceClient:
    """The client for a config. Raises `ConfigurationError`."""
    backend = read_config(config).backend
    if backend not in _CLIENTS:
        raise ConfigurationError(f"backend must be one of {', '.join(_CLIENTS)}, not {shown(backend)}")
    return _CLIENTS[backend](config)
