"""Talk in turns: the tokens only grow, so each turn finds the ones before it in the cache; branch, edit, and train."""

import asyncio

from penstock import Conversation, InferenceEngine, SamplingParams

SYSTEM = {"role": "system", "content": "You write Python."}
PARAMS = SamplingParams(temperature=0.7, max_tokens=48, seed=7)


async def main() -> None:
    async with InferenceEngine() as engine:
        conversation = Conversation(engine, [SYSTEM], PARAMS)
        for message in ("Write the function close.", "Write the function open."):
            turn = await conversation.send(message)
            print(f"> {message}\n{turn.text}\n")
        branch = conversation.branch()
        other = await branch.retry(SamplingParams(temperature=0.7, max_tokens=48, seed=8))
        print(f"> another reply, {other.num_cached_tokens} tokens of its prompt cached\n{other.text}\n")
        await conversation.edit(1, "Write the class Reader.")

        for fork in conversation.forks:  # where the chat template wrote earlier turns differently
            print(fork)
        for record in (*conversation.records(), *branch.records()):
            lengths = len(record.prompt_ids), len(record.response_ids), sum(record.mask)
            print("{} prompt ids, {} after it, {} sampled".format(*lengths))


if __name__ == "__main__":
    asyncio.run(main())
