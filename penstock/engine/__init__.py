"""The async engine: public face, step loop, request handle, text in and out, sync facade.

Importing it is light: torch and transformers are imported when a model is loaded.
"""

from penstock.engine.async_llm import AsyncEngineArgs, AsyncLLMEngine
from penstock.engine.channel import RequestStatus
from penstock.engine.handle import RequestHandle
from penstock.engine.inference import InferenceEngine
from penstock.engine.llm import LLM
from penstock.engine.optimizer import PerformanceOptimizer

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "InferenceEngine",
    "PerformanceOptimizer",
    "RequestHandle",
    "RequestStatus",
]
