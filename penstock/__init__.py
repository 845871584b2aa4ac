"""Penstock: an LLM inference engine that lives inside your asyncio program.

The names below are the public interface. Importing them loads no model library and changes no global state; PyTorch
and transformers are imported when the first engine loads a model.
"""

__version__ = "0.1.0"

import typing

from penstock.api.channel import RequestStatus
from penstock.api.handle import RequestHandle
from penstock.api.inference_request import InferenceRequest
from penstock.api.logprob_report import LogprobReport
from penstock.api.prompt import Prompt
from penstock.api.protocols import Embedder, Engine, Scorer, Trainable, WithAdapters
from penstock.api.stats import EngineStats
from penstock.config import BatchingStrategy, EngineConfig, EngineSettings
from penstock.engine.inference import InferenceEngine
from penstock.errors import (
    ConfigurationError,
    DeadlineExceeded,
    EngineClosed,
    EngineOverloaded,
    EngineStateError,
    ExecutionError,
    GrammarError,
    OutOfMemory,
    PackageMissing,
    PenstockError,
    RequestAborted,
    RequestError,
    RequestTooLarge,
    WeightsError,
)
from penstock.facades.async_llm import AsyncEngineArgs, AsyncLLMEngine
from penstock.facades.controller import AdaptiveInferenceController
from penstock.facades.decoders import ParallelSampler, SpeculativeDecoder
from penstock.facades.llm import LLM
from penstock.facades.optimizer import PerformanceOptimizer
from penstock.generation import GenerationConfig, Params
from penstock.models.scripted import ScriptedModel
from penstock.optimizers.levels import OptimizationConfig, OptimizationLevel
from penstock.optimizers.rewrites.memory_pool import MemoryPool
from penstock.outputs import CompletionOutput, Delta, EmbeddingOutput, Logprob, RequestMetrics, RequestOutput
from penstock.sampling import OutputKind, RequestPriority, SamplingParams
from penstock.scheduling.advisor import BatchingOptimizer
from penstock.scheduling.batching import BatchingConfig, ContinuousBatcher, DynamicBatcher
from penstock.scheduling.bucketing import SequenceBucketer, calculate_padding_efficiency, create_padded_batch
from penstock.scheduling.estimator import MemoryEstimator
from penstock.scores import Score
from penstock.sequence import FinishReason
from penstock.structured_outputs import StructuredOutputs

if typing.TYPE_CHECKING:
    from penstock.engine.replicas.engine import ReplicatedEngine
    from penstock.tools.conversation import Conversation
    from penstock.tools.pieces import ToolCall
    from penstock.tools.tool_call_parser import ToolCallParser
    from penstock.training.backend import InferenceBackend
    from penstock.training.huggingface import HuggingFaceBackend
    from penstock.training.inference_module import InferenceModule, create_inference_module
    from penstock.training.results import GenerationResult
    from penstock.training.sglang import SGLangBackend
    from penstock.training.vllm import VLLMBackend

__all__ = [
    "LLM",
    "AdaptiveInferenceController",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "BatchingConfig",
    "BatchingOptimizer",
    "BatchingStrategy",
    "CompletionOutput",
    "ConfigurationError",
    "ContinuousBatcher",
    "Conversation",
    "DeadlineExceeded",
    "Delta",
    "DynamicBatcher",
    "Embedder",
    "EmbeddingOutput",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineOverloaded",
    "EngineSettings",
    "EngineStateError",
    "EngineStats",
    "ExecutionError",
    "FinishReason",
    "GenerationConfig",
    "GenerationResult",
    "GrammarError",
    "HuggingFaceBackend",
    "InferenceBackend",
    "InferenceEngine",
    "InferenceModule",
    "InferenceRequest",
    "Logprob",
    "LogprobReport",
    "MemoryEstimator",
    "MemoryPool",
    "OptimizationConfig",
    "OptimizationLevel",
    "OutOfMemory",
    "OutputKind",
    "PackageMissing",
    "ParallelSampler",
    "Params",
    "PenstockError",
    "PerformanceOptimizer",
    "Prompt",
    "ReplicatedEngine",
    "RequestAborted",
    "RequestError",
    "RequestHandle",
    "RequestMetrics",
    "RequestOutput",
    "RequestPriority",
    "RequestStatus",
    "RequestTooLarge",
    "SGLangBackend",
    "SamplingParams",
    "Score",
    "Scorer",
    "ScriptedModel",
    "SequenceBucketer",
    "SpeculativeDecoder",
    "StructuredOutputs",
    "ToolCall",
    "ToolCallParser",
    "Trainable",
    "VLLMBackend",
    "WeightsError",
    "WithAdapters",
    "__version__",
    "calculate_padding_efficiency",
    "create_inference_module",
    "create_padded_batch",
]

# Imported when first asked for, so that programs which only generate do not wait for them.
_LATER = {
    "ReplicatedEngine": "penstock.engine.replicas.engine",
    "Conversation": "penstock.tools.conversation",
    "ToolCall": "penstock.tools.pieces",
    "ToolCallParser": "penstock.tools.tool_call_parser",
    "InferenceBackend": "penstock.training.backend",
    "HuggingFaceBackend": "penstock.training.huggingface",
    "InferenceModule": "penstock.training.inference_module",
    "create_inference_module": "penstock.training.inference_module",
    "GenerationResult": "penstock.training.results",
    "SGLangBackend": "penstock.training.sglang",
    "VLLMBackend": "penstock.training.vllm",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
