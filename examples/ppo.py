"""PPO by hand, with a frozen reference: the policy learns to write docstrings and stays close to where it began.

Policy and reference are two `InferenceModule`s. The logits of both give the exact divergence of each token of a
rollout, which lowers its reward. Several clipped steps are made from each rollout, over the one copy of the weights
that also samples. It prints mean reward and divergence of each round.
"""

import argparse
import asyncio
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from penstock import InferenceModule

PROMPTS = [
    f"def {name}(self, value):\n" for name in ("close", "open", "read", "write", "reset", "start", "stop", "parse")
]
SAMPLES, TOKENS, EPOCHS = 4, 12, 2  # per prompt, per sample, per round
LEARNING_RATE, CLIP, KL_COST, MAX_GRAD_NORM = 1e-4, 0.2, 0.5, 1.0


@dataclass(frozen=True)
class Rollout:
    """What one round sampled. `old` [tokens] are the policy's log probabilities then, `advantages` [tokens]."""

    prompts: list[str]
    responses: list[list[int]]
    old: Tensor
    advantages: Tensor
    reward: float
    divergence: float


def reward_of(text: str) -> float:
    """1.0 for a function whose body begins with a docstring."""
    return float(text.lstrip().startswith('"""'))


def divergences(
    policy: InferenceModule, reference: InferenceModule, prompts: list[str], responses: list[list[int]]
) -> Tensor:
    """The divergence of the policy from the reference at each token, in nats: [responses, longest], 0 behind ends."""
    logits, mask = policy.get_logits(prompts, responses, return_mask=True)
    own, frozen = logits.log_softmax(-1), reference.get_logits(prompts, responses).log_softmax(-1)
    return (own.exp() * (own - frozen)).sum(-1) * mask


def roll_out(policy: InferenceModule, reference: InferenceModule, seed: int) -> Rollout:
    """Sample, and reward each response less the cost of its divergence; advantages compare it with all others."""
    prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    result = policy.generate(
        PROMPTS, max_new_tokens=TOKENS, num_return_sequences=SAMPLES, seed=seed, use_cache=False, return_logprobs=True
    )
    kl = divergences(policy, reference, prompts, result.token_ids)
    rewards = torch.tensor([reward_of(text) for text in result.texts])
    returns = rewards - KL_COST * kl.sum(-1) / torch.tensor(result.lengths)
    advantages = (returns - returns.mean()) / (returns.std() + 1e-4)
    old = torch.cat([torch.as_tensor(row) for row in result.logprobs or []])
    per_token = advantages.repeat_interleave(torch.tensor(result.lengths))
    divergence = float(kl.sum() / sum(result.lengths))
    return Rollout(prompts, result.token_ids, old, per_token, float(rewards.mean()), divergence)


def loss_of(policy: InferenceModule, rollout: Rollout) -> Tensor:
    """PPO's clipped loss, averaged over tokens."""
    engine = policy.backend.engine
    scores = asyncio.run(engine.score(rollout.prompts, rollout.responses, requires_grad=True))
    ratio = (torch.cat([score.logprobs for score in scores]) - rollout.old).exp()
    gain = torch.minimum(ratio * rollout.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * rollout.advantages)
    return -gain.mean()


def train(num_rounds: int) -> list[tuple[float, float]]:
    """(mean reward, mean divergence per token) of each round."""
    policy, reference = InferenceModule(dtype="float32"), InferenceModule(dtype="float32")
    optimizer = torch.optim.AdamW(policy.backend.model.parameters(), lr=LEARNING_RATE)
    rounds = []
    for number in range(num_rounds):
        rollout = roll_out(policy, reference, seed=number)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            loss_of(policy, rollout).backward()
            clip_grad_norm_(policy.backend.model.parameters(), MAX_GRAD_NORM)
            with policy.updating():
                optimizer.step()
        rounds.append((rollout.reward, rollout.divergence))
        print(
            f"round {number}: reward {rollout.reward:.2f}, divergence {rollout.divergence:.3f} nats per token",
            flush=True,
        )
    policy.close()
    reference.close()
    return rounds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    train(parser.parse_args().rounds)
