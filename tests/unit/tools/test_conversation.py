"""`Conversation` over the native engine with the shipped model, and over an engine that renders no templates."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from penstock import (
    Conversation,
    InferenceEngine,
    RequestError,
    RequestHandle,
    RequestTooLarge,
    SamplingParams,
    StructuredOutputs,
)
from penstock.tools import TokenRecord, Turn
from tests.malformed_tool_calls import FAILURES
from tests.scripted_engine import replying_engine
from tests.tiny_models import build
from tests.tokenizers_for_tests import byte_level
from tests.unit.testing.echo import EchoEngine
from tests.unit.tools.texts import TOOLS

SYSTEM = {"role": "system", "content": "Write Python."}
SHORT = SamplingParams(temperature=1.0, max_tokens=12, seed=1)
# Like Qwen 3's and DeepSeek's: of earlier replies, only what follows the reasoning is written.
DROPS_REASONING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
REASONS = SamplingParams(
    max_tokens=64, seed=3, structured_outputs=StructuredOutputs(regex=r"<think>[a-z]{1,8}</think>[a-z]{1,8}")
)
HERMES = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}{# <tool_call> #}
{%- if tools %}<tools>{{ tools | length }}</tools>{% endif %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
WEATHER = [{"name": "weather", "description": "The weather.", "parameters": {"city": "string"}}]


class RecordingEngine(InferenceEngine):
    """Keeps the token ids of the prompts that it was given."""

    prompts: list[list[int]]

    def generate(self, prompt: Any, *args: Any, **options: Any) -> RequestHandle:
        self.prompts.append(prompt["prompt_token_ids"])
        return super().generate(prompt, *args, **options)


@pytest.fixture(scope="module")
def shipped() -> Iterator[RecordingEngine]:
    engine = RecordingEngine()
    engine.prompts = []
    engine.start()
    yield engine
    engine.stop(0)


@pytest.fixture
def engine(shipped: RecordingEngine) -> RecordingEngine:
    shipped.prompts.clear()
    shipped.reset_prefix_cache()
    return shipped


def full_blocks(num_tokens: int, engine: InferenceEngine) -> int:
    """The tokens in full blocks after so many; the last one was sampled and has no K/V yet."""
    return (num_tokens - 1) // engine.config.block_size * engine.config.block_size


def test_each_turn_finds_every_full_block_of_the_earlier_turns_in_the_cache(engine: RecordingEngine) -> None:
    async def cached() -> list[tuple[int, int]]:
        conversation = Conversation(engine, [SYSTEM], SHORT)
        counts = []
        for number in range(5):
            expected = full_blocks(len(conversation.token_ids), engine) if number else 0
            turn = await conversation.send(f"Write function {number}.")
            counts.append((turn.num_cached_tokens, expected))
        return counts

    counts = asyncio.run(cached())
    assert [cached for cached, _ in counts] == [expected for _, expected in counts]
    assert counts[-1][0] > 100


def test_t10_sampled_tokens_are_never_encoded_again(engine: RecordingEngine) -> None:
    """A text decoded and encoded again may have other tokens, here one for each word in place of its letters."""

    async def talk() -> tuple[list[int], list[int], TokenRecord]:
        letters = [(await engine.tokenize(letter, add_special_tokens=False))[0] for letter in "def"]
        params = SamplingParams(max_tokens=24, seed=5, allowed_token_ids=letters, ignore_eos=True)
        conversation = Conversation(engine, [SYSTEM], params)
        first = await conversation.send("Spell.")
        encoded_again = await engine.tokenize(first.text, add_special_tokens=False)
        assert encoded_again != first.reply.token_ids
        before = conversation.token_ids
        await conversation.send("Again.")
        [record] = conversation.records()
        return before, first.reply.token_ids, record

    before, reply, record = asyncio.run(talk())
    assert before[-len(reply) :] == reply
    assert engine.prompts[1][: len(before)] == before
    assert engine.prompts[1] == (record.prompt_ids + record.response_ids)[: len(engine.prompts[1])]


def test_text_of_the_tokens_is_what_the_template_writes(engine: RecordingEngine) -> None:
    async def texts() -> tuple[str, str]:
        conversation = Conversation(engine, [SYSTEM], SHORT)
        for number in range(3):
            await conversation.send(f"Write function {number}.")
        assert conversation.forks == []
        turn = conversation.turns[-1]
        rendered = await engine.render({"messages": conversation.messages[:-1]})
        return await engine.detokenize(conversation.token_ids), rendered + turn.content + turn.ending

    kept, rendered = asyncio.run(texts())
    assert kept == rendered


def test_reply_that_ends_by_itself_is_followed_by_what_the_template_writes_after_its_end(
    engine: RecordingEngine,
) -> None:
    async def turns() -> tuple[Turn, str]:
        end = SamplingParams(max_tokens=8, logit_bias={2: 100.0})
        conversation = Conversation(engine, [SYSTEM], end)
        first = await conversation.send("Say nothing.")
        await conversation.send("Again.")
        return first, await engine.detokenize(engine.prompts[1])

    first, prompt = asyncio.run(turns())
    assert (first.content, first.ending, first.reply.token_ids) == ("", "<|im_end|>", [2])
    assert prompt.endswith(
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"
    )


async def think_twice(engine: InferenceEngine, **options: Any) -> Conversation:
    template = {"chat_template": DROPS_REASONING}
    conversation = Conversation(engine, [SYSTEM], REASONS, template_arguments=template, **options)
    for number in range(3):
        await conversation.send(f"Think about {number}.")
    return conversation


def test_t11_fork_is_reported_and_the_tokens_are_kept_when_a_template_drops_reasoning(
    engine: RecordingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """The template drops `<think>` of earlier turns."""
    conversation = asyncio.run(think_twice(engine))
    turns = conversation.turns
    assert [turn.prompt.fork is not None for turn in turns] == [False, True, True]
    assert [fork.turn for fork in conversation.forks] == [0, 1]
    assert conversation.forks[0].kept.startswith("<think>")
    assert turns[0].content.endswith(conversation.forks[0].rendered.partition("<|im_end|>")[0])
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "the chat template rewrites turn 0: '<think>" in caplog.messages[0]
    assert len(conversation.records()) == 1
    for shorter, longer in zip(engine.prompts, engine.prompts[1:], strict=False):
        assert longer[: len(shorter)] == shorter
    assert [turn.num_cached_tokens for turn in turns[1:]] == [
        full_blocks(len(conversation.branch(count).token_ids), engine) for count in (1, 2)
    ]


def test_kept_tokens_are_followed_by_the_same_text_as_in_the_template(engine: RecordingEngine) -> None:
    conversation = asyncio.run(think_twice(engine))
    prompt = asyncio.run(engine.detokenize(engine.prompts[2]))
    expected = "<|im_start|>system\nWrite Python.<|im_end|>\n"
    for turn in conversation.turns:
        expected += f"<|im_start|>user\n{turn.prompt.messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        expected += f"{turn.content}<|im_end|>\n"
    last = f"{conversation.turns[-1].content}<|im_end|>\n"
    assert prompt == expected.removesuffix(last)


def test_restart_follows_the_template_with_a_record_of_its_own(engine: RecordingEngine) -> None:
    conversation = asyncio.run(think_twice(engine, on_fork="restart"))
    prompt = asyncio.run(engine.detokenize(engine.prompts[1]))
    first = conversation.turns[0]
    assert "<think>" not in prompt
    assert first.content.partition("</think>")[2] + "<|im_end|>\n<|im_start|>user\nThink about 1." in prompt
    records = conversation.records()
    assert [record.prompt_ids for record in records] == engine.prompts
    assert [record.response_ids for record in records] == [turn.reply.token_ids for turn in conversation.turns]
    assert [sum(record.mask) for record in records] == [len(record.response_ids) for record in records]


def test_fork_can_be_an_error_that_leaves_the_conversation_as_it_was(engine: RecordingEngine) -> None:
    async def raised() -> int:
        template = {"chat_template": DROPS_REASONING}
        conversation = Conversation(engine, [SYSTEM], REASONS, on_fork="raise", template_arguments=template)
        await conversation.send("Think.")
        with pytest.raises(RequestError, match=r'rewrites turn 0: .* use on_fork="keep" or "restart"'):
            await conversation.send("Again.")
        return len(conversation.turns)

    assert asyncio.run(raised()) == 1


def test_turn_can_be_retried_edited_and_branched(engine: RecordingEngine) -> None:
    async def talk() -> None:
        conversation = Conversation(engine, [SYSTEM], SHORT)
        first = await conversation.send("One.")
        second = await conversation.send("Two.")
        branch = conversation.branch()
        retried = await branch.retry(SamplingParams(max_tokens=12, seed=99))
        assert retried.prompt is second.prompt
        assert retried.reply.token_ids != second.reply.token_ids
        assert (branch.turns, conversation.turns) == ((first, retried), (first, second))
        assert engine.prompts[2] == engine.prompts[1]

        edited = await conversation.edit(1, "Three.")
        assert conversation.turns == (first, edited)
        assert edited.num_cached_tokens == full_blocks(len(conversation.branch(1).token_ids), engine)
        rewritten = await conversation.edit(0, {"role": "user", "content": "Four."})
        assert conversation.turns == (rewritten,)
        assert conversation.messages[1:] == [{"role": "user", "content": "Four."}, rewritten.message]
        with pytest.raises(RequestError, match="below 1"):
            await conversation.edit(1, "Five.")
        assert branch.branch(0).turns == ()

    asyncio.run(talk())


def test_call_that_fails_leaves_the_conversation_as_it_was(engine: RecordingEngine) -> None:
    async def talk() -> None:
        conversation = Conversation(engine, [SYSTEM], SHORT)
        turn = await conversation.send("One.")
        with pytest.raises(RequestTooLarge):
            await conversation.send("Two.", SamplingParams(max_tokens=1 << 20))
        waiting = asyncio.create_task(conversation.send("Two.", SamplingParams(max_tokens=500, ignore_eos=True)))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="waits for a reply"):
            await conversation.send("Three.")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert conversation.turns == (turn,)
        assert (await conversation.send("Two.")) in conversation.turns

    asyncio.run(talk())


def test_stream_adds_the_turn_after_its_last_delta(engine: RecordingEngine) -> None:
    async def talk() -> tuple[str, Conversation]:
        conversation = Conversation(engine, [SYSTEM], SHORT)
        text = ""
        async for delta in conversation.stream("Write close."):
            assert conversation.turns == ()
            text += delta.text
        return text, conversation

    text, conversation = asyncio.run(talk())
    assert text == conversation.turns[0].text


def test_records_are_of_one_length_and_mark_what_was_sampled(engine: RecordingEngine) -> None:
    async def talk() -> Conversation:
        conversation = Conversation(engine, [SYSTEM], SHORT)
        for number in range(3):
            await conversation.send(f"Write function {number}.")
        return conversation

    conversation = asyncio.run(talk())
    [record] = conversation.records()
    columns = record.response_ids, record.mask, record.logprobs, record.sampled_logprobs, record.weight_versions
    assert len(set(map(len, columns))) == 1
    sampled = [token for token, flag in zip(record.response_ids, record.mask, strict=True) if flag]
    assert sampled == [token for turn in conversation.turns for token in turn.reply.token_ids]
    logprobs = [value for value, flag in zip(record.logprobs, record.mask, strict=True) if flag]
    assert logprobs == [value for turn in conversation.turns for value in turn.reply.token_logprobs]
    rest = [row for row in zip(record.mask, record.logprobs, record.sampled_logprobs, strict=True) if row[0] == 0]
    assert set(rest) == {(0, 0.0, 0.0)}


def test_record_has_the_version_of_the_weights_of_each_token() -> None:
    async def talk(engine: InferenceEngine) -> TokenRecord:
        conversation = Conversation(engine, params=SamplingParams(max_tokens=4, ignore_eos=True))
        await conversation.send("One.")
        async with engine.updating():
            pass
        await conversation.send("Two.")
        return conversation.records()[0]

    with replying_engine(["Hello."], HERMES) as engine:
        record = asyncio.run(talk(engine))
    assert record.weight_versions == [
        {0: -1, 1: 0}[flag] if number < 4 else {0: -1, 1: 1}[flag] for number, flag in enumerate(record.mask)
    ]
    assert record.mask[:4] == [1, 1, 1, 1]
    assert sum(record.mask) == 8


def test_t12_tokens_of_the_environment_have_no_gradient(engine: RecordingEngine) -> None:
    """A loss over the mask of a record."""
    import torch
    from transformers import AutoModelForCausalLM

    from penstock.demo import MODEL_DIR

    async def talk() -> TokenRecord:
        conversation = Conversation(engine, [SYSTEM], SHORT)
        await conversation.send("One.")
        await conversation.send("Two.")
        return conversation.records()[0]

    record = asyncio.run(talk())
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32")
    ids = torch.tensor([record.prompt_ids + record.response_ids])
    first = len(record.prompt_ids) - 1
    logits = model(ids).logits[0, first:-1].detach().requires_grad_()
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(record.response_ids)[:, None])[:, 0]
    mask = torch.tensor(record.mask)
    assert torch.allclose(logprobs[mask == 1], torch.tensor(record.logprobs)[mask == 1], atol=0.05)
    (-(logprobs * mask).sum()).backward()
    assert logits.grad is not None
    has_gradient = logits.grad.abs().sum(-1) > 0
    assert has_gradient.tolist() == (mask == 1).tolist()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": "Sunny."}, "end with a user's message"),
        ([{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Sunny."}], "end with a user's"),
        ([{"role": "user", "content": "Weather?"}, 5], "a chat message or a list of them"),
    ],
)
def test_messages_that_ask_for_no_reply_are_refused(message: Any, words: str) -> None:
    """A message of the assistant was refused for arguments that nobody had passed, and a number with a TypeError."""
    with replying_engine({"Weather?": "It rains."}) as engine, pytest.raises(RequestError, match=words):
        asyncio.run(Conversation(engine).send(message))


@pytest.mark.parametrize(
    ("result", "written"),
    [({"sky": None, "wet": True}, '{"sky": null, "wet": true}'), (["ü", 5], '["ü", 5]'), ("sun", "sun"), ({5}, "{5}")],
)
def test_a_tool_result_that_is_no_text_is_written_as_json(result: object, written: str) -> None:
    """A dictionary was written as Python writes it, with `None`, `True` and single quotes."""
    replies = {"Weather?": '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>', "": "Well."}

    async def talk(engine: InferenceEngine) -> str:
        conversation = Conversation(engine, params=SamplingParams(max_tokens=200), tools=WEATHER)
        await conversation.send("Weather?")
        turn = await conversation.send_results([result])
        return str(turn.prompt.messages[0]["content"])

    with replying_engine(replies, HERMES) as engine:
        assert asyncio.run(talk(engine)) == written


def test_tool_results_follow_the_calls_of_the_last_reply() -> None:
    calls = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    replies = {"Weather?": calls * 2, "rain": "It rains.", "Hello?": "Hello."}

    async def talk(engine: InferenceEngine) -> Conversation:
        conversation = Conversation(engine, params=SamplingParams(max_tokens=200), tools=WEATHER)
        await conversation.send("Hello?")
        with pytest.raises(RequestError, match="1 results for 0 tool calls"):
            await conversation.send_results(["rain"])
        await conversation.send("Weather?")
        assert [call.arguments for call in conversation.tool_calls()] == [{"city": "Bern"}] * 2
        await conversation.send_results(["sun", "rain"])
        return conversation

    with replying_engine(replies, HERMES) as engine:
        conversation = asyncio.run(talk(engine))
        text = asyncio.run(engine.detokenize(conversation.token_ids))
    assert conversation.turns[-1].text == "It rains."
    assert [message["role"] for message in conversation.turns[-1].prompt.messages] == ["tool", "tool"]
    assert "<|tool|>sun<end><|tool|>rain<end>" in text
    assert "<tools>1</tools>" in text


def test_t19_malformed_call_is_no_call_and_no_error() -> None:
    """What a model writes never raises."""

    async def talk(engine: InferenceEngine) -> Conversation:
        conversation = Conversation(engine, params=SamplingParams(max_tokens=200), tools=WEATHER)
        await conversation.send("Weather?")
        return conversation

    with replying_engine(['<tool_call>{"name": "weather", "arguments": }}</tool_call>'], HERMES) as engine:
        conversation = asyncio.run(talk(engine))
        assert conversation.tool_calls() == []


def test_engine_without_templates_takes_a_tokenizer() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = HERMES
    engine = EchoEngine()
    with pytest.raises(RequestError, match="pass the model's tokenizer"):
        Conversation(engine)

    async def talk() -> Conversation:
        conversation = Conversation(engine, tokenizer=tokenizer)  # type: ignore[arg-type]  # no stubs
        await conversation.send("Hello", SamplingParams(max_tokens=3))
        await conversation.send("again", SamplingParams(max_tokens=3))
        return conversation

    conversation = asyncio.run(talk())
    ids = conversation.token_ids
    assert tokenizer.decode(ids).startswith("<|user|>Hello<end><|assistant|>")
    assert conversation.turns[1].reply.token_ids == ids[:3]
    engine.stop()


class TextOnlyEngine(EchoEngine):
    """Returns texts without their ids, as some servers do."""

    def generate(self, prompt: Any, *args: Any, **options: Any) -> RequestHandle:
        handle = super().generate(prompt, *args, **options)

        async def without_ids() -> Any:
            output = await handle
            output.outputs[0].token_ids = []
            return output

        return without_ids()  # type: ignore[return-value]  # a conversation awaits it only


def test_engine_without_token_ids_is_refused_by_name() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = HERMES
    engine = TextOnlyEngine()
    conversation = Conversation(engine, tokenizer=tokenizer)  # type: ignore[arg-type]  # no stubs
    with pytest.raises(RequestError, match="returns no token ids"):
        asyncio.run(conversation.send("Hello", SamplingParams(max_tokens=3)))
    assert conversation.turns == ()
    engine.stop()


def test_wrong_arguments_are_refused(engine: RecordingEngine) -> None:
    with pytest.raises(RequestError, match="on_fork must be one of"):
        Conversation(engine, on_fork="ignore")  # type: ignore[arg-type]

    async def talk() -> None:
        conversation = Conversation(engine)
        with pytest.raises(RequestError, match="no turn yet"):
            await conversation.retry()
        with pytest.raises(RequestError, match=r"one reply, not n=2: use branch\(\)"):
            await conversation.send("One.", SamplingParams(n=2))
        with pytest.raises(RequestError, match="message must be"):
            await conversation.send(3)  # type: ignore[arg-type]
        assert conversation.turns == ()

    asyncio.run(talk())


@pytest.mark.parametrize("messages", ["Be brief.", SYSTEM, None, 3, ["Be brief."]])
def test_messages_that_are_no_list_of_messages_are_refused_by_name(messages: Any, engine: RecordingEngine) -> None:
    """These raised `TypeError` or `ValueError` of Python itself."""
    with pytest.raises(RequestError, match="messages must be a list of chat messages"):
        Conversation(engine, messages)


SIGNS = {
    "hermes": "<tool_call>",
    "qwen3_coder": "<function=",
    "mistral": "[TOOL_CALLS]",
    "llama3": "<|python_tag|>",
    "xml": "<function_calls>",
    "pythonic": "func_name1(",
    "json": "",
}


@pytest.mark.parametrize("format", SIGNS)
def test_malformed_calls_of_every_format_end_no_conversation(format: str) -> None:
    """Awaited and streamed alike; the complete calls beside them are found."""
    failures = [failure for failure in FAILURES if failure.format == format]
    replies = {f"task {number}.": failure.text for number, failure in enumerate(failures)}
    params, tools = SamplingParams(max_tokens=300), [tool.to_dict() for tool in TOOLS]

    async def talk(engine: InferenceEngine, task: str, is_streamed: bool) -> list[str]:
        conversation = Conversation(engine, params=params, tools=tools)
        if is_streamed:
            async for _ in conversation.stream(task):
                pass
        else:
            await conversation.send(task)
        return [call.name for call in conversation.tool_calls()]

    with replying_engine(replies, HERMES.replace("<tool_call>", SIGNS[format])) as engine:
        for task, failure in zip(replies, failures, strict=True):
            names = [name for status, name in failure.attempts if status == "complete"]
            assert [asyncio.run(talk(engine, task, is_streamed)) for is_streamed in (False, True)] == [names, names]


async def test_every_turn_runs_with_the_adapter_of_the_conversation() -> None:
    torch.manual_seed(0)
    base = build("llama", vocab_size=512)
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    adapter = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    async with InferenceEngine(base, byte_level(), kv_cache_tokens=4096) as engine:
        await engine.load_adapter("poet", adapter)
        conversation = Conversation(engine, params=greedy, adapter="poet")
        for message in ("one", "two"):
            turn = await conversation.send(message)
            ids = conversation.token_ids
            prompt, reply = ids[: -len(turn.reply.token_ids)], ids[-len(turn.reply.token_ids) :]
            logits = adapter(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == reply
        other = Conversation(engine, params=greedy, adapter="other")
        with pytest.raises(RequestError, match="not loaded"):
            await other.send("one")


def test_an_adapter_needs_an_engine_that_takes_adapters() -> None:
    with pytest.raises(RequestError, match="no adapters"):
        Conversation(EchoEngine(), adapter="poet", tokenizer=byte_level())
    with pytest.raises(RequestError, match="adapter"):
        Conversation(EchoEngine(), adapter=3, tokenizer=byte_level())  # type: ignore[arg-type]
