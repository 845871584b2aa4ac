"""`main`: from the words of a command line to an exit code.

Owns the parser and the exit codes: 0 success, 1 broken (doctor), 2 an error, 130 Ctrl-C. An error is one line on
stderr, and below it the notes that it carries. PENSTOCK_DEBUG=1 shows its traceback. Called by the `penstock` script
and `python -m penstock`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from penstock import __version__
from penstock.cli import bench, chat, doctor, generate, serve
from penstock.cli.session import INTERRUPTED
from penstock.cli.terminal import abandon_stdout, one_line, open_standard_streams, replace_unencodable
from penstock.errors import PenstockError

ERROR = 2
EXAMPLES = """examples:
  penstock generate 'def fibonacci(n):'    complete with the built-in model
  penstock chat --model Qwen/Qwen3-0.6B    chat with a model from the hub
  penstock serve --model ./my-model        serve it over HTTP, as OpenAI and Anthropic do
  penstock bench --model ./my-model        compare with transformers.generate
  penstock doctor                          check this machine and its setup

`penstock COMMAND --help` explains a command. Without --model, the small model
that ships with Penstock is used; it completes Python and needs no network.
Every setting of the engine is also an environment variable: PENSTOCK_DEVICE=cpu,
PENSTOCK_MAX_BATCH_SIZE=8. PENSTOCK_DEBUG=1 shows tracebacks.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the word that is wrong."""

    def parse_known_args(  # type: ignore[override]  # typeshed's overloads say the same
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is left over here, where the command's own options are known."""
        known, unknown = super().parse_known_args(args, namespace)
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if options:  # the value of a misspelled option looks like a prompt: what follows is not to blame
            matches = difflib.get_close_matches(options[0], list(self._option_string_actions), n=1)
            self.error(f"unknown option {options[0]}" + (f": did you mean {matches[0]}?" if matches else ""))
        if unknown:
            takes_prompt = any(action.dest == "prompt" for action in self._actions)
            hint = ": put a prompt of several words in quotes" if takes_prompt else ""
            self.error(f"unexpected argument {unknown[0]!r}{hint}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Print the error and where to find help, and exit with 2."""
        self.exit(ERROR, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = Parser(
        prog="penstock",
        description="The command line of Penstock, an LLM inference engine that lives inside your asyncio program.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"penstock {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (generate, chat, serve, bench, doctor):
        module.add_parser(commands)
    parser.set_defaults(run=lambda args: _print_help(parser))
    return parser


def _print_help(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Invalid options raise `SystemExit`, as argparse does."""
    open_standard_streams()
    replace_unencodable()
    args = make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except PenstockError as error:
        if os.environ.get("PENSTOCK_DEBUG"):
            raise
        print(f"penstock: error: {one_line(error)}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return ERROR
    except BrokenPipeError:
        abandon_stdout()
        return 0
    except OSError as error:
        abandon_stdout()
        print(f"penstock: error: {one_line(error)}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
