"""`penstock generate`: one prompt in, its completion streamed to stdout.

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
from typing import Any, TextIO

from penstock.cli.options import add_model_options, add_sampling_options, engine_settings, sampling_settings
from penstock.cli.session import INTERRUPTED, Timing, event_loop, loaded_engine, params_for, stream
from penstock.cli.terminal import dim, note, write
from penstock.engine.inference import InferenceEngine
from penstock.errors import RequestError, RequestTooLarge
from penstock.outputs import CompletionOutput, Delta, Logprob, RequestOutput
from penstock.sampling import SamplingParams

MAX_TOKENS = 200
EXAMPLES = """examples:
  penstock generate 'def fibonacci(n):'
  penstock generate --model Qwen/Qwen3-0.6B --temperature 0 --stats 'Paris is'
  git diff | penstock generate --model ./my-model --max-tokens 64 -
  penstock generate --n 3 --json 'import ' | jq -r '.outputs[].text'

The prompt is completed as it stands; `penstock chat` applies a chat template.
Ctrl-C cancels the generation (exit code 130). Every setting of the engine is an
environment variable too, PENSTOCK_MAX_SEQUENCE_LENGTH=8192 for instance.
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "generate",
        help="complete a prompt, streaming to the terminal",
        description="Complete a prompt and stream the text to stdout as its tokens come.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to complete; - or nothing reads stdin")
    add_model_options(parser)
    sampling = add_sampling_options(parser, MAX_TOKENS)
    sampling.add_argument("--n", type=int, metavar="N", help="number of completions (default: 1)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print one JSON object at the end instead of text as it comes"
    )
    output.add_argument(
        "--logprobs", type=int, metavar="K", help="with --json: log probabilities of the K likeliest tokens"
    )
    output.add_argument("--stats", action="store_true", help="tokens per second and time to the first token, on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code."""
    if args.logprobs is not None and not args.json:
        raise RequestError("--logprobs shows in JSON only: add --json")
    given, prompt = sampling_settings(args), read_prompt(args.prompt, sys.stdin)
    begin = time.perf_counter()
    with loaded_engine(args.model, **engine_settings(args)) as engine, event_loop() as runner:
        load_s = time.perf_counter() - begin
        params = params_for(engine, given, MAX_TOKENS)
        show = (lambda delta: None) if args.json else shower(prompt, params.n)
        try:
            output, timing = runner.run(_complete(engine, prompt, params, show, "max_tokens" not in given))
        except KeyboardInterrupt:
            note("\ninterrupted: the generation was cancelled")
            return INTERRUPTED
        _finish(args, output, timing, load_s, engine.get_stats()["model"])
    return 0


def read_prompt(argument: str | None, stdin: TextIO) -> str:
    """The argument, or all of stdin for "-" and for nothing. Raises `RequestError` when there is nothing to read."""
    if argument is not None and argument != "-":
        return argument
    if argument is None and stdin.isatty():
        raise RequestError("there is no prompt: penstock generate 'def fibonacci(n):', or pipe it in")
    try:
        text = stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not text: {error}") from None
    if not text:
        raise RequestError("the prompt is empty: stdin held nothing")
    return text


def shower(prompt: str, count: int) -> Callable[[Delta], None]:
    """Show the prompt, pale and on terminals only, and return what shows the deltas after it."""
    if count == 1:
        write(dim(prompt, sys.stdout) if sys.stdout.isatty() else "")
    turns = Turns(count)
    return lambda delta: write(turns.push(delta))


class Turns:
    """Several completions that arrive interleaved, shown one after the other, each under a line of its own.

    The first one that has not ended shows live; the text of those behind it waits. A single one has no such line.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._current = -1
        self._waiting: defaultdict[int, list[str]] = defaultdict(list)
        self._ended: set[int] = set()
        self._tail = ""

    def push(self, delta: Delta) -> str:
        """The text that can be shown now."""
        self._waiting[delta.index].append(delta.text)
        if delta.finished:
            self._ended.add(delta.index)
        shown = self._begin() if self._current < 0 else ""
        shown += self._take()
        while self._current in self._ended and self._current + 1 < self._count:
            shown += self._end() + self._begin() + self._take()
        if len(self._ended) == self._count:
            shown += self._end()
        return shown

    def _begin(self) -> str:
        self._current += 1
        return "" if self._count == 1 else f"--- {self._current + 1} of {self._count} ---\n"

    def _take(self) -> str:
        text = "".join(self._waiting.pop(self._current, ()))
        self._tail = text[-1:] or self._tail
        return text

    def _end(self) -> str:
        tail, self._tail = self._tail, ""
        return "" if tail == "\n" else "\n"


async def _complete(
    engine: InferenceEngine, prompt: str, params: SamplingParams, show: Callable[[Delta], None], may_shorten: bool
) -> tuple[RequestOutput, Timing]:
    """Only a limit that somebody asked for is refused when it does not fit; the default one is cut to what does."""
    try:
        return await stream(engine, {"prompt": prompt}, params, show)
    except RequestTooLarge:
        if not may_shorten:
            raise
        return await stream(engine, {"prompt": prompt}, dataclasses.replace(params, max_tokens=None), show)


def _finish(args: argparse.Namespace, output: RequestOutput, timing: Timing, load_s: float, model: str | None) -> None:
    if args.json:
        write(json.dumps(as_json(output, timing, load_s, model), ensure_ascii=False) + "\n")
    if args.stats:
        note(stats_line(output, timing, load_s))


def stats_line(output: RequestOutput, timing: Timing, load_s: float) -> str:
    """The figures of one request in a line."""
    return (
        f"{timing.num_tokens} tokens in {timing.total_s:.2f} s ({timing.tokens_per_s:.1f} tokens/s), "
        f"first token after {1000 * timing.first_token_s:.0f} ms; "
        f"{len(output.prompt_token_ids)} prompt tokens; model loaded in {load_s:.1f} s"
    )


def as_json(output: RequestOutput, timing: Timing, load_s: float, model: str | None) -> dict[str, Any]:
    """The result as plain data. Times are seconds."""
    return {
        "model": model,
        "prompt": output.prompt,
        "outputs": [_completion(out) for out in output.outputs],
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


def _completion(out: CompletionOutput) -> dict[str, Any]:
    found = {
        "index": out.index,
        "text": out.text,
        "finish_reason": out.finish_reason,
        "stop_reason": out.stop_reason,
        "token_ids": out.token_ids,
        "cumulative_logprob": out.cumulative_logprob,
    }
    if out.logprobs is not None:
        found["token_logprobs"] = out.token_logprobs
        found["logprobs"] = [[_entry(token, entry) for token, entry in place.items()] for place in out.logprobs]
    return found


def _entry(token: int, entry: Logprob) -> dict[str, Any]:
    return {"token_id": token, "token": entry.decoded_token, "logprob": entry.logprob, "rank": entry.rank}
