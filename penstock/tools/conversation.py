"""`Conversation`: several turns with a model, as one growing list of tokens.

Sampled tokens are kept as they were sampled, never decoded and encoded again. Only what a turn adds before its reply is
encoded. So each prompt begins with all tokens of the turns before it, which are in the prefix cache. Written against
the protocols of `api`; called by programs, from one event loop or thread at a time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Literal, TypedDict, Unpack

from penstock.api.handle import RequestHandle
from penstock.api.prompt import Message, is_chat
from penstock.api.protocols import Engine, WithAdapters
from penstock.errors import RequestError, shown
from penstock.generation import GenerationConfig, Params
from penstock.outputs import CompletionOutput, Delta, RequestOutput
from penstock.tools.chat_text import ChatTokenizer, chat_text
from penstock.tools.definitions import read_tools
from penstock.tools.output_parser import parse_output
from penstock.tools.pieces import ToolCall, random_id
from penstock.tools.templates import tool_format_of
from penstock.tools.turns import TemplateFork, TokenRecord, Turn, TurnPrompt, context_ids, fork_between, token_records
from penstock.values import integer, text

OnFork = Literal["keep", "restart", "raise"]
_ON_FORK = ("keep", "restart", "raise")
_log = logging.getLogger("penstock")


class ConversationOptions(TypedDict, total=False):
    """What every request of a conversation is submitted with: options of `Engine.generate` and `WithAdapters`."""

    namespace: str
    adapter: str


class Conversation:
    """A conversation with any engine; `messages` come before its first turn, such as a system message.

    `params` are those of every reply, unless a call has its own. `tools` reach the chat template, and
    `template_arguments` are further variables of it. A template may write earlier turns differently than the model read
    and wrote them, for instance without their reasoning. This fork is logged and recorded in `forks`. With
    `on_fork="keep"` the model still reads the tokens of the earlier turns; with "restart" it reads what the template
    writes, as a new prompt and a new record; with "raise" the call fails. An engine that renders no templates needs the
    model's `tokenizer`, which nothing else may use at the same time. `options` are `namespace` and the `adapter` of an
    engine that takes adapters.

    Each method that generates either adds its turn or, if it raises or is cancelled, leaves the conversation as it was.
    Raises `RequestError`.
    """

    def __init__(
        self,
        engine: Engine,
        messages: Sequence[Message] = (),
        params: Params = None,
        *,
        tools: object = None,
        on_fork: OnFork = "keep",
        tokenizer: ChatTokenizer | None = None,
        template_arguments: Mapping[str, object] | None = None,
        **options: Unpack[ConversationOptions],
    ) -> None:
        if on_fork not in _ON_FORK:
            raise RequestError(f"on_fork must be one of {', '.join(map(repr, _ON_FORK))}, got {shown(on_fork)}")
        self._text = chat_text(engine, tokenizer)
        self._opening = _read_opening(messages)
        self._params = params
        self._tools = read_tools(tools)
        self._on_fork = on_fork
        self._submit = _submitting(engine, **options)
        self._arguments = dict(template_arguments or {})
        self._turns: tuple[Turn, ...] = ()
        self._is_busy = False

    # What was said.

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns so far."""
        return self._turns

    @property
    def messages(self) -> list[Message]:
        """All messages so far, the replies as the model wrote them."""
        return self._messages_of(self._turns)

    @property
    def token_ids(self) -> list[int]:
        """All tokens that the model has read and written; the next prompt begins with them."""
        return context_ids(self._turns)

    @property
    def forks(self) -> list[TemplateFork]:
        """Where the chat template rewrote earlier turns."""
        return [turn.prompt.fork for turn in self._turns if turn.prompt.fork is not None]

    def records(self) -> list[TokenRecord]:
        """The tokens for a trainer: one record, and one more for each restart. Raises `RequestError`."""
        return token_records(self._turns)

    def tool_calls(self) -> list[ToolCall]:
        """The complete tool calls of the last reply, in the format of the chat template; malformed ones are content."""
        format = tool_format_of(self._text.template)
        output = parse_output(self._last().content, format, self._tools, hold_calls=True)
        return [call for call in output.tool_calls if call.is_complete]

    # Generating.

    async def send(self, message: str | Message | Sequence[Message], params: Params = None) -> Turn:
        """Add a user's text, a message or several messages, and the reply to them."""
        return await self._extend(self._turns, _read_messages(message), params)

    async def send_results(self, results: Sequence[object], params: Params = None) -> Turn:
        """Add the results of the last reply's tool calls, in their order, and the reply to them.

        A result that is no text is written as JSON.
        """
        calls = self.tool_calls()
        if len(results) != len(calls):
            raise RequestError(f"{len(results)} results for {len(calls)} tool calls: pass one for each")
        messages = (_result_message(*pair) for pair in zip(calls, results, strict=True))
        return await self._extend(self._turns, tuple(messages), params)

    async def stream(self, message: str | Message | Sequence[Message], params: Params = None) -> AsyncIterator[Delta]:
        """`send` that yields the reply's deltas; the turn is added after the last one."""
        earlier = self._turns
        with self._exclusive():
            prompt = await self._prompt(earlier, _read_messages(message))
            handle = self._generate(earlier, prompt, params)
            async for delta in handle:
                yield delta
            self._turns = (*earlier, await self._turn(prompt, await handle))

    async def retry(self, params: Params = None) -> Turn:
        """Replace the last reply by another one to the same prompt."""
        prompt = self._last().prompt
        with self._exclusive():
            return await self._reply(self._turns[:-1], prompt, params)

    async def edit(self, turn: int, message: str | Message | Sequence[Message], params: Params = None) -> Turn:
        """Replace the messages of a turn, counted from 0, and its reply; the turns after it are dropped."""
        number = integer("turn", turn, 0, len(self._turns) - 1, f"the number of a turn, below {len(self._turns)}")
        return await self._extend(self._turns[:number], _read_messages(message), params)

    def branch(self, num_turns: int | None = None) -> Conversation:
        """A conversation of its own that shares the first `num_turns`, by default all."""
        last = len(self._turns)
        count = last if num_turns is None else integer("num_turns", num_turns, 0, last, f"at most {last} turns")
        other = copy(self)
        other._turns = self._turns[:count]
        other._is_busy = False
        return other

    def _last(self) -> Turn:
        if not self._turns:
            raise RequestError("the conversation has no turn yet: send a message first")
        return self._turns[-1]

    def _messages_of(self, turns: Sequence[Turn]) -> list[Message]:
        return [*self._opening, *(message for turn in turns for message in (*turn.prompt.messages, turn.message))]

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._is_busy:
            raise RequestError("the conversation waits for a reply: await it first, or use branch()")
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    async def _extend(self, earlier: tuple[Turn, ...], messages: tuple[Message, ...], params: Params) -> Turn:
        with self._exclusive():
            return await self._reply(earlier, await self._prompt(earlier, messages), params)

    async def _reply(self, earlier: tuple[Turn, ...], prompt: TurnPrompt, params: Params) -> Turn:
        turn = await self._turn(prompt, await self._generate(earlier, prompt, params))
        self._turns = (*earlier, turn)
        return turn

    def _generate(self, earlier: Sequence[Turn], prompt: TurnPrompt, params: Params) -> RequestHandle:
        ids = [*prompt.token_ids] if prompt.is_whole else [*context_ids(earlier), *prompt.token_ids]
        params = _single(self._params if params is None else params)
        return self._submit({"prompt_token_ids": ids}, params)

    async def _turn(self, prompt: TurnPrompt, output: RequestOutput) -> Turn:
        reply = output.outputs[0]
        if reply.text and not reply.token_ids:
            raise RequestError("this engine returns no token ids, of which a conversation consists")
        split = len(reply.token_ids) - _ends_with_token(reply)
        content = await self._decode(reply.token_ids[:split])
        ending = await self._decode(reply.token_ids[split:])
        return Turn(prompt, reply, content, ending, output.num_cached_tokens)

    async def _decode(self, ids: Sequence[int]) -> str:
        return await self._text.decode(ids) if ids else ""

    # Prompts.

    async def _prompt(self, earlier: tuple[Turn, ...], messages: tuple[Message, ...]) -> TurnPrompt:
        """What the chat template adds for these messages after the earlier turns."""
        rendered = await self._render([*self._messages_of(earlier), *messages])
        fork = fork_between(earlier, rendered) if earlier else None
        if fork is not None:
            self._report(fork)
        is_whole = not earlier or (fork is not None and self._on_fork == "restart")
        if is_whole:
            addition = rendered
        elif fork is None:
            addition = rendered[len(earlier[-1].written) :]
        else:
            addition = await self._addition(earlier, messages)
        return TurnPrompt(messages, rendered, tuple(await self._text.encode(addition)), is_whole, fork)

    async def _addition(self, earlier: tuple[Turn, ...], messages: tuple[Message, ...]) -> str:
        """What the template writes after the last reply, for which a word stands that occurs nowhere else."""
        mark = random_id("reply")
        rendered = await self._render(
            [*self._messages_of(earlier)[:-1], {"role": "assistant", "content": mark}, *messages]
        )
        _, separator, addition = rendered.rpartition(mark)
        if not separator:
            raise RequestError('the chat template does not write earlier replies: use on_fork="restart"')
        ending = earlier[-1].ending
        stripped = addition.lstrip()
        return stripped.removeprefix(ending) if ending and stripped.startswith(ending) else addition

    def _report(self, fork: TemplateFork) -> None:
        if self._on_fork == "raise":
            raise RequestError(f'{fork}: use on_fork="keep" or "restart", or another chat template')
        _log.warning("%s; on_fork=%r", fork, self._on_fork)

    async def _render(self, messages: Sequence[Message]) -> str:
        tools = {"tools": [tool.to_dict() for tool in self._tools]} if self._tools else {}
        return await self._text.render(messages, {**tools, "chat_template_kwargs": self._arguments})


def _submitting(engine: Engine, *, namespace: str = "", adapter: str = "") -> Callable[..., RequestHandle]:
    """`engine.generate` with these options. Raises `RequestError`."""
    submit = partial(engine.generate, namespace=text("namespace", namespace))
    if not text("adapter", adapter):
        return submit
    if not isinstance(engine, WithAdapters):
        raise RequestError("this engine takes no adapters: leave adapter out")
    return partial(submit, adapter=adapter)


def _read_opening(messages: Sequence[Message]) -> tuple[Message, ...]:
    if isinstance(messages, Sequence) and all(isinstance(message, Mapping) for message in messages):
        return tuple(map(dict, messages))
    raise RequestError(f"messages must be a list of chat messages, got {shown(messages)}")


def _read_messages(message: str | Message | Sequence[Message]) -> tuple[Message, ...]:
    if isinstance(message, str):
        return ({"role": "user", "content": text("message", message)},)
    messages = (message,) if isinstance(message, Mapping) else message
    if not (is_chat(messages) and all(isinstance(part, Mapping) for part in messages)):
        raise RequestError(f"message must be a string, a chat message or a list of them, got {shown(message)}")
    if messages[-1].get("role") == "assistant":
        raise RequestError(
            "the last message is the assistant's, and its reply is to be generated: end with a user's message or with "
            "results of tools, or pass what was said before as messages of a new Conversation"
        )
    return tuple(map(dict, messages))


def _result_message(call: ToolCall, result: object) -> Message:
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": _result_text(result)}


def _result_text(result: object) -> str:
    """A text as it is; anything else as JSON, or as Python writes it where JSON cannot."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(result)


def _single(params: Params) -> Params:
    """Parameters that ask for one completion. Raises `RequestError` for more."""
    sampling = params.sampling_params() if isinstance(params, GenerationConfig) else params
    if sampling is not None and sampling.n != 1:
        raise RequestError(f"a turn has one reply, not n={sampling.n}: use branch() for several")
    return params


def _ends_with_token(reply: CompletionOutput) -> bool:
    """Whether the last token is one that ends an output, in place of a stop string."""
    return reply.finish_reason == "stop" and not isinstance(reply.stop_reason, str) and bool(reply.token_ids)
