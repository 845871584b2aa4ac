"""`penstock chat`: a conversation in the terminal.

Owns the history, the slash commands and Ctrl-C, which cancels an answer, or leaves at the prompt. Lines are read on the
main thread while no loop runs there (the engine's loop has a thread of its own), so reading blocks none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.api.prompt import Prompt
from penstock.api.protocols import Engine
from penstock.cli.options import add_model_options, add_sampling_options, engine_settings, sampling_settings
from penstock.cli.session import JsonObject, loaded_engine, new_runner, params_with, stream
from penstock.cli.terminal import note, one_line, status_line, write
from penstock.errors import ConfigurationError, EngineClosed, PenstockError, RequestTooLarge
from penstock.outputs import Delta
from penstock.sampling import SamplingParams

COMMANDS = """/reset         start a new conversation
/system TEXT   start a new conversation with this system message (no TEXT: without one)
/help          list the commands
/exit          leave, like Ctrl-D, or Ctrl-C at the prompt
Ctrl-C         cancel the current answer"""
EXAMPLES = f"""in the chat:
{chr(10).join("  " + line for line in COMMANDS.splitlines())}

examples:
  penstock chat --model Qwen/Qwen3-0.6B --system 'Answer in one sentence.'
  penstock chat --url http://127.0.0.1:8000
  penstock chat               # the built-in model completes the Python you type
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "chat",
        help="chat with a model in the terminal",
        description="Chat with a model. A model without a chat template completes each line that you type.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = add_model_options(parser)
    model.add_argument(
        "--url", metavar="URL", help="chat with an OpenAI-compatible server instead; --model names its model"
    )
    model.add_argument("--api-key", metavar="KEY", help="key of the server (default: $OPENAI_API_KEY)")
    add_sampling_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message to start with")
    parser.set_defaults(run=run)


@dataclass(slots=True)
class Conversation:
    """The history. `has_template` is False for models that only complete: then every text is a prompt by itself."""

    has_template: bool
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, text: str) -> Prompt:
        """The prompt for a new message."""
        if not self.has_template:
            return {"prompt": text}
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": text}]

    def add(self, text: str, answer: str) -> None:
        """Append a message and its answer; without an answer nothing, since templates expect both sides."""
        if self.has_template and answer:
            self.turns.append((text, answer))

    def drop_oldest(self) -> bool:
        """Remove the oldest message and its answer; False if the history is empty."""
        return bool(self.turns) and self.turns.pop(0) is not None

    def execute(self, line: str) -> str | None:
        """Run a slash command; the reply, or None to leave."""
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit"):
            return None
        if command == "/reset":
            self.turns.clear()
            return "started a new conversation"
        if command == "/system":
            return self._set_system(argument.strip())
        return COMMANDS if command == "/help" else f"unknown command {command}:\n{COMMANDS}"

    def _set_system(self, text: str) -> str:
        if not self.has_template:
            return "this model completes text and takes no system message"
        self.system = text or None
        self.turns.clear()
        return f"started a new conversation {'with this' if text else 'without a'} system message"


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code."""
    settings = sampling_settings(args)
    if args.url:
        return _chat_with_server(args, settings)
    with loaded_engine(args.model, **engine_settings(args)) as engine:
        has_template = args.model is not None and bool(getattr(engine.tokenizer, "chat_template", None))
        note(greeting(args.model, has_template))
        _converse(engine, Conversation(has_template, args.system), params_with(engine, settings))
    return 0


def _chat_with_server(args: argparse.Namespace, settings: JsonObject) -> int:
    if importlib.util.find_spec("openai") is None:
        raise ConfigurationError("--url needs the openai package: pip install 'penstock[client]'")
    from penstock.backends.openai_engine import OpenAIEngine

    if local := engine_settings(args):
        raise ConfigurationError(
            f"--{min(local)} and --url exclude each other: the server has loaded its model already"
        )
    engine = OpenAIEngine(args.url, model=args.model, api_key=args.api_key or os.environ.get("OPENAI_API_KEY"))
    with status_line(f"connecting to {engine.url}"):
        engine.start()
    try:
        note(greeting(f"{engine.model} at {engine.url}", has_template=True))
        params = SamplingParams(**{"max_tokens": None, **settings}) if settings else None
        _converse(engine, Conversation(True, args.system), params)
    finally:
        engine.stop(drain=0.0)
    return 0


def greeting(model: str | None, has_template: bool) -> str:
    """What the model does with a line, and how to leave."""
    if model is None:
        purpose = "The built-in model does not chat: it completes Python. Type the beginning of some code."
    elif has_template:
        purpose = f"Chatting with {model}."
    else:
        purpose = f"{model} has no chat template: it completes what you type."
    return f"{purpose} /help lists the commands, Ctrl-D leaves."


def _converse(engine: Engine, conversation: Conversation, params: SamplingParams | None) -> None:
    """Read lines and answer them, until the input ends or Ctrl-C is pressed at the prompt."""
    with new_runner() as runner, contextlib.suppress(KeyboardInterrupt):
        while (line := read_line()) is not None:
            if line.startswith("/"):
                reply = conversation.execute(line)
                if reply is None:
                    break
                note(reply)
            elif line.strip():
                _answer(engine, runner, conversation, params, line)
    note("")


def read_line() -> str | None:
    """A line from the terminal, or from a pipe without a prompt sign; None at the end. Ctrl-C raises as usual."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (importing it gives input() a history and line editing)
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(
    engine: Engine, runner: asyncio.Runner, conversation: Conversation, params: SamplingParams | None, text: str
) -> None:
    """Stream one answer. The chat goes on after any error except a closed engine."""
    parts: list[str] = []

    def show(delta: Delta) -> None:
        parts.append(delta.text)
        write(delta.text)

    try:
        runner.run(_reply(engine, conversation, text, params, show))
        write("\n")
    except KeyboardInterrupt:
        write("\n")
        note("cancelled")
    except EngineClosed:
        raise
    except PenstockError as error:
        note("\n".join([("\n" if parts else "") + f"error: {one_line(error)}", *getattr(error, "__notes__", ())]))
    conversation.add(text, "".join(parts))


async def _reply(
    engine: Engine, conversation: Conversation, text: str, params: SamplingParams | None, show: Callable[[Delta], None]
) -> None:
    """Drops the oldest messages until the conversation fits; then reduces `max_tokens` if the message alone is long.

    Without parameters a server uses its own.
    """
    while True:
        try:
            output, timing = await stream(engine, conversation.prompt(text), params, show)
            if output.outputs[0].finish_reason == "length":
                length = f"{timing.num_tokens} tokens" if timing.num_tokens else "its maximum length"
                note(f"\n(ended after {length}: --max-tokens N allows more)")
            return
        except RequestTooLarge:
            if conversation.drop_oldest():
                note("(dropped the oldest message: the conversation exceeds the model's context)")
            elif params is not None and params.max_tokens is not None:
                params = dataclasses.replace(params, max_tokens=None)
            else:
                raise
