"""`penstock chat`: a conversation in the terminal.

Owns the history, the slash commands and what Ctrl-C means: it cancels an answer, or leaves at the prompt. Lines are
read on the main thread while no loop runs there (the engine's loop has a thread of its own), so reading blocks none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from penstock.api.prompt import Prompt
from penstock.cli.options import add_model_options, add_sampling_options, engine_settings, sampling_settings
from penstock.cli.session import event_loop, loaded_engine, params_for, stream
from penstock.cli.terminal import note, one_line, write
from penstock.engine.inference import InferenceEngine
from penstock.errors import EngineClosed, PenstockError, RequestTooLarge
from penstock.outputs import Delta
from penstock.sampling import SamplingParams

MAX_TOKENS = 512
COMMANDS = """/reset         forget the conversation
/system TEXT   begin anew with this system message (without TEXT: with none)
/help          this list
/exit          leave, as Ctrl-D or Ctrl-C at the prompt do
Ctrl-C         cancel the answer that is being written"""
EXAMPLES = f"""in the chat:
{chr(10).join("  " + line for line in COMMANDS.splitlines())}

examples:
  penstock chat --model Qwen/Qwen3-0.6B --system 'Answer in one sentence.'
  penstock chat               # the built-in model: completes the Python you type
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model. One without a chat template completes each line that you type.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_sampling_options(parser, MAX_TOKENS)
    parser.add_argument("--system", metavar="TEXT", help="system message to begin with")
    parser.set_defaults(run=run)


@dataclass(slots=True)
class Conversation:
    """What was said. `chats` is False for models that only complete: then each text stands alone."""

    chats: bool
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, text: str) -> Prompt:
        """The prompt for a new message."""
        if not self.chats:
            return text
        said = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.turns:
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*said, {"role": "user", "content": text}]

    def add(self, text: str, answer: str) -> None:
        """Remember an exchange; one without an answer is not, since templates want both sides."""
        if self.chats and answer:
            self.turns.append((text, answer))

    def forget_oldest(self) -> bool:
        """Drop the oldest exchange; False when there is none."""
        return bool(self.turns) and self.turns.pop(0) is not None

    def obey(self, line: str) -> str | None:
        """Carry out a slash command and return what to tell; None means to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return None
        if command == "/reset":
            self.turns.clear()
            return "the conversation is forgotten"
        if command == "/system":
            return self._instruct(rest.strip())
        return COMMANDS if command == "/help" else f"there is no {command}:\n{COMMANDS}"

    def _instruct(self, text: str) -> str:
        if not self.chats:
            return "this model completes text; it takes no system message"
        self.system = text or None
        self.turns.clear()
        return "the conversation begins anew" + (" with this system message" if text else " without a system message")


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code."""
    given = sampling_settings(args)
    with loaded_engine(args.model, **engine_settings(args)) as engine, event_loop() as runner:
        chats = args.model is not None and bool(getattr(engine.tokenizer, "chat_template", None))
        note(greeting(args.model, chats))
        params = params_for(engine, given, MAX_TOKENS)
        with contextlib.suppress(KeyboardInterrupt):
            _converse(engine, runner, Conversation(chats, args.system), params)
        note("")
    return 0


def greeting(model: str | None, chats: bool) -> str:
    """What this model will do with a line, and how to leave."""
    if model is None:
        does = "The built-in model does not chat: it completes Python. Type the beginning of some code."
    elif chats:
        does = f"Chatting with {model}."
    else:
        does = f"{model} has no chat template: it completes what you type."
    return f"{does} /help lists the commands, Ctrl-D leaves."


def _converse(engine: InferenceEngine, runner: asyncio.Runner, talk: Conversation, params: SamplingParams) -> None:
    while (line := read_line()) is not None:
        if line.startswith("/"):
            told = talk.obey(line)
            if told is None:
                return
            note(told)
        elif line.strip():
            _answer(engine, runner, talk, params, line)


def read_line() -> str | None:
    """A line from the terminal, or from a pipe without a prompt sign; None at the end. Ctrl-C raises as ever."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (importing it gives input() a history and line editing)
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(
    engine: InferenceEngine, runner: asyncio.Runner, talk: Conversation, params: SamplingParams, text: str
) -> None:
    """Stream one answer. Whatever goes wrong with it, the chat goes on; only without an engine it cannot."""
    said: list[str] = []

    def show(delta: Delta) -> None:
        said.append(delta.text)
        write(delta.text)

    try:
        runner.run(_reply(engine, talk, text, params, show))
        write("\n")
    except KeyboardInterrupt:
        write("\n")
        note("cancelled")
    except EngineClosed:
        raise
    except PenstockError as error:
        note(("\n" if said else "") + f"error: {one_line(error)}")
    talk.add(text, "".join(said))


async def _reply(
    engine: InferenceEngine, talk: Conversation, text: str, params: SamplingParams, show: Callable[[Delta], None]
) -> None:
    """Forgets the oldest exchanges until the rest fits; a message that fits alone gets what room there is."""
    while True:
        try:
            await stream(engine, talk.prompt(text), params, show)
            return
        except RequestTooLarge:
            if talk.forget_oldest():
                note("(the oldest exchange is forgotten: the conversation is longer than the model's context)")
            elif params.max_tokens is not None:
                params = dataclasses.replace(params, max_tokens=None)
            else:
                raise
