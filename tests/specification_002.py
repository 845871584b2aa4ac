"""The snippets of the specification of backends, as they are written there, for tests that run them over any backend.

Numbers like 002-7 in the tests are the rows of the requirements checklist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CREATE = """
from rl_onoff.backends import create_backend

# Create backend from dict
backend = create_backend({
    "backend_type": "huggingface",
    "model_name": "gpt2",
    "backend_specific": {
        "device": "cuda"
    }
})

# Load the model
backend.load()

# Generate text
response = backend.generate("The future of AI is")
print(response)
"""

FROM_FILE = """
from rl_onoff.backends.config import BackendConfig
from rl_onoff.backends import create_backend

# Load config from file
config = BackendConfig.from_file("rl_onoff/backends/configs/huggingface_default.yaml")
backend = create_backend(config)
backend.load()
"""

FROM_EXPERIMENT = """
import yaml
from rl_onoff.backends import create_backend

# Load experiment config
with open("exp/experiment_config.yaml") as f:
    exp_config = yaml.safe_load(f)

# Get backend config section
backend_config_dict = exp_config.get("backend", {})

# Create backend - it automatically handles the backend type
backend = create_backend(backend_config_dict)
backend.load()
"""

TEXTS = """
from rl_onoff.backends import create_backend

backend = create_backend({
    "backend_type": "huggingface",
    "model_name": "gpt2",
    "backend_specific": {"device": "cuda"}
})
backend.load()

# Single prompt
response = backend.generate("The capital of France is")
print(response)

# Multiple prompts
responses = backend.generate([
    "The capital of France is",
    "The capital of Germany is"
])
print(responses)
"""

PARAMETERS = r"""
# Sampling with temperature and top-k
response = backend.generate(
    "Once upon a time",
    max_length=100,
    temperature=0.8,
    top_k=50,
    top_p=0.9,
    do_sample=True
)

# Greedy decoding
response = backend.generate(
    "The answer is",
    max_length=50,
    do_sample=False
)

# With stop strings
response = backend.generate(
    "Write a story:",
    max_length=200,
    stop_strings=["\n\n", "THE END"]
)
"""

LOGITS = """
# Get logits during generation
result = backend.generate(
    "The capital of France is",
    max_length=10,
    return_logits=True
)
print(result["text"])  # Generated text
print(result["logits"].shape)  # (num_tokens, vocab_size)

# Get logits for existing text
prompt = "The capital of France is"
response = "Paris"
logits = backend.get_logits(prompt, response)
# Shape: (len(response_tokens), vocab_size)

# Get probabilities
probs = backend.get_probabilities(prompt, response, temperature=1.0)
# Shape: (len(response_tokens), vocab_size)
"""

TOKENS = """
# Encode text to token IDs
token_ids = backend.encode("Hello, world!")
print(token_ids)  # [15496, 11, 995, 0]

# Decode token IDs to text
text = backend.decode([15496, 11, 995, 0])
print(text)  # "Hello, world!"

# Batch operations
token_ids_list = backend.encode(["Hello", "World"])
texts = backend.decode(token_ids_list)
"""

SWITCHING = """
# HuggingFace backend
hf_backend = create_backend({
    "backend_type": "huggingface",
    "model_name": "gpt2",
    "backend_specific": {"device": "cuda"}
})

# vLLM backend (same API)
vllm_backend = create_backend({
    "backend_type": "vllm",
    "model_name": "gpt2",
    "backend_specific": {"tensor_parallel_size": 1}
})

# Both backends work the same way
response1 = hf_backend.generate("Hello")
response2 = vllm_backend.generate("Hello")
"""

DEVICE_MAP = """
backend = create_backend({
    "backend_type": "huggingface",
    "model_name": "gpt2",
    "backend_specific": {
        "device_map": "auto"  # Automatically distributes layers across GPUs
    }
})
backend.load()
"""

HYBRID = """
# Example: 8 GPUs, tp_size=2 → 4 replicas, 2 GPUs per replica
backend = create_backend({
    "backend_type": "huggingface",
    "model_name": "gpt2",
    "backend_specific": {
        "tp_size": 2  # Tensor parallelism size (GPUs per replica)
        # Number of replicas = 8 / 2 = 4
    }
})
backend.load()
"""

GRADIENTS = """
# Generate with gradients enabled
result = backend.generate(
    "The capital of France is",
    max_length=10,
    compute_gradients=True
)

# Get logits with gradients enabled
logits = backend.get_logits(
    "The capital of France is",
    "Paris",
    compute_gradients=True
)
# Now you can compute loss and call .backward() on the logits
"""

VLLM_PARALLEL = """
backend = create_backend({
    "backend_type": "vllm",
    "model_name": "gpt2",
    "backend_specific": {
        "tensor_parallel_size": 2  # Use 2 GPUs
    }
})
backend.load()
"""

SGLANG_PARALLEL = """
backend = create_backend({
    "backend_type": "sglang",
    "model_name": "gpt2",
    "backend_specific": {
        "tp_size": 2  # Use 2 GPUs
    }
})
backend.load()
"""

DEFAULTS = """
from rl_onoff.backends.config import BackendConfig
from rl_onoff.backends import create_backend

config = BackendConfig.from_file("rl_onoff/backends/configs/huggingface_default.yaml")
backend = create_backend(config)
"""

HUGGINGFACE_YAML = """
backend_type: "huggingface"
model_name: "gpt2"
backend_specific:
  device: "cuda"  # "cpu", "cuda", "cuda:0", etc. (null = auto-detect)
  torch_dtype: "float16"  # "float32", "float16", "bfloat16" (null = auto)
  device_map: "auto"  # "auto", "balanced", etc. (null = use device)
  tp_size: 2  # Tensor parallelism size (GPUs per replica). Number of replicas = num_gpus / tp_size
"""

VLLM_YAML = """
backend_type: "vllm"
model_name: "gpt2"
backend_specific:
  tensor_parallel_size: 2  # Number of GPUs for tensor parallelism (null = 1)
  gpu_memory_utilization: 0.9  # GPU memory utilization (null = 0.9)
  max_model_len: 2048  # Maximum model length (null = auto)
"""

SGLANG_YAML = """
backend_type: "sglang"
model_name: "gpt2"
backend_specific:
  tp_size: 2  # Tensor parallelism size (null = 1)
  mem_fraction_static: 0.85  # Memory fraction for static allocation (null = 0.85)
  context_length: 2048  # Context length (null = auto)
"""


def run(snippet: str, here: Mapping[str, str], **names: Any) -> dict[str, Any]:
    """Run a snippet with the package's name and what `here` replaces (model, device); all names that are then defined.

    `print` is replaced by one that notes what is printed, under `printed`.
    """
    for old, new in {"rl_onoff": "penstock", **here}.items():
        snippet = snippet.replace(old, new)
    printed: list[Any] = []
    names |= {"printed": printed, "print": printed.append}
    exec(snippet, names)
    return names


class Noting:
    """A backend that also keeps the result of each `generate`, since snippets give several of them one name."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.results: list[Any] = []

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """What the backend generates."""
        self.results.append(self._backend.generate(*arguments, **options))
        return self.results[-1]
