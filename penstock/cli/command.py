"""`main`: from words on a command line to an exit code.

Owns the parser, and how every ending looks: 0 done, 1 broken (doctor), 2 a mistake in one line on stderr, 130 Ctrl-C.
PENSTOCK_DEBUG=1 shows the traceback of a mistake. Called by the `penstock` script and `python -m penstock`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from penstock import __version__
from penstock.cli import bench, chat, doctor, generate
from penstock.cli.session import INTERRUPTED
from penstock.cli.terminal import abandon_stdout, fill_standard_streams, forgive_encoding, one_line
from penstock.errors import PenstockError

MISTAKE = 2
EXAMPLES = """examples:
  penstock generate 'def fibonacci(n):'    complete with the built-in model
  penstock chat --model Qwen/Qwen3-0.6B    talk with a model from the hub
  penstock bench --model ./my-model        compare with transformers.generate
  penstock doctor                          look for what is wrong here

`penstock COMMAND --help` explains a command. Without --model, the small model
that ships with Penstock is used; it completes Python and needs no network.
Every setting of the engine is an environment variable too: PENSTOCK_DEVICE=cpu,
PENSTOCK_MAX_BATCH_SIZE=8. PENSTOCK_DEBUG=1 shows tracebacks.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and where help is, and exit with 2."""
        self.exit(MISTAKE, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="penstock",
        description="An LLM inference engine that lives inside your asyncio program; this is its command line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"penstock {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (generate, chat, bench, doctor):
        module.add_parser(commands)
    parser.set_defaults(run=lambda args: _without_command(parser))
    return parser


def _without_command(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return MISTAKE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Wrong options leave by `SystemExit`, as argparse does."""
    fill_standard_streams()
    forgive_encoding()
    args = make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except PenstockError as error:
        if os.environ.get("PENSTOCK_DEBUG"):
            raise
        print(f"penstock: error: {one_line(error)}", file=sys.stderr)
        return MISTAKE
    except BrokenPipeError:
        abandon_stdout()
        return 0
    except OSError as error:
        abandon_stdout()
        print(f"penstock: error: {one_line(error)}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
