"""Search a tree of continuations: fork a running request, extend the branches, continue the most likely one."""

import asyncio
from typing import NamedTuple

from penstock import InferenceEngine, RequestHandle, SamplingParams

PROMPT = "def fibonacci(n):\n"
LEVELS, BRANCHES, PIECE = 6, 6, 8


class Branch(NamedTuple):
    handle: RequestHandle
    text: str
    logprobs: list[float]


async def grow(handle: RequestHandle) -> Branch:
    text, logprobs = "", list[float]()
    while len(logprobs) < PIECE:  # the request keeps running
        delta = await anext(handle)
        text, logprobs = text + delta.text, logprobs + list(delta.token_logprobs)
    return Branch(handle, text, logprobs)


async def main() -> None:
    params = SamplingParams(temperature=0.8, max_tokens=500, seed=1, ignore_eos=True)
    async with InferenceEngine() as engine:
        best, text = await grow(engine.generate(PROMPT, params)), PROMPT
        for level in range(LEVELS):
            forks = best.handle.fork(BRANCHES, at=len(best.logprobs))  # they share all K/V up to there
            text += best.text
            scores = {sum(b.logprobs) / len(b.logprobs): b for b in await asyncio.gather(*map(grow, forks))}
            best = scores[max(scores)]  # dropping the others aborts them
            print(f"level {level}:", *(f"{score:.2f}" for score in scores))
    print(text + best.text)


if __name__ == "__main__":
    asyncio.run(main())
