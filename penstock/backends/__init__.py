"""Other engines behind the `Engine` protocol, and clients of inference services."""

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
    "EngineServiceHolder",
    "InferenceServiceClient",
    "OpenAIInferenceServiceClient",
    "RemoteApiInferenceServiceClient",
    "ServiceHolder",
    "TinkerServiceHolder",
    "WeaverServiceHolder",
    "WeightSyncController",
    "create_inference_service_client",
    "hf_tokenizer",
    "set_pad_token_id",
]
