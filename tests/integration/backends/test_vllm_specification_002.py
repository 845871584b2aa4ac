"""The snippets of the specification of backends on real vLLM, as they are written but for imports, model and engine.

Where a snippet says `huggingface`, vLLM stands; numbers like 002-7 are the rows of the requirements checklist.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock
from penstock import RequestError
from penstock.backends import BaseBackend, create_backend
from tests import specification_002 as specification
from tests.integration.backends.vllm_engines import MODEL, RunningLLM, backends_over, needs_vllm

pytestmark = needs_vllm

HERE = {
    '"gpt2"': repr(MODEL),
    '"huggingface"': '"vllm"',
    "huggingface_default": "vllm_default",
    '"device": "cuda"': "",
}
VOCAB_SIZE = 4096


@pytest.fixture(autouse=True)
def _shared(llm_with_logits: RunningLLM) -> Iterator[None]:
    with backends_over(llm_with_logits):
        yield


@pytest.fixture
def backend() -> Iterator[BaseBackend]:
    made = create_backend({"backend_type": "vllm", "model_name": MODEL})
    yield made
    made.close()


def run(snippet: str, **names: Any) -> dict[str, Any]:
    names = specification.run(snippet, HERE, **names)
    for made in [value for value in names.values() if isinstance(value, BaseBackend)]:
        assert made.config.backend_type == "vllm"
    return names


@pytest.mark.parametrize("snippet", [specification.CREATE, specification.TEXTS], ids=["create", "texts"])
def test_a_backend_is_made_from_a_dict_and_generates(snippet: str) -> None:
    """002-7, 002-28, 002-39."""
    names = run(snippet)
    assert names["backend"].is_loaded()
    assert isinstance(names["response"], str)
    assert names["printed"] == [names["response"], *([names["responses"]] if "responses" in names else [])]
    assert [type(text) for text in names.get("responses", ["", ""])] == [str, str]
    names["backend"].close()


@pytest.mark.parametrize("snippet", [specification.FROM_FILE, specification.DEFAULTS], ids=["load", "defaults"])
def test_a_backend_is_made_from_a_shipped_file(snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """002-8, 002-10, 002-25."""
    monkeypatch.chdir(Path(penstock.__file__).parents[1])
    names = run(snippet)
    assert names["backend"].is_loaded() == (snippet is specification.FROM_FILE)
    names["backend"].close()


def test_a_backend_is_made_from_the_section_of_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """002-11."""
    (tmp_path / "exp").mkdir()
    section = {"backend_type": "vllm", "model_name": MODEL}
    (tmp_path / "exp/experiment_config.yaml").write_text(json.dumps({"backend": section}))
    monkeypatch.chdir(tmp_path)
    names = run(specification.FROM_EXPERIMENT)
    assert names["backend"].is_loaded()
    names["backend"].close()


def test_the_snippets_of_generation(backend: BaseBackend) -> None:
    """002-31 to 002-35."""
    noting = specification.Noting(backend)
    run(specification.PARAMETERS, backend=noting)
    sampled, greedy, stopped = noting.results
    assert isinstance(sampled, str)
    assert greedy == backend.generate("The answer is", max_length=50, temperature=0)
    assert "\n\n" not in stopped


def test_the_snippet_of_logits(backend: BaseBackend) -> None:
    """002-36, 002-40, 002-42."""
    names = run(specification.LOGITS, backend=backend)
    result = names["result"]
    assert names["printed"] == [result["text"], (len(result["token_ids"]), VOCAB_SIZE)]
    shape = (len(backend.encode("Paris")), VOCAB_SIZE)
    assert names["logits"].shape == names["probs"].shape == shape
    np.testing.assert_allclose(names["probs"].sum(-1), 1, atol=1e-5)


def test_the_snippet_of_tokens(backend: BaseBackend) -> None:
    """002-43 to 002-45: the ids are those of this model."""
    ids = backend.encode("Hello, world!")
    names = run(specification.TOKENS.replace("[15496, 11, 995, 0]", str(ids)), backend=backend)
    assert names["printed"] == [ids, "Hello, world!"]
    assert names["texts"] == ["Hello", "World"]


def test_the_snippet_of_gradients_is_refused(backend: BaseBackend) -> None:
    """002-38, 002-41."""
    with pytest.raises(RequestError, match="computes no gradients: use the huggingface backend"):
        run(specification.GRADIENTS, backend=backend)


def test_the_same_program_runs_on_both_engines() -> None:
    """002-3, 002-5, 002-19."""
    here = {'"gpt2"': repr(MODEL), '"cuda"': '"cpu", "torch_dtype": "float32"'}
    names = specification.run(specification.SWITCHING, here, create_backend=create_backend)
    backends = [names[name] for name in ("hf_backend", "vllm_backend")]
    assert [made.config.backend_type for made in backends] == ["huggingface", "vllm"]
    assert [type(names[name]) for name in ("response1", "response2")] == [str, str]
    greedy = [made.generate("Hello", max_length=12, do_sample=False) for made in backends]
    assert greedy[0] == greedy[1]
    for made in backends:
        made.close()
