"""Stream a tool call: a grammar makes the model write one, and a parser reads it while it is written."""

import asyncio

from penstock import InferenceEngine, SamplingParams
from penstock.tools import OutputParser, Piece, ToolCallDelta, constraint, read_tools, tool_instructions

FORMAT = "json"  # for a model whose chat template knows tools: `tool_format_of(template)`
NUMBERS = {"a": {"enum": [1, 2, 3]}, "b": {"enum": [4, 5, 6]}}
SCHEMA = {"type": "object", "properties": NUMBERS, "required": ["a", "b"], "additionalProperties": False}
TOOLS = read_tools([{"name": "add", "description": "Adds two numbers.", "parameters": SCHEMA}])


def show(pieces: list[Piece]) -> None:
    for piece in pieces:
        if isinstance(piece, ToolCallDelta):
            print(piece.name or "", piece.arguments, end="", flush=True)
        else:
            print(piece.text, end="", flush=True)


async def main() -> None:
    required = constraint(TOOLS, "required", FORMAT, parallel=False)
    params = SamplingParams(temperature=0, max_tokens=64, structured_outputs=required)
    messages = [
        {"role": "system", "content": tool_instructions(TOOLS, FORMAT)},
        {"role": "user", "content": "What is 2 + 5?"},
    ]
    parser = OutputParser(FORMAT, TOOLS)
    async with InferenceEngine() as engine:
        async for delta in engine.generate(messages, params):
            show(parser.feed(delta.text))
    show(parser.finish())
    for call in parser.tool_calls():
        print(f"\n{call.name} is called with {call.arguments}")


if __name__ == "__main__":
    asyncio.run(main())
