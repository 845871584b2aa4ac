"""Stream answers in a chat loop. Questions come from the keyboard, from a pipe, or from `SCRIPT`."""

import asyncio
import sys
from collections.abc import AsyncIterator

from penstock import InferenceEngine, SamplingParams

SCRIPT = ["Write the function is_empty.", "Write the function close."]


async def questions() -> AsyncIterator[str]:
    """One line at a time, until an empty one. Waiting for the keyboard blocks a thread, not the loop."""
    if sys.stdin.isatty():
        while line := (await asyncio.to_thread(input, "\nyou> ")).strip():
            yield line
    else:
        for line in sys.stdin.read().splitlines() or SCRIPT:
            print(f"\nyou> {line}")
            yield line


async def main() -> None:
    messages: list[dict[str, str]] = []
    params = SamplingParams(temperature=0.6, max_tokens=48, seed=1)
    async with InferenceEngine() as engine:
        async for question in questions():
            messages.append({"role": "user", "content": question})
            answer = ""
            async for delta in engine.generate(messages, params):
                print(delta.text, end="", flush=True)
                answer += delta.text
            messages.append({"role": "assistant", "content": answer})
            print()
    print(f"\n{len(messages)} messages")


if __name__ == "__main__":
    asyncio.run(main())
