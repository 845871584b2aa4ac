"""Run requests of four priorities, one with a deadline, and print the order in which they finish."""

import asyncio

from penstock import DeadlineExceeded, InferenceEngine, RequestHandle, RequestPriority, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


async def follow(name: str, handle: RequestHandle, finished: list[str], late: list[str]) -> None:
    try:
        await handle
        finished.append(name)
    except DeadlineExceeded as error:
        tokens = len(error.output.generated_ids) if error.output else 0
        late.append(f"{name} with {tokens} of {PARAMS.max_tokens} tokens")


async def main() -> None:
    finished: list[str] = []
    late: list[str] = []
    async with InferenceEngine(max_batch_size=2) as engine, asyncio.TaskGroup() as group:
        for number in range(4):
            for priority in RequestPriority:  # LOW is submitted first and finishes last
                # The last LOW request has a deadline of 10 ms, the others have none.
                deadline = 0.01 if (number, priority) == (3, RequestPriority.LOW) else None
                prompt = f"def function_{number}(self):\n"
                handle = engine.generate(prompt, PARAMS, priority=priority, deadline=deadline)
                group.create_task(follow(f"{priority.name}-{number}", handle, finished, late))
    for place, name in enumerate(finished, 1):
        print(f"{place:2}. {name}")
    for line in late:
        print(f"missed its deadline: {line}")


if __name__ == "__main__":
    asyncio.run(main())
