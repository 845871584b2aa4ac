"""`penstock bench --url`: an OpenAI-compatible server under load.

A summary goes to stderr, one JSON line to stdout, and plots to a file. Imports the HTTP client, an optional dependency.
Called by `bench`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence

from penstock import __version__
from penstock.cli.load import Clients, Exchange, Load, Server, base_url, find_model
from penstock.cli.load_report import LoadSummary, check_plot, load_table, remarks, save_plots, summarize
from penstock.cli.session import INTERRUPTED, new_runner
from penstock.cli.terminal import note, print_table, progress_bar, write


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code: 1 if no request was answered."""
    if args.plot:
        check_plot(args.plot)  # what is missing is reported before the load, not after it
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url, exit_code = base_url(args.url), 0
    with new_runner() as runner, progress_bar(args.requests) as step:
        model = args.model or runner.run(find_model(url, headers))
        clients = Clients(Server(url, model, headers, args.endpoint), _load(args), lambda: step("answers"))
        try:
            runner.run(clients.run())
        except KeyboardInterrupt:
            exit_code = INTERRUPTED
    summary = _report(args, f"{model} at {url}", [exchange for exchange in clients.exchanges if exchange.ended_s])
    facts = {"url": url, "model": model, "endpoint": args.endpoint, "penstock": __version__}
    settings = {"rate": None if math.isinf(args.rate) else args.rate, "concurrency": args.concurrency}
    write(json.dumps(facts | settings | {"load": summary}) + "\n")
    return exit_code or (0 if summary["completed"] else 1)


def _load(args: argparse.Namespace) -> Load:
    return Load(
        num_requests=args.requests,
        rate=args.rate,
        concurrency=args.concurrency,
        prompt_words=args.prompt_words,
        max_tokens=args.output_tokens,
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
        disconnecting=args.disconnecting,
        slow=args.slow_readers,
        seed=args.seed,
    )


def _report(args: argparse.Namespace, title: str, exchanges: Sequence[Exchange]) -> LoadSummary:
    """Print table and remarks, and save the plots; returns the summary."""
    summary = summarize(exchanges)
    print_table(load_table(summary, title))
    note(
        f"{summary['completed']} of {summary['requests']} requests in {summary['duration_s']:.1f} s: "
        f"{summary['requests_per_s']:.2f} requests/s, {summary['output_tok_s']:,.1f} tokens/s"
    )
    for line in remarks(summary, is_open=args.concurrency is None):
        note(line)
    if args.plot:
        save_plots(args.plot, exchanges, title)
        note(f"plot: {args.plot}")
    return summary
