"""`penstock generate`: completes one prompt and streams the text to stdout.

Owns reading the prompt, the order in which several completions are shown, and the summaries. Called by `command`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TextIO

from penstock.api.protocols import Engine
from penstock.cli.options import add_model_options, add_sampling_options, engine_settings, sampling_settings
from penstock.cli.session import (
    INTERRUPTED,
    JsonObject,
    Timing,
    interruptible,
    loaded_engine,
    new_runner,
    params_with,
    stream,
)
from penstock.cli.terminal import dim, note, write
from penstock.errors import RequestError, RequestTooLarge
from penstock.outputs import CompletionOutput, Delta, Logprob, RequestOutput
from penstock.sampling import SamplingParams

EXAMPLES = """examples:
  penstock generate 'def fibonacci(n):'
  penstock generate --model Qwen/Qwen3-0.6B --temperature 0 --stats 'Paris is'
  git diff | penstock generate --model ./my-model --max-tokens 64 -
  penstock generate --n 3 --json 'import ' | jq -r '.outputs[].text'

The prompt is completed as it is; `penstock chat` applies a chat template.
Ctrl-C cancels the generation (exit code 130); once more, it waits for nothing.
Every setting of the engine is also an environment variable, for instance
PENSTOCK_MAX_SEQUENCE_LENGTH=8192.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "generate",
        help="complete a prompt, streaming to the terminal",
        description="Complete a prompt and stream the text to stdout as it is generated.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to complete; - or no argument reads stdin")
    add_model_options(parser)
    sampling = add_sampling_options(parser)
    sampling.add_argument("--n", type=int, metavar="N", help="number of completions (default: 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    output.add_argument(
        "--logprobs", type=int, metavar="K", help="with --json: log probabilities of the K most likely tokens"
    )
    output.add_argument("--stats", action="store_true", help="tokens per second and time to the first token, on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code."""
    if args.logprobs is not None and not args.json:
        raise RequestError("--logprobs needs JSON output: add --json")
    settings, prompt = sampling_settings(args), read_prompt(args.prompt, sys.stdin)
    start_s = time.perf_counter()
    with loaded_engine(args.model, **engine_settings(args)) as engine, new_runner() as runner:
        load_s = time.perf_counter() - start_s
        params = params_with(engine, settings)
        show = (lambda delta: None) if args.json else printer(prompt, params.n)
        try:
            completing = _complete(engine, prompt, params, show, may_shorten="max_tokens" not in settings)
            output, timing = runner.run(interruptible(completing))
        except KeyboardInterrupt:
            note("\ninterrupted: the generation was cancelled")
            return INTERRUPTED
        if args.json:
            document = as_json(output, timing, load_s, engine.get_stats()["model"])
            write(json.dumps(document, ensure_ascii=False) + "\n")
        if args.stats:
            note(stats_line(output, timing, load_s))
    return 0


def read_prompt(argument: str | None, stdin: TextIO) -> str:
    """The argument, or all of stdin for "-" or without an argument. Raises `RequestError` if there is no prompt."""
    if argument is not None and argument != "-":
        return argument
    if argument is None and stdin.isatty():
        raise RequestError("there is no prompt: run penstock generate 'def fibonacci(n):', or pipe one into it")
    try:
        text = stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not text: {error}") from None
    if not text:
        raise RequestError("the prompt is empty: stdin had no text")
    return text


def printer(prompt: str, count: int) -> Callable[[Delta], None]:
    """A function that prints deltas; a single completion follows the dimmed prompt if stdout is a terminal."""
    if count == 1:
        write(dim(prompt, sys.stdout) if sys.stdout.isatty() else "")
    completions = OrderedCompletions(count)
    return lambda delta: write(completions.push(delta))


class OrderedCompletions:
    """Puts the deltas of concurrent completions in order, each completion under a header of its own.

    The first completion that has not ended is shown as it arrives; the text of later ones is held back. A single
    completion has no header.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._current = -1
        self._pending: defaultdict[int, list[str]] = defaultdict(list)
        self._ended: set[int] = set()
        self._last_char = ""

    def push(self, delta: Delta) -> str:
        """The text that can be shown now."""
        self._pending[delta.index].append(delta.text)
        if delta.finished:
            self._ended.add(delta.index)
        text = self._header() if self._current < 0 else ""
        text += self._take()
        while self._current in self._ended and self._current + 1 < self._count:
            text += self._footer() + self._header() + self._take()
        if len(self._ended) == self._count:
            text += self._footer()
        return text

    def _header(self) -> str:
        self._current += 1
        return "" if self._count == 1 else f"--- {self._current + 1} of {self._count} ---\n"

    def _take(self) -> str:
        text = "".join(self._pending.pop(self._current, ()))
        self._last_char = text[-1:] or self._last_char
        return text

    def _footer(self) -> str:
        last_char, self._last_char = self._last_char, ""
        return "" if last_char == "\n" else "\n"


async def _complete(
    engine: Engine, prompt: str, params: SamplingParams, show: Callable[[Delta], None], may_shorten: bool
) -> tuple[RequestOutput, Timing]:
    """Run the request. A default `max_tokens` that does not fit is reduced; an explicit one is an error."""
    try:
        return await stream(engine, {"prompt": prompt}, params, show)
    except RequestTooLarge:
        if not may_shorten:
            raise
        return await stream(engine, {"prompt": prompt}, dataclasses.replace(params, max_tokens=None), show)


def stats_line(output: RequestOutput, timing: Timing, load_s: float) -> str:
    """The statistics of one request in a line."""
    return (
        f"{timing.num_tokens} tokens in {timing.total_s:.2f} s ({timing.tokens_per_s:.1f} tokens/s), "
        f"first token after {1000 * timing.first_token_s:.0f} ms; "
        f"{len(output.prompt_token_ids)} prompt tokens; model loaded in {load_s:.1f} s"
    )


def as_json(output: RequestOutput, timing: Timing, load_s: float, model: str | None) -> JsonObject:
    """The result as plain data. Times are seconds."""
    return {
        "model": model,
        "prompt": output.prompt,
        "outputs": [_completion(completion) for completion in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "completion_tokens": timing.num_tokens,
        },
        "stats": {
            "load_s": load_s,
            "first_token_s": timing.first_token_s,
            "total_s": timing.total_s,
            "tokens_per_s": timing.tokens_per_s,
        },
    }


def _completion(completion: CompletionOutput) -> JsonObject:
    fields: JsonObject = {
        "index": completion.index,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "token_ids": completion.token_ids,
        "cumulative_logprob": completion.cumulative_logprob,
    }
    if completion.logprobs is not None:
        fields["token_logprobs"] = completion.token_logprobs
        fields["logprobs"] = [
            [_logprob(token, entry) for token, entry in position.items()] for position in completion.logprobs
        ]
    return fields


def _logprob(token: int, entry: Logprob) -> JsonObject:
    return {"token_id": token, "token": entry.decoded_token, "logprob": entry.logprob, "rank": entry.rank}
