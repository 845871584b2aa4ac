"""Generate from fifty prompts without asyncio, with a progress bar on a terminal."""

import time

from penstock import LLM, SamplingParams

VERBS = ("read", "write", "open", "close", "find", "parse", "format", "check", "copy", "remove")
NOUNS = ("file", "line", "header", "message", "list")


def main() -> None:
    prompts = [f"def {verb}_{noun}(self, {noun}):\n" for verb in VERBS for noun in NOUNS]
    llm = LLM()
    begin = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=24, seed=1))
    seconds = time.perf_counter() - begin
    for output in outputs[::10]:
        print(f"{output.prompt}{output.text}\n")
    tokens = sum(len(output.generated_ids) for output in outputs)
    print(f"{len(outputs)} prompts, {tokens} tokens, {tokens / seconds:.0f} tokens/s")
    llm.stop()


if __name__ == "__main__":
    main()
