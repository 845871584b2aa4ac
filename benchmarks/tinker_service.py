"""What does the service for the Tinker SDK add to training in the process?

`penstock serve --tinker` is started with the small model in the package, or another one. A client of the unmodified SDK
makes optimizer steps, and forward and backward passes of one batch. The same calls are made in turns in this process,
by a trainer over a module of its own. Reported are the medians of both, and what the first exceeds the second by.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness.console import finish, note, show
from harness.options import parser_for
from harness.processes import own_environment
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.training.lora.records import Adam, Datum, LoraShape, LossBatch

EPILOG = """examples:
  python benchmarks/tinker_service.py
  python benchmarks/tinker_service.py --model ./my-model --rank 32 --batch 8 --tokens 256
"""


@contextlib.contextmanager
def server(model: str) -> Iterator[str]:
    """`penstock serve --tinker` in a process of its own; its address."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", model, "--port", "0", "--tinker", "--tinker-folder", folder, "--no-access-log"]
        command = [sys.executable, "-m", "penstock", "serve", *options]
        process = subprocess.Popen(command, env=own_environment(), stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            match = next(filter(None, (re.search(r"at (http://\S+)/v1", line) for line in process.stderr)), None)
            if match is None:
                raise SystemExit("the server did not start")
            yield match[1]
        finally:
            process.terminate()
            process.wait()


class Remote:
    """Training through the SDK."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        import numpy as np
        import tinker

        self._types = tinker.types
        self._client = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
        self._training = self._client.create_lora_training_client(args.model, rank=args.rank, seed=0).result()
        inputs = {"target_tokens": np.array(tokens_of(args)[1:]), "weights": np.ones(args.tokens, dtype=np.float32)}
        prompt = tinker.types.ModelInput.from_ints(tokens_of(args)[:-1])
        self._data = [tinker.types.Datum(prompt, dict(inputs)) for _ in range(args.batch)]

    def forward_backward(self) -> None:
        self._training.forward_backward(self._data, "cross_entropy").result()

    def step(self) -> None:
        self._training.optim_step(self._types.AdamParams(learning_rate=1e-5)).result()

    def close(self) -> None:
        self._client.close("success").result()


class Local:
    """The same training in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        import numpy as np

        from penstock.models.loading import load_bare
        from penstock.training.lora.trainer import LoraTrainer

        trainer = LoraTrainer(load_bare(args.model, EngineConfig()))
        self._model = trainer.create(LoraShape(rank=args.rank, seed=0))
        tokens = np.array(tokens_of(args))
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(args.tokens, dtype=np.float32)}
        self._batch = LossBatch([Datum(tokens[:-1], inputs)] * args.batch, "cross_entropy")

    def forward_backward(self) -> None:
        self._model.forward_backward(self._batch)

    def step(self) -> None:
        self._model.step(Adam(learning_rate=1e-5))


def tokens_of(args: argparse.Namespace) -> list[int]:
    """One token more than are predicted."""
    return [(7 * i + 3) % 400 + 2 for i in range(args.tokens + 1)]


def medians_ms(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The median milliseconds of calls that are made in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 3):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[3:]) * 1e3 for name, values in seconds.items()}


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    parser.add_argument("--model", metavar="M", default=str(MODEL_DIR), help="folder (default: the one in the package)")
    parser.add_argument("--rank", type=int, default=32, help="of the adapter (default: 32)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a forward and backward pass (default: 4)")
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence (default: 128)")
    parser.add_argument("--repeats", type=int, default=100, help="of each call (default: 100)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    os.environ["TINKER_TELEMETRY"] = "0"
    note("starting the server")
    local = Local(args)
    results: dict[str, dict[str, float]] = {}
    with server(args.model) as url:
        remote = Remote(url, args)
        for name in ("step", "forward_backward"):
            calls: dict[str, Any] = {"sdk": getattr(remote, name), "in process": getattr(local, name)}
            medians = medians_ms(calls, args.repeats)
            results[name] = {**medians, "overhead": medians["sdk"] - medians["in process"]}
        remote.close()
    columns = ("call", "SDK ms", "in process ms", "overhead ms")
    rows = [[name, *map("{:.2f}".format, result.values())] for name, result in results.items()]
    show("the service for the Tinker SDK", columns, rows)
    finish({"model": args.model, "rank": args.rank, "batch": args.batch, "tokens": args.tokens, "results": results})


if __name__ == "__main__":
    main()
