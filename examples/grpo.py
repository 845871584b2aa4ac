"""GRPO by hand: rollouts and training in one process, over one copy of the weights.

The model is asked for Python functions. Of each prompt it writes a group of them, and those that compile get a reward
of 1. The engine borrows the module that the optimizer changes. `engine.updating()` stops the steps meanwhile, raises
the version of the weights, and forgets the K/V of the old ones.

It prints the mean reward of each step, and how far the trainer's log probabilities of the sampled
tokens are from the engine's.
"""

import argparse
import ast
import asyncio
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock import InferenceEngine, SamplingParams
from penstock.demo import MODEL_DIR

NAMES = ("close", "open", "read", "write", "reset", "flush", "start", "stop", "update", "remove", "parse", "format")
PROMPTS_PER_STEP, GROUP_SIZE = 6, 8
PARAMS = SamplingParams(n=GROUP_SIZE, temperature=1.0, max_tokens=48)
LEARNING_RATE, CLIP, MAX_GRAD_NORM = 1e-4, 0.2, 1.0


@dataclass(frozen=True)
class Sample:
    """One completion. `logprobs` are the engine's, one per token; `advantage` compares it with its group."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    reward: float
    advantage: float


def reward_of(text: str, finish_reason: str | None) -> float:
    """1.0 for a complete function that Python can parse."""
    if finish_reason != "stop" or not text.startswith("def "):
        return 0.0
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return 0.0
    return 1.0


async def sample_group(engine: InferenceEngine, name: str) -> list[Sample]:
    """Completions of one prompt, whose advantages are their rewards with the group's mean and deviation removed."""
    output = await engine.generate([{"role": "user", "content": f"Write the function {name}."}], PARAMS)
    rewards = torch.tensor([reward_of(completion.text, completion.finish_reason) for completion in output.outputs])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    return [
        Sample(output.prompt_token_ids, completion.token_ids, completion.token_logprobs, reward, advantage)
        for completion, reward, advantage in zip(output.outputs, rewards.tolist(), advantages.tolist(), strict=True)
    ]


def token_logprobs(model: nn.Module, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """(log probabilities, mask) [samples, longest - 1] of the tokens that were sampled, by one padded forward pass."""
    rows = [sample.prompt_ids + sample.token_ids for sample in samples]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    positions = torch.arange(longest)
    ends = torch.tensor(list(map(len, rows)))[:, None]
    starts = torch.tensor([len(sample.prompt_ids) for sample in samples])[:, None]
    logits = model(input_ids=ids, attention_mask=(positions < ends).long(), use_cache=False).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logprobs, ((positions >= starts) & (positions < ends))[:, 1:]


def loss_of(model: nn.Module, samples: list[Sample]) -> tuple[Tensor, float]:
    """GRPO's clipped loss, and the largest difference of the trainer's log probabilities from the engine's."""
    logprobs, mask = token_logprobs(model, samples)
    engine_logprobs = torch.zeros_like(logprobs)
    engine_logprobs[mask] = torch.tensor([value for sample in samples for value in sample.logprobs])
    ratio = (logprobs - engine_logprobs).exp()
    advantages = torch.tensor([sample.advantage for sample in samples])[:, None]
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    difference = (logprobs - engine_logprobs)[mask].abs().max().item()
    return -(gain * mask).sum() / mask.sum(), difference


async def train(num_steps: int) -> tuple[list[float], list[float]]:
    """The mean reward of each step, and the largest difference of log probabilities."""
    random.seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rewards, differences = list[float](), list[float]()
    async with InferenceEngine(model, AutoTokenizer.from_pretrained(MODEL_DIR), seed=0) as engine:
        for step in range(num_steps):
            names = random.sample(NAMES, PROMPTS_PER_STEP)
            groups = await asyncio.gather(*(sample_group(engine, name) for name in names))
            samples = [sample for group in groups for sample in group]
            rewards.append(sum(sample.reward for sample in samples) / len(samples))

            loss, difference = loss_of(model, samples)
            differences.append(difference)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            async with engine.updating():
                optimizer.step()
            print(
                f"step {step}: reward {rewards[-1]:.2f}, log probabilities within {difference:.1e}, "
                f"weights {engine.weight_version}",
                flush=True,
            )
    return rewards, differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plot", metavar="FILE", help="draw reward and difference as a PNG file")
    args = parser.parse_args()
    rewards, differences = asyncio.run(train(args.steps))
    quarter = max(1, len(rewards) // 4)
    first, last = sum(rewards[:quarter]) / quarter, sum(rewards[-quarter:]) / quarter
    print(f"mean reward: {first:.2f} in the first quarter, {last:.2f} in the last")
    if args.plot:
        import training_plot  # needs matplotlib

        label = "largest difference between engine and trainer"
        training_plot.save(args.plot, "GRPO by hand", rewards, differences, label)
