"""For training what is served: `InferenceModule`, its backends, and their results.

Above the engines and written against their protocols; only `HuggingFaceBackend` makes one. Importing it does not import
torch.
"""

from penstock.training.backend import EngineBackend, InferenceBackend
from penstock.training.huggingface import HuggingFaceBackend
from penstock.training.inference_module import BACKENDS, InferenceModule, create_inference_module
from penstock.training.results import GenerationMetadata, GenerationResult

__all__ = [
    "BACKENDS",
    "EngineBackend",
    "GenerationMetadata",
    "GenerationResult",
    "HuggingFaceBackend",
    "InferenceBackend",
    "InferenceModule",
    "create_inference_module",
]
