"""How fast are HTTP servers beside each other, and what does HTTP cost?

Every server is a command; each is started in turn, in rotating order, and gets the same loads from the same client:
`--streams` requests at once, each stream `--rounds` of them, one after the other. `penstock serve` is one of the
servers, and so is the engine without HTTP, whose readers run in its own process. Reported for each number of streams:
output tokens per second and time to the first token, as medians over the repeats. The last line is JSON.

    python benchmarks/servers.py --model FOLDER \\
        --server 'vllm=VENV/bin/python -m vllm.entrypoints.openai.api_server --model {model} --port {port} \\
            --dtype bfloat16 --max-model-len 2048'
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from harness.console import finish, progress, show
from penstock import InferenceEngine, SamplingParams
from penstock.cli.load import Clients, Exchange, Load, Server, find_model
from penstock.cli.load_report import summarize

PENSTOCK = "penstock"
IN_PROCESS = "in process"
START_S = 300.0
TEMPERATURE = 1.0  # servers have defaults of their own
COMMAND = f"{sys.executable} -m penstock serve --model {{model}} --port {{port}} --no-access-log"


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(command: str, model: str) -> Iterator[str]:
    """Start a server and wait until it answers; yields its address."""
    port = free_port()
    words = shlex.split(command.format(model=model, port=port))
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_S
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, f"{words[0]} ended: {process.returncode}"
                assert time.monotonic() < deadline, f"{words[0]} did not start"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    """Whether a server answers with success."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def load_of(args: argparse.Namespace, streams: int, seed: int) -> Load:
    """So many requests at once, and the next one when one is answered."""
    count = streams * args.rounds
    sizes = {"prompt_words": args.prompt_words, "max_tokens": args.output_tokens}
    return Load(count, concurrency=streams, ignore_eos=True, temperature=TEMPERATURE, seed=seed, **sizes)


def measure_server(command: str, args: argparse.Namespace, seed: int) -> dict[int, dict[str, float]]:
    """The figures of a server, by the number of streams."""
    with running(command, args.model) as address:
        url = f"{address}/v1"
        server = Server(url, asyncio.run(find_model(url, {})), {}, "completions")
        asyncio.run(Clients(server, load_of(args, 2, -1)).run())
        return {
            streams: figures(asyncio.run(Clients(server, load_of(args, streams, seed)).run()))
            for streams in args.streams
        }


def figures(exchanges: Any) -> dict[str, float]:
    """Output tokens per second, and the median time to the first token in milliseconds."""
    summary = summarize(exchanges)
    assert summary["completed"] == len(exchanges), summary["errors"]
    first = summary["first_token_s"]
    assert first is not None
    return {"output_tok_s": summary["output_tok_s"], "first_token_ms": 1000 * first["p50"]}


async def measure_engine(args: argparse.Namespace, seed: int) -> dict[int, dict[str, float]]:
    """The same loads on an engine in this process."""
    async with InferenceEngine(args.model) as engine:
        await run_in_process(engine, load_of(args, 2, -1))
        return {s: figures(await run_in_process(engine, load_of(args, s, seed))) for s in args.streams}


async def run_in_process(engine: InferenceEngine, load: Load) -> list[Exchange]:
    """What `Clients` does, without HTTP."""
    places, begin = asyncio.Semaphore(load.concurrency or load.num_requests), time.perf_counter()
    params = SamplingParams(
        temperature=TEMPERATURE, max_tokens=load.max_tokens, min_tokens=load.max_tokens, ignore_eos=True
    )

    async def read(number: int) -> Exchange:
        async with places:
            exchange = Exchange(0.0, sent_s=time.perf_counter() - begin)
            async for delta in engine.generate({"prompt": load.prompt(number)}, params):
                if delta.token_ids:
                    exchange.chunks_s.append(time.perf_counter() - begin)
                exchange.num_tokens += len(delta.token_ids)
            exchange.ended_s = time.perf_counter() - begin
            return exchange

    return list(await asyncio.gather(*map(read, range(load.num_requests))))


def measure(name: str, command: str, args: argparse.Namespace, seed: int) -> dict[int, dict[str, float]]:
    """One turn of one server. The engine without HTTP runs in a process of its own, as the servers do."""
    if name != IN_PROCESS:
        return measure_server(command, args, seed)
    words = [sys.executable, str(Path(__file__)), "--turn", str(seed), *sys.argv[1:]]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return {int(streams): values for streams, values in json.loads(done.stdout.splitlines()[-1]).items()}


def run(args: argparse.Namespace) -> None:
    """All turns, the table, and the JSON line."""
    servers = {IN_PROCESS: "", PENSTOCK: COMMAND, **dict(args.server)}
    turns: dict[str, list[dict[int, dict[str, float]]]] = {name: [] for name in servers}
    with progress(args.repeats * len(servers)) as step:
        for repeat in range(args.repeats):
            names = list(servers)
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                step(f"{name}, repeat {repeat + 1}")
                turns[name].append(measure(name, servers[name], args, repeat))
    medians = {
        name: {
            streams: {key: median(turn[streams][key] for turn in items) for key in ("output_tok_s", "first_token_ms")}
            for streams in args.streams
        }
        for name, items in turns.items()
    }
    for key, title in (("output_tok_s", "output tokens per second"), ("first_token_ms", "first token, ms (p50)")):
        rows = [[name, *(values[streams][key] for streams in args.streams)] for name, values in medians.items()]
        show(title, ["", *(f"{streams} streams" for streams in args.streams)], rows)
    finish({"model": args.model, "repeats": args.repeats, "medians": medians, "turns": turns})


def server(text: str) -> tuple[str, str]:
    """NAME=COMMAND."""
    name, separator, command = text.partition("=")
    if not separator or "{port}" not in command:
        raise argparse.ArgumentTypeError("must be NAME=COMMAND, and the command must have {port}")
    return name, command


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--server", type=server, action="append", default=[], metavar="NAME=COMMAND", help="repeatable")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="requests at once (default: 1 8 32)")
    parser.add_argument("--rounds", type=int, default=2, help="requests per stream, one after the other (default: 2)")
    parser.add_argument("--prompt-words", type=int, default=60, help="words per prompt (default: 60)")
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens per answer (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each server (default: 3)")
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn is None:
        run(args)
    else:
        print(json.dumps(asyncio.run(measure_engine(args, args.turn))))


if __name__ == "__main__":
    main()
