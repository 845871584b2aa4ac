"""For training what is served: `InferenceModule`, its backends, and their results.

Above the engines and written against their protocols; only `HuggingFaceBackend`, `VLLMBackend` and `SGLangBackend`
make one. Importing it does not import torch.
"""

from penstock.training.backend import EngineBackend, InferenceBackend
from penstock.training.huggingface import HuggingFaceBackend
from penstock.training.inference_module import BACKENDS, InferenceModule, create_inference_module
from penstock.training.results import GenerationMetadata, GenerationResult
from penstock.training.sglang import SGLangBackend
from penstock.training.vllm import VLLMBackend

__all__ = [
    "BACKENDS",
    "EngineBackend",
    "GenerationMetadata",
    "GenerationResult",
    "HuggingFaceBackend",
    "InferenceBackend",
    "InferenceModule",
    "SGLangBackend",
    "VLLMBackend",
    "create_inference_module",
]
