"""TRL's GRPOTrainer over an engine, in float32: its importance ratios are 1 up to the rounding of any forward pass.

The oracle is the same model in float64. transformers itself, with one sequence at a time and with the padded batch that
TRL runs, is as far from it as the engine is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock import InferenceEngine
from penstock.api.blocking import run
from penstock.demo import MODEL_DIR
from penstock.training.trl import generate_with

Ids = Sequence[Sequence[int]]
PROMPTS = ["def add(a, b):\n", "class Point:\n", "import os\n", "for i in range(3):\n"]
SIZES = {"max_steps": 3, "num_generations": 4, "per_device_train_batch_size": 16, "max_completion_length": 24}
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def one_at_a_time(model: nn.Module, prompts: Ids, completions: Ids) -> Tensor:
    """The log probabilities of all completions' tokens, float64 [tokens]."""
    logprobs = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0].double())
    return torch.cat(logprobs)


def as_a_batch(model: nn.Module, prompts: Ids, completions: Ids) -> Tensor:
    """The same by one padded forward pass: prompts to the left, completions to the right."""
    width, length = max(map(len, prompts)), max(map(len, completions))
    pads = [
        (width - len(prompt), length - len(completion)) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    rows = [
        [0] * left + [*prompt, *completion] + [0] * right
        for (left, right), prompt, completion in zip(pads, prompts, completions, strict=True)
    ]
    mask = [[0] * left + [1] * (width + length - left - right) + [0] * right for left, right in pads]
    logits = model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask)).logits[:, width - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(rows)[:, width:, None])[..., 0].double()
    return torch.cat([row[: len(completion)] for row, completion in zip(chosen, completions, strict=True)])


class Recorder:
    """Stands before a trainer's generator and keeps how far each way is from float64, under the weights of then."""

    def __init__(self, generation: Any, model: nn.Module) -> None:
        self._generation = generation
        self._model = model
        self._exact = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float64")
        self.errors: dict[str, list[Tensor]] = {"engine": [], "one at a time": [], "batch": []}
        self.between: list[Tensor] = []  # the batch's from those of one at a time

    def sync_weights(self) -> None:
        self._generation.sync_weights()

    @torch.no_grad()
    def generate(self, *args: Any, **options: Any) -> Any:
        prompts, completions, logprobs, tokens = self._generation.generate(*args, **options)
        self._exact.load_state_dict(self._model.state_dict())
        exact = one_at_a_time(self._exact, prompts, completions)
        single, batch = (way(self._model, prompts, completions) for way in (one_at_a_time, as_a_batch))
        engine = torch.tensor([value for row in logprobs for (value,) in row], dtype=torch.float64)
        for name, values in (("engine", engine), ("one at a time", single), ("batch", batch)):
            self.errors[name].append((values - exact).abs())
        self.between.append((single - batch).abs())
        return prompts, completions, logprobs, tokens


@pytest.mark.timeout(600)
def test_ratios_of_trl_are_1_up_to_the_rounding_of_transformers(tmp_path: Any) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, learning_rate=1e-4, **SIZES, **QUIET)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32"),
        lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
    )
    with generate_with(trainer):
        recorder = trainer.vllm_generation = Recorder(trainer.vllm_generation, trainer.model)
        trainer.train()
    errors = {name: torch.cat(values) for name, values in recorder.errors.items()}
    assert errors["engine"].mean() < 1.1 * errors["batch"].mean()
    assert errors["engine"].max() < 2 * max(errors["batch"].max(), errors["one at a time"].max())
    logs = [log for log in trainer.state.log_history if "reward" in log]
    largest = [log["sampling/sampling_logp_difference/max"] for log in logs]
    assert max(largest) < 2 * torch.cat(recorder.between).max(), "two ways of transformers differ as much"
    assert [log["sampling/importance_sampling_ratio/mean"] for log in logs] == pytest.approx([1.0] * 3, abs=1e-5)


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Caller:
    """Stands before a trainer's generator: what the model writes first is a call of `add`, with its own logprobs."""

    def __init__(self, generation: Any, engine: InferenceEngine, call: list[int]) -> None:
        self._generation, self._engine, self._call = generation, engine, call
        self.prompts: list[Ids] = []

    def sync_weights(self) -> None:
        self._generation.sync_weights()

    def generate(self, prompts: Ids, *args: Any, **options: Any) -> Any:
        self.prompts.append(prompts)
        if len(self.prompts) % 2 == 0:  # after the results of the tools
            return self._generation.generate(prompts, *args, **options)
        calls = [self._call for _ in prompts]
        scores = run(self._engine.score(prompts, calls))
        logprobs = [[[value] for value in score.logprobs.tolist()] for score in scores]
        return prompts, calls, logprobs, [[[token] for token in call] for call in calls]


@pytest.mark.timeout(600)
def test_a_trainer_with_tools_goes_on_from_their_results_with_ratios_of_1(tmp_path: Any) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = qwen3_chat_template
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    sizes = SIZES | {"per_device_train_batch_size": 4, "max_completion_length": 96, "max_steps": 2}
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32"),
        lambda completions, **_: [float(len(str(each))) for each in completions],
        args=GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **sizes, **QUIET),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "2 + 3?"}]] * 4}),
        processing_class=tokenizer,
        tools=[add],
    )
    with generate_with(trainer) as engine:
        caller = trainer.vllm_generation = Caller(trainer.vllm_generation, engine, tokenizer(call)["input_ids"])
        trainer.train()
    assert all("<tool_response>\n5\n</tool_response>" in tokenizer.decode(ids) for ids in caller.prompts[1])
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [(log["tools/call_frequency"], log["tools/failure_frequency"]) for log in logs] == [(1.0, 0.0)] * 2
    assert [log["sampling/importance_sampling_ratio/mean"] for log in logs] == pytest.approx([1.0] * 2, abs=1e-3)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("weight_mode", ["shared", "packed"])
def test_the_adapter_that_a_trainer_trains_is_the_one_that_is_sampled_from(weight_mode: Any, tmp_path: Any) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    blocks = "# Nobody knows any more why this line is as long as it is, but it fills several blocks of the cache.\n"
    sizes = SIZES | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2}
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32"),
        lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
        args=GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, learning_rate=1e-2, **sizes, **QUIET),
        train_dataset=Dataset.from_dict({"prompt": [blocks + prompt for prompt in PROMPTS] * 2}),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with generate_with(trainer, weight_mode=weight_mode):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["sampling/importance_sampling_ratio/mean"] for log in logs] == pytest.approx([1.0] * 3, abs=1e-4)
    changed = [name for name, value in trainer.model.named_parameters() if "lora_B" in name and value.any()]
    assert changed
