"""Service clients for rollout workers, the holders behind them, and the weight sync of both.

`docs/service_clients.md` shows how they fit together. Importing this loads no SDK; each is imported where it is used.
"""

from penstock.backends.services.client import InferenceServiceClient
from penstock.backends.services.creation import create_inference_service_client
from penstock.backends.services.engine_holder import EngineServiceHolder
from penstock.backends.services.hf_tokenizer import hf_tokenizer, set_pad_token_id
from penstock.backends.services.holder import Sample, Sampling, ServiceHolder
from penstock.backends.services.openai_client import OpenAIInferenceServiceClient
from penstock.backends.services.openai_style import ChatCompletionsWrapper, ChatWrapper, CompletionsWrapper
from penstock.backends.services.records import TrainRecord
from penstock.backends.services.remote_client import RemoteApiInferenceServiceClient
from penstock.backends.services.tinker_holder import TinkerServiceHolder
from penstock.backends.services.weaver_holder import WeaverServiceHolder
from penstock.backends.services.weight_sync import SyncSettings, WeightSyncController, WeightUpdate
from penstock.backends.services.weight_updates import disk_update, holder_update, network_update

__all__ = [
    "ChatCompletionsWrapper",
    "ChatWrapper",
    "CompletionsWrapper",
    "EngineServiceHolder",
    "InferenceServiceClient",
    "OpenAIInferenceServiceClient",
    "RemoteApiInferenceServiceClient",
    "Sample",
    "Sampling",
    "ServiceHolder",
    "SyncSettings",
    "TinkerServiceHolder",
    "TrainRecord",
    "WeaverServiceHolder",
    "WeightSyncController",
    "WeightUpdate",
    "create_inference_service_client",
    "disk_update",
    "hf_tokenizer",
    "holder_update",
    "network_update",
    "set_pad_token_id",
]
