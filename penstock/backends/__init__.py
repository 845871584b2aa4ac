"""Other engines behind the `Engine` protocol, one interface to all (`create_backend`), and clients of services.

Importing this loads no other engine and no SDK; each is imported where it is used.
"""

from penstock.backends.base import BaseBackend, create_backend
from penstock.backends.config import (
    BackendConfig,
    HuggingFaceBackendConfig,
    SGLangBackendConfig,
    VLLMBackendConfig,
)
from penstock.backends.openai_engine import OpenAIEngine
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
from penstock.backends.sglang_engine import SGLangEngine
from penstock.backends.tinker_engine import TinkerEngine
from penstock.backends.vllm_engine import VLLMEngine

__all__ = [
    "BackendConfig",
    "BaseBackend",
    "EngineServiceHolder",
    "HuggingFaceBackendConfig",
    "InferenceServiceClient",
    "OpenAIEngine",
    "OpenAIInferenceServiceClient",
    "RemoteApiInferenceServiceClient",
    "SGLangBackendConfig",
    "SGLangEngine",
    "ServiceHolder",
    "TinkerEngine",
    "TinkerServiceHolder",
    "VLLMBackendConfig",
    "VLLMEngine",
    "WeaverServiceHolder",
    "WeightSyncController",
    "create_backend",
    "create_inference_service_client",
    "hf_tokenizer",
    "set_pad_token_id",
]
