"""Four ways to end a request early. Each frees its place in the batch and its memory."""

import asyncio

from penstock import DeadlineExceeded, InferenceEngine, RequestAborted, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)  # takes longer than 0.1 s anywhere
PROMPT = "class Parser:\n"


async def main() -> None:
    async with InferenceEngine() as engine:
        try:
            async with asyncio.timeout(0.1):
                await engine.generate(PROMPT, PARAMS)
        except TimeoutError:
            print("asyncio.timeout: aborted")

        async for delta in engine.generate(PROMPT, PARAMS):
            print("break: after", repr(delta.text))
            break  # drops the only reference to the handle

        handle = engine.generate(PROMPT, PARAMS)
        handle.cancel()
        try:
            await handle
        except RequestAborted:
            print("handle.cancel():", handle.status.value)

        try:
            await engine.generate(PROMPT, PARAMS, deadline=0.1)
        except DeadlineExceeded as error:
            print("deadline: kept", len(error.output.generated_ids) if error.output else 0, "tokens")

        await engine.generate(PROMPT, SamplingParams(max_tokens=1))
        print("requests left:", engine.get_stats()["queue"]["num_requests"])


if __name__ == "__main__":
    asyncio.run(main())
