"""Other engines behind the `Engine` protocol, one interface to all (`create_backend`), and clients of services."""

from penstock.backends.base import BaseBackend, create_backend
from penstock.backends.config import (
    BackendConfig,
    HuggingFaceBackendConfig,
    SGLangBackendConfig,
    VLLMBackendConfig,
)
from penstock.backends.services import (
    EngineServiceHolder,
    InferenceServiceClient,
    OpenAIInferenceServiceClient,
    RemoteApiInferenceServiceClient,
    ServiceHolder,
    TinkerServiceHolder,
    WeaverServiceHolder,
    WeightSyncController,
    create_inference_service_client,
    hf_tokenizer,
    set_pad_token_id,
)

__all__ = [
    "BackendConfig",
    "BaseBackend",
    "EngineServiceHolder",
    "HuggingFaceBackendConfig",
    "InferenceServiceClient",
    "OpenAIInferenceServiceClient",
    "RemoteApiInferenceServiceClient",
    "SGLangBackendConfig",
    "ServiceHolder",
    "TinkerServiceHolder",
    "VLLMBackendConfig",
    "WeaverServiceHolder",
    "WeightSyncController",
    "create_backend",
    "create_inference_service_client",
    "hf_tokenizer",
    "set_pad_token_id",
]
