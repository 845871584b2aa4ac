"""Fill a pydantic model, pick a word, follow an expression: the output is valid, whatever the model is."""

import asyncio
from typing import Annotated

from pydantic import BaseModel, Field

from penstock import GrammarError, InferenceEngine, SamplingParams, StructuredOutputs


class Function(BaseModel):
    name: str = Field(pattern="^[a-z_]{3,20}$")
    arguments: list[Annotated[str, Field(pattern="^[a-z_]{1,9}$")]] = Field(max_length=3)
    is_async: bool


async def main() -> None:
    async with InferenceEngine() as engine:

        async def ask(prompt: str, **constraint: object) -> str:
            structured = StructuredOutputs(**constraint)
            params = SamplingParams(max_tokens=400, seed=1, structured_outputs=structured)
            return (await engine.generate(prompt, params)).text

        text = await ask("# A function as JSON:\n", json=Function)
        print("model:", repr(Function.model_validate_json(text)))
        print("choice:", await ask("# Is this Python?\n", choice=["yes", "no"]))
        print("regex:", await ask("# Today is ", regex=r"20\d{2}-(0[1-9]|1[0-2])"))
        try:
            await ask("# A set:\n", json={"type": "array", "uniqueItems": True})
        except GrammarError as error:
            print("refused:", error)


if __name__ == "__main__":
    asyncio.run(main())
