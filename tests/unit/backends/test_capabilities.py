"""What each engine can do, asked of the engines themselves; the table of docs/backends.md is its result.

`python tests/unit/backends/test_capabilities.py` writes the table anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from penstock import InferenceEngine, ReplicatedEngine, RequestError, SamplingParams, StructuredOutputs
from penstock.api.prompt import read_prompt
from penstock.backends.openai_engine import OpenAIEngine
from penstock.backends.openai_request import request_body
from penstock.backends.sglang_engine import SGLangEngine
from penstock.backends.sglang_params import check_params as check_sglang_params
from penstock.backends.tinker_engine import TinkerEngine, sampling_params_of
from penstock.backends.vllm_engine import VLLMEngine
from penstock.backends.vllm_params import check_params

DOCUMENT = Path(__file__).parents[3] / "docs" / "backends.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->"
METHODS = {
    "generate": "generate, abort, deadlines",
    "score": "score",
    "tokenize": "tokenize, detokenize",
    "default_params": "the model's own parameters",
    "embed": "embed",
    "fork": "fork a running request",
    "reset_prefix_cache": "reset_prefix_cache",
    "pause": "pause, resume",
    "update_weights": "update_weights",
    "updating": "updating (a block in which weights change in place)",
    "sleep": "sleep, wake",
    "load_adapter": "load_adapter, unload_adapter",
}
# A value for every parameter that is not its default.
VALUES: dict[str, Any] = {
    **{"n": 2, "best_of": 2, "temperature": 0.7, "top_p": 0.5, "top_k": 5, "min_p": 0.1},
    **{"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.1, "logit_bias": {3: 1.0}},
    **{"allowed_token_ids": [3], "bad_words": ["no"], "logits_processors": [lambda ids, logits: logits]},
    **{"min_tokens": 2, "max_tokens": 5, "stop": ["x"], "stop_token_ids": [3], "ignore_eos": True, "seed": 3},
    **{"include_stop_str_in_output": True, "logprobs": 2, "prompt_logprobs": 2, "detokenize": False},
    **{"skip_special_tokens": False, "spaces_between_special_tokens": False, "output_kind": "delta"},
    **{"rank_by": "consensus", "use_beam_search": True, "length_penalty": 2.0, "early_stopping": True},
    **{"speculation_length": 2, "structured_outputs": StructuredOutputs(choice=["a"]), "reasoning_end": "</think>"},
    **{"suppress_tokens": [3], "begin_suppress_tokens": [3], "min_new_tokens": 2, "no_repeat_ngram_size": 2},
    **{"sequence_bias": {(3,): 1.0}, "exponential_decay_length_penalty": (3, 1.5), "forced_bos_token_id": 3},
    **{"forced_eos_token_id": 3, "renormalize_logits": True, "top_h": 0.5, "typical_p": 0.5},
    **{"epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
}
BESIDE: dict[str, dict[str, Any]] = {"use_beam_search": {"n": 2, "temperature": 0}}  # what a value needs
ENGINES: dict[str, tuple[type, Callable[[SamplingParams], object]]] = {
    "native": (InferenceEngine, lambda params: None),
    "native replicas": (ReplicatedEngine, lambda params: None),
    "vLLM": (VLLMEngine, check_params),
    "SGLang": (SGLangEngine, check_sglang_params),
    "OpenAI-compatible": (OpenAIEngine, lambda params: request_body(read_prompt("x"), params)),
    "Tinker": (TinkerEngine, sampling_params_of),
}


def accepts(check: Callable[[SamplingParams], object], name: str) -> bool:
    """Whether an engine takes a parameter before anything runs."""
    try:
        check(SamplingParams(**{name: VALUES[name]} | BESIDE.get(name, {})))
    except RequestError:
        return False
    return True


def rows() -> Iterator[tuple[str, list[bool]]]:
    """What can be done, and which engine can; parameters that all engines take are one row."""
    for method, words in METHODS.items():
        yield words, [hasattr(engine, method) for engine, _ in ENGINES.values()]
    by_answer: dict[tuple[bool, ...], list[str]] = {}
    for name in VALUES:
        by_answer.setdefault(tuple(accepts(check, name) for _, check in ENGINES.values()), []).append(f"`{name}`")
    for answer, names in sorted(by_answer.items(), key=lambda item: -sum(item[0])):
        yield ", ".join(names), list(answer)


def table() -> str:
    """The table in Markdown."""
    lines = [f"| | {' | '.join(ENGINES)} |", f"|---|{'---|' * len(ENGINES)}"]
    lines += [f"| {words} | {' | '.join('yes' if can else 'no' for can in answer)} |" for words, answer in rows()]
    return "\n".join(lines) + "\n"


def test_every_parameter_is_asked_for() -> None:
    assert VALUES.keys() == {field.name for field in fields(SamplingParams) if field.init}


def test_the_table_in_the_documentation_is_what_the_engines_say() -> None:
    text = DOCUMENT.read_text()
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert written == table(), f"run: python {Path(__file__).relative_to(DOCUMENT.parents[1])}"


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table() + text[text.index(END) :])
