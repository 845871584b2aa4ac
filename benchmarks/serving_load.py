"""Do many streaming clients disturb each other when some of them leave, or read slowly?

A server in a process of its own runs a scripted model whose steps take a fixed time, so every wait beyond it is the
server's. `--clients` clients stream from it at once, in two kinds of turns: calm, and rough, in which a tenth leaves in
the middle and a tenth reads one chunk per second. Reported: p99 of the gap between two chunks of the other clients in
both kinds; the lag of the event loops of server and clients, of which the latter says how far the gaps are the clients'
own; the server's CPU time per event, with all requests and while nothing but streams runs; and what is left when all
clients are gone. The last line is JSON; the exit code is 1 if something leaks, or the gap grows by more than 10 %.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from event_loop_lag import heartbeat
from harness.console import finish, note, progress, show
from harness.stats import percentile
from harness.stream_clients import StreamClients
from penstock import InferenceEngine, ScriptedModel
from penstock.api.event_loop import new_event_loop
from penstock.cli.load import Load
from penstock.demo import MODEL_DIR

TEXT = "Water falls from the reservoir through the pipe to the turbine. "
SETTLE_S = 2.0
MAX_GROWTH = 1.10
ROUGH = {"disconnecting": 0.1, "slow": 0.1}


def serve(step_s: float) -> None:
    """The server's process: prints its port, and answers /probe with what it measures on itself."""
    import psutil
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoTokenizer

    from penstock.serving import ServingSettings, app
    from penstock.serving.http_protocol import HttpProtocol

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = ScriptedModel(tokenizer.encode(TEXT), vocab_size=len(tokenizer), step_s=step_s)
    engine = InferenceEngine(model, tokenizer, max_batch_size=4096, max_queue_size=4096, max_num_batched_tokens=1 << 16)
    lags_s: list[float] = []
    process = psutil.Process()

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        async with engine:
            freeze()
            beat = asyncio.create_task(heartbeat(lags_s))
            yield
            beat.cancel()

    api = FastAPI(lifespan=lifespan)

    @api.get("/probe")
    async def probe(peek: bool = False) -> dict[str, Any]:
        lags = sorted(lags_s)
        if not peek:
            lags_s.clear()
        stats = engine.get_stats()
        return {
            "lag_p99_ms": 1000 * percentile(lags, 99) if lags else None,
            "lag_max_ms": 1000 * lags[-1] if lags else None,
            "cpu_s": sum(process.cpu_times()[:2]),
            "rss_mb": process.memory_info().rss / 1e6,
            "requests": stats["queue"]["num_requests"],
            "used_blocks": stats["cache_info"]["num_blocks"] - stats["cache_info"]["num_free_blocks"],
            "tasks": len(asyncio.all_tasks()),
        }

    api.mount("/", app(engine, ServingSettings(max_concurrent_requests=4096)))
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    server = uvicorn.Server(uvicorn.Config(api, loop="none", http=HttpProtocol, log_level="error", access_log=False))
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(server.serve(sockets=[listener]))


def freeze() -> None:
    """Keep what was loaded out of later garbage collections, as `penstock serve` does."""
    gc.collect()
    gc.freeze()


@contextmanager
def server_process(step_s: float) -> Iterator[str]:
    """Start the server; yields its address."""
    command = [sys.executable, str(Path(__file__)), "--serve", str(step_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def turn(url: str, load: Load) -> dict[str, Any]:
    """One load, and what the server measured during it and after its end."""
    before = httpx.get(f"{url}/probe").json()
    clients, lags_s = StreamClients(url, load), list[float]()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        steady_us = runner.run(stream(url, clients, lags_s))
    during = httpx.get(f"{url}/probe").json()
    deadline = time.monotonic() + SETTLE_S
    after = during
    while time.monotonic() < deadline and after["requests"]:
        after = httpx.get(f"{url}/probe").json()
    errors = {client.error for client in clients.clients if client.error}
    assert not errors, errors
    gaps_s = clients.gaps_s()
    return {
        "gap_p50_ms": 1000 * percentile(gaps_s, 50),
        "gap_p99_ms": 1000 * percentile(gaps_s, 99),
        "lag_p99_ms": during["lag_p99_ms"],
        "lag_max_ms": during["lag_max_ms"],
        "client_lag_p99_ms": 1000 * percentile(lags_s, 99),
        "cpu_us_per_event": 1e6 * (during["cpu_s"] - before["cpu_s"]) / clients.num_events,
        "steady_cpu_us_per_event": steady_us,
        "cut": sum(client.is_cut for client in clients.clients),
        "after": {name: after[name] for name in ("requests", "used_blocks", "tasks", "rss_mb")},
    }


async def stream(url: str, clients: StreamClients, lags_s: list[float]) -> float | None:
    """Run the clients; the server's CPU time per event in microseconds while all of them stream, or None."""
    beat, running = asyncio.create_task(heartbeat(lags_s)), asyncio.create_task(clients.run())
    probes: list[tuple[float, int]] = []
    async with httpx.AsyncClient() as client:
        for event in (clients.streaming, clients.first_done):
            await event.wait()
            probes.append(((await client.get(f"{url}/probe?peek=1")).json()["cpu_s"], clients.num_events))
    await running
    beat.cancel()
    (begin_s, begin), (end_s, end) = probes
    return 1e6 * (end_s - begin_s) / (end - begin) if end > begin else None


def run(args: argparse.Namespace) -> int:
    """All turns; returns the exit code."""
    kinds: dict[str, dict[str, float]] = {"calm": {}, "rough": ROUGH}
    turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    freeze()
    with server_process(args.step_ms / 1000) as url, progress(1 + 2 * args.repeats) as step:
        step("warm-up")
        idle = turn(url, Load(args.clients, rate=args.rate, max_tokens=4, ignore_eos=True))["after"]
        for repeat in range(args.repeats):
            for kind in list(kinds)[:: 1 if repeat % 2 == 0 else -1]:
                step(kind)
                sizes = {"rate": args.rate, "max_tokens": args.tokens, "seed": repeat}
                load = Load(args.clients, ignore_eos=True, **sizes, **kinds[kind])
                turns[kind].append(turn(url, load))
    names = ("gap_p50_ms", "gap_p99_ms", "lag_p99_ms", "lag_max_ms", "client_lag_p99_ms")
    names = (*names, "cpu_us_per_event", "steady_cpu_us_per_event")
    medians = {
        kind: {name: median(item[name] or 0 for item in items) for name in names} for kind, items in turns.items()
    }
    show(
        f"{args.clients} clients, steps of {args.step_ms} ms", ["", *names],
        [[kind, *(medians[kind][name] for name in names)] for kind in medians],
    )  # fmt: skip
    last = turns["rough"][-1]["after"]
    leaks = {name: (idle[name], last[name]) for name in ("requests", "tasks") if last[name] > idle[name]}
    growth = medians["rough"]["gap_p99_ms"] / medians["calm"]["gap_p99_ms"]
    note(f"p99 gap, rough over calm: {growth:.3f}; left behind: {leaks or 'nothing'}")
    finish(
        {"clients": args.clients, "step_ms": args.step_ms, "growth": growth, "leaks": leaks, "turns": turns} | medians
    )
    return 1 if leaks or growth > MAX_GROWTH else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500, help="streams at once (default: 500)")
    parser.add_argument("--step-ms", type=float, default=250.0, help="time of a step of the model (default: 250)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens per stream (default: 40)")
    parser.add_argument("--rate", type=float, default=100.0, help="arrivals per second (default: 100)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each kind (default: 3)")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
