"""Which tests prove what the specifications promise: the twenty proofs, and the rows of the requirements checklist."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.architecture.source import ROOT, functions

# What earlier implementations got wrong, and the tests that show it right here.
PROOFS: dict[str, list[str]] = {
    "1. the outputs of a batch of mixed lengths are those of one prompt at a time": [
        "unit/training/test_inference_module.py::test_batch_equals_one_prompt_at_a_time",
        "integration/test_specification_002.py::test_prompts_give_texts_of_new_tokens",
        "integration/test_handbook.py::test_a_batch_of_unequal_prompts_equals_one_by_one",
        "equivalence/test_generate.py::test_requests_in_a_batch_give_the_tokens_they_give_alone",
    ],
    "2. every request of a batch has its own parameters": [
        "integration/test_handbook.py::test_every_request_of_a_batch_has_its_own_parameters",
    ],
    "3. every row ends at its own end token": [
        "unit/training/test_inference_module.py::test_rows_end_where_the_model_ends_them",
        "integration/test_handbook.py::test_every_request_of_a_batch_has_its_own_parameters",
    ],
    "4. logits and log probabilities are those of a plain forward pass without padding": [
        "integration/test_specification_002.py::test_logits_and_probabilities_equal_a_plain_forward_pass",
        "unit/training/test_inference_module.py::test_scores_are_those_of_the_response_alone",
        "equivalence/test_scores.py::test_ragged_batches_are_scored_as_each_text_alone",
    ],
    "5. there are as many log probabilities as token ids, in records for training too": [
        "unit/training/test_inference_module.py::test_logprobs_and_logits_are_the_models_own_for_each_generated_token",
        "integration/backends/test_openai_service_client.py::test_the_record_holds_the_ids_of_the_engine",
        "integration/backends/test_openai_service_client.py::test_a_record_that_would_not_be_whole_is_an_error",
        "unit/backends/services/test_remote_client.py::test_a_record_that_would_not_be_whole_is_an_error",
    ],
    "6. probabilities use the temperature once": [
        "integration/test_specification_002.py::test_probabilities_are_tempered_once",
    ],
    "7. a failed request is failed, and whoever awaits it gets the error": [
        "integration/test_handbook.py::test_a_failed_request_is_failed_and_its_awaiter_raises",
    ],
    "8. an awaiter wakes although its loop is idle": [
        "integration/test_handbook.py::test_an_awaiter_wakes_although_its_loop_is_otherwise_idle",
    ],
    "9. a callback may call the engine": [
        "integration/test_handbook.py::test_the_callback_gets_the_result_once_and_may_call_the_engine",
    ],
    "10. a prompt or K/V that cannot fit is an error": [
        "integration/test_errors.py::test_a_prompt_that_can_never_fit_is_told_the_three_numbers",
        "integration/test_errors.py::test_a_prompt_larger_than_the_cache_is_refused_and_not_waited_for",
        "unit/scheduling/test_batching.py::test_what_never_fits_is_an_error_and_no_item_of_the_call_is_added",
    ],
    "11. repetitions send what the caller chose, and a 4xx is not repeated": [
        "integration/backends/test_openai_service_client.py::test_a_repetition_sends_what_the_caller_chose",
        "integration/backends/test_openai_service_client.py::test_what_the_server_refuses_is_not_repeated",
    ],
    "12. the remote client sends the values of the call, which do not get into the response": [
        "unit/backends/services/test_remote_client.py"
        "::test_values_of_a_call_go_before_those_of_the_config_and_the_response_is_not_touched",
    ],
    "13. an update of the weights may take longer than a minute, and no response mixes versions": [
        "integration/backends/test_openai_service_client.py::test_no_update_takes_too_long",
        "unit/backends/services/test_remote_client.py"
        "::test_no_response_mixes_weights_whatever_happens_to_clients_and_trainers",
        "unit/backends/services/test_weight_gate.py"
        "::test_no_interleaving_loses_a_wake_up_mixes_versions_or_leaves_a_waiter_behind",
    ],
    "14. the cache is an LRU whose keys differ, and forgets results of other weights": [
        "unit/training/test_inference_module.py::test_cache_drops_the_least_recently_used",
        "unit/training/test_inference_module.py::test_keys_are_structures",
        "unit/training/test_inference_module.py::test_results_of_other_weights_are_not_returned",
    ],
    "15. bare JSON and both styles of XML are calls, prose is none, and arguments nest": [
        "unit/tools/test_tool_call_parser.py::test_bare_json_is_a_call",
        "unit/tools/test_tool_call_parser.py::test_both_styles_of_markup_are_read_and_converted_by_schema",
        "unit/tools/test_output_parser.py::test_prose_with_parentheses_is_no_call",
        "unit/tools/test_output_parser.py::test_arguments_in_python_are_literals",
    ],
    "16. every snippet of the specifications runs": [
        "integration/test_specification_000.py::test_simple_generation",
        "integration/test_specification_001.py::test_the_usage_example",
        "integration/test_specification_002.py::test_the_snippets_of_generation",
        "integration/backends/test_vllm_specification_002.py::test_the_snippets_of_generation",
        "integration/test_lessons.py::test_the_strategies_run_side_by_side",
        "integration/test_lessons.py::test_gather_over_generate_works",
        "integration/test_handbook.py::test_every_recipe_constructs_and_serves",
        "integration/test_optimizer.py::test_the_optimizer_of_the_handbook_generates",
    ],
    "17. speculation changes neither greedy tokens nor the distribution": [
        "equivalence/test_speculation.py::test_greedy_tokens_are_the_same_with_every_drafter",
        "equivalence/test_speculation.py::test_sampled_tokens_are_the_same_and_so_are_their_logprobs",
        "equivalence/test_speculation.py::test_tokens_that_were_guessed_follow_the_demo_models_distribution",
    ],
    "18. a config comes back from its dict, and unknown keys are a ValueError": [
        "integration/test_specification_002.py::test_a_config_is_read_from_json_and_comes_back_from_a_dict",
        "integration/test_specification_002.py::test_a_wrong_config_is_refused_by_name",
    ],
    "19. gpt2 encodes `Hello, world!` as [15496, 11, 995, 0]": [
        "integration/outside/test_gpt2_tokens.py::test_tokens_of_gpt2_are_those_of_the_snippet",
    ],
    "20. the sum of logits with gradients fills the gradients of the module": [
        "integration/test_specification_002.py::test_gradients_of_logits_are_those_of_a_plain_forward_pass",
        "equivalence/test_gradients.py::test_scores_and_gradients_are_those_of_plain_forward_passes",
    ],
}
LAST_ROWS = {"000": 72, "001": 56, "002": 53}
# Rows that promise nothing a test could run.
WITHOUT_TEST = {
    "000-57": "the number of lines of another implementation",
    "000-62": "how another implementation calls transformers",
    "000-68": "a wish for images and audio; the models are text-only",
    "000-71": "a wish for token healing, which is refused by name",
    "001-56": "links to other pages",
}


@cache
def functions_of(path: str) -> dict[str, str]:
    """The docstring of every test in a file, by name."""
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    tests = (function for function in functions(tree) if function.name.startswith("test_"))
    return {function.name: ast.get_docstring(function) or "" for function in tests}


@pytest.mark.parametrize("proof", PROOFS)
def test_every_proof_is_a_test(proof: str) -> None:
    for name in PROOFS[proof]:
        path, _, function = name.partition("::")
        assert function in functions_of(path), name


def test_every_row_of_the_checklist_is_named_by_a_test() -> None:
    paths = [path.relative_to(ROOT / "tests").as_posix() for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    named = set[str]()
    for text in (text for path in paths for text in functions_of(path).values()):
        for document, first, last in re.findall(r"\b(00[0-2])-(\d+)(?: to 00[0-2]-(\d+))?", text):
            named |= {f"{document}-{number}" for number in range(int(first), int(last or first) + 1)}
    rows = {f"{document}-{number}" for document, last in LAST_ROWS.items() for number in range(1, last + 1)}
    assert rows - named == set(WITHOUT_TEST)
